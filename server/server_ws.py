"""The WebSocket server, /v1/realtime: sessions over Starlette's sockets. Part of vLLM's API server, or alone:

    python server/server_ws.py --upstream http://localhost:8300 [--upstream ...] [--host 0.0.0.0] [--port 8301]

Alone it needs no vLLM: audio goes to the upstream servers' /v1/audio/transcriptions, with the key that the client sent.
"""

import argparse
import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import prometheus_client
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

if __package__:
    from .glmasr_limits import Limits
    from .glmasr_live_metrics import Metrics
    from .glmasr_scribe import Engine, Gate
    from .glmasr_session import Ending, Session, Shared
    from .glmasr_subprotocol import KEY_PREFIX, KeyInSubprotocol
    from .glmasr_voices import Voices
else:
    from glmasr_limits import Limits
    from glmasr_live_metrics import Metrics
    from glmasr_scribe import Engine, Gate
    from glmasr_session import Ending, Session, Shared
    from glmasr_subprotocol import KEY_PREFIX, KeyInSubprotocol
    from glmasr_voices import Voices

PATH = "/v1/realtime"
RETRY_AFTER_S = 5
CLOSE_S = 2.0  # for a client to answer the closing
SHUTDOWN = Ending(1012, "server shutting down")
log = logging.getLogger("vllm.glmasr.live")


class Sock:
    """A Starlette WebSocket as a session's `Socket`."""

    def __init__(self, websocket: WebSocket):
        self.websocket = websocket

    async def receive(self) -> str | bytes | None:
        message = await self.websocket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        return message.get("text") or message.get("bytes") or ""

    async def send(self, message: str) -> None:
        try:
            await self.websocket.send_text(message)
        except (WebSocketDisconnect, RuntimeError) as error:  # RuntimeError: the closing was seen before
            raise ConnectionError(str(error)) from error

    async def close(self, code: int, reason: str) -> None:
        """Waits for the client's answer: uvicorn does not see it while messages before it have not been taken."""
        if self.websocket.application_state != WebSocketState.CONNECTED:
            return
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, TimeoutError):  # the client was quicker, or never answers
            async with asyncio.timeout(CLOSE_S):
                await self.websocket.close(code, reason)
                while await self.receive() is not None:
                    pass


class Live:
    """The sessions of one process."""

    def __init__(self, limits: Limits, metrics: Metrics):
        self.limits, self.metrics = limits, metrics
        self.voices, self.gate = Voices(), Gate(limits.partials)
        self.sessions: set[Session] = set()
        self.opening = 0  # accepted, not yet a session
        self.closing = False

    async def serve(self, websocket: WebSocket, engine: Engine) -> None:
        """One connection, from the upgrade to the end."""
        if self.closing or len(self.sessions) + self.opening >= self.limits.sessions:
            return await self.refuse(websocket)
        offered = websocket.scope.get("subprotocols") or []
        chosen = next((name for name in offered if not name.startswith(KEY_PREFIX)), next(iter(offered), None))
        self.opening += 1
        try:
            await websocket.accept(chosen)
            session = Session(Sock(websocket), Shared(engine, self.voices, self.gate, self.metrics, self.limits))
            self.sessions.add(session)
        except (WebSocketDisconnect, RuntimeError):  # the client left meanwhile
            return
        finally:
            self.opening -= 1
        self.metrics.sessions.inc()
        try:
            await session.run()
        except Exception:  # the one broad boundary: a fault in one session is not the others'
            log.exception("session %s failed", session.id)
            await session.socket.close(1011, "internal error")
        finally:
            self.metrics.sessions.dec()
            self.sessions.discard(session)

    async def refuse(self, websocket: WebSocket) -> None:
        """503 before the upgrade."""
        message = "the server is shutting down"
        if not self.closing:
            message = f"the server is full: it takes {self.limits.sessions} live sessions at once in each process (MAX_SESSIONS)"
        self.metrics.dropped("too_many_sessions" if not self.closing else "shutting_down")
        error = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
        answer = JSONResponse({"error": error}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await websocket.send_denial_response(answer)

    async def drain(self) -> None:
        """Ends all sessions: finals in flight are delivered or failed, then the connections are closed with 1012."""
        self.closing = True
        for session in self.sessions:
            session.end(SHUTDOWN)
        while self.sessions:
            await asyncio.sleep(0.02)


class Draining(uvicorn.Server):
    """Lets sessions end before it closes their connections."""

    def __init__(self, config: uvicorn.Config, live: Live):
        super().__init__(config)
        self.live = live

    async def shutdown(self, sockets=None) -> None:
        await self.live.drain()
        await super().shutdown(sockets)


def app(live: Live, engine_for: Callable[[WebSocket], Engine], close: Callable) -> Starlette:
    """The router alone."""

    async def realtime(websocket: WebSocket) -> None:
        await live.serve(websocket, engine_for(websocket))

    async def metrics(_: Request) -> Response:
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def health(_: Request) -> Response:
        return Response()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await close()

    routes = [WebSocketRoute(PATH, realtime), Route("/metrics", metrics), Route("/health", health)]
    made = Starlette(routes=routes, lifespan=lifespan)
    made.add_middleware(KeyInSubprotocol)
    return made


def main() -> None:
    if __package__:
        from .glmasr_upstream import Upstreams
    else:
        from glmasr_upstream import Upstreams

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", action="append", required=True, help="a server's URL; may be given several times")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8301)
    args = parser.parse_args()
    live, upstreams = Live(Limits.read(), Metrics()), Upstreams(args.upstream)
    made = app(live, lambda websocket: upstreams.engine(websocket.headers.get("authorization")), upstreams.close)
    Draining(uvicorn.Config(made, host=args.host, port=args.port, ws_ping_timeout=None), live).run()


if __name__ == "__main__":
    main()
