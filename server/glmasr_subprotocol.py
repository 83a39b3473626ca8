"""ASGI middleware for browsers, which cannot set a WebSocket's Authorization: takes the key from a subprotocol.

As OpenAI has it, the client offers `openai-insecure-api-key.KEY` beside `realtime`. The key is put where vLLM's own check
looks for it, so this lets nobody in.
"""

from collections.abc import Awaitable, Callable
from typing import Any

KEY_PREFIX = "openai-insecure-api-key."


class KeyInSubprotocol:
    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "websocket" and not any(name == b"authorization" for name, _ in scope["headers"]):
            key = next((name.removeprefix(KEY_PREFIX) for name in scope["subprotocols"] if name.startswith(KEY_PREFIX)), None)
            if key is not None:
                scope = scope | {"headers": [*scope["headers"], (b"authorization", f"Bearer {key}".encode())]}
        await self.app(scope, receive, send)
