"""ASGI middleware that takes so many requests at once, answers the others 503 with Retry-After, and keeps /health quick.

vLLM's own --max-num-queued-reqs counts what the engine holds: bodies and audio still being decoded go uncounted.
"""

import asyncio
import json
import math
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

PLACE_BYTES = 4 * 2**20  # a request takes one place, and one more for each such amount of body it announces
MAX_RETRY_AFTER_S = 60  # openai's client waits no longer
ROUND_S = 0.02  # time for requests and their bodies in one round of the event loop

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Admission:
    """Lets POST requests through to `app` while there are places; everything else always passes.

    The environment's MAX_IN_FLIGHT is the server's number of places, of which each API process has an equal share.
    A request keeps its places until its answer has ended or its client has left.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]):
        self.app = app
        self.places = int(os.environ["MAX_IN_FLIGHT"])
        self.taken = 0
        self.last_took_s = 0.0
        self.round_began: float | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        await self.turn()
        processes = scope["app"].state.args.api_server_count or 1  # vLLM's None: this one alone
        share = math.ceil(self.places / processes)
        body_bytes = int(dict(scope["headers"]).get(b"content-length", 0))
        needed = min(share, 1 + body_bytes // PLACE_BYTES)
        if self.taken + needed > share:
            return await self.refuse(receive, send)

        async def receive_in_turn() -> Message:
            message = await receive()
            await self.turn()
            return message

        self.taken += needed
        began = time.monotonic()
        try:
            await self.app(scope, receive_in_turn, send)
        finally:
            self.taken -= needed
            self.last_took_s = time.monotonic() - began

    async def turn(self) -> None:
        """Waits while this round's time is spent.

        The loop runs all that is ready before it looks at its sockets again: without rounds, the parsing of a
        thousand bodies that arrive together would be ahead of the next /health.
        """
        while self.round_began is not None and time.monotonic() - self.round_began > ROUND_S:
            await asyncio.sleep(0)
        if self.round_began is None:
            self.round_began = time.monotonic()
            asyncio.get_running_loop().call_soon(self.end_round)

    def end_round(self) -> None:
        self.round_began = None

    async def refuse(self, receive: Receive, send: Send) -> None:
        """503. When all places are taken, one refused now gets one after about the time that a request takes."""
        retry_after_s = min(max(1, math.ceil(self.last_took_s)), MAX_RETRY_AFTER_S)
        message = f"the server is full: it takes {self.places} requests at once (MAX_IN_FLIGHT); try again in {retry_after_s} s"
        error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
        body = json.dumps({"error": error}).encode()
        headers = {"content-type": "application/json", "content-length": len(body), "retry-after": retry_after_s}
        pairs = [(name.encode(), str(value).encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 503, "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        # That was all, but the client may still be sending; a connection closed on it could lose the answer.
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.body"})
