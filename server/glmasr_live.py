"""/v1/realtime in vLLM's API server: an endpoint plugin that takes the place of vLLM's route, behind the same port and key."""

import asyncio
import itertools
from argparse import Namespace
from collections.abc import Callable

import numpy as np
from fastapi import FastAPI, WebSocket
from starlette.datastructures import State
from starlette.routing import Match, WebSocketRoute

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from .glmasr_events import Transcription, new_id
from .glmasr_limits import Limits
from .glmasr_live_metrics import Metrics
from .glmasr_scribe import EngineFailed, Text
from .glmasr_segments import Segment
from .glmasr_subprotocol import KeyInSubprotocol
from .glmasr_transcription import Form, Progress, Transcriber, known_language
from .glmasr_vad import SAMPLING_RATE
from .server_ws import PATH, Live

# server/serve.py names the middleware by this module: were it not to load, vLLM would start without the plugin, but not
# without its middleware.
__all__ = ["KeyInSubprotocol", "LivePlugin"]
DRAIN_S = 15.0  # for all sessions together, at the end
LINGER_S = 3  # for connections, after that


class VllmEngine:
    """vLLM's engine as a session's `Engine`: what a file gets in /v1/audio/transcriptions, a turn gets too."""

    def __init__(self, serving: OpenAIServingTranscription, metrics: Metrics):
        self.serving, self.metrics = serving, metrics
        self.id, self.asked = new_id("live"), itertools.count()

    def check(self, asked: Transcription) -> None:
        """Raises ValueError for a model or language that is not served."""
        if asked.model and not self.serving._is_model_supported(asked.model):
            raise ValueError(f"the model {asked.model!r} is not served here; {self.serving.models.model_name()!r} is")
        try:
            known_language(asked.language)
        except VLLMValidationError as error:
            raise ValueError(str(error)) from error

    async def final(self, samples: np.ndarray, speech_s: float, asked: Transcription) -> Text:
        """As the whole of a file: guarded, and with its tokens."""
        seconds, progress = samples.size / SAMPLING_RATE, Progress()
        segment = Segment(0.0, seconds, samples, speech_s)
        with self.metrics.tasks.track_inprogress():
            try:
                answer = await self._transcriber(asked, progress).answer(segment)
            except (VLLMError, EngineDeadError, EngineGenerateError, ValueError) as error:
                raise EngineFailed(str(error) or type(error).__name__) from error
        return Text(answer.guarded.text, progress.prompt_tokens, progress.answer_tokens)

    async def partial(self, samples: np.ndarray, asked: Transcription) -> str:
        """One greedy decoding; nothing where it ran into its bound."""
        with self.metrics.tasks.track_inprogress():
            try:
                output = await self._transcriber(asked, Progress())._generate(samples, 0.0)
            except (VLLMError, EngineDeadError, EngineGenerateError, ValueError) as error:
                raise EngineFailed(str(error) or type(error).__name__) from error
        return output.text.strip() if output.finish_reason == "stop" else ""

    def _transcriber(self, asked: Transcription, progress: Progress) -> Transcriber:
        model = asked.model or self.serving.models.model_name()
        form = Form(model=model, language=known_language(asked.language), prompt=asked.prompt or "")
        return Transcriber(self.serving, form, f"{self.id}-{next(self.asked)}", progress)


class LivePlugin:
    """vLLM's EndpointPlugin: attaches the route."""

    name = "glmasr_live"
    required_tasks = ("transcription",)

    def attach_router(self, app: FastAPI) -> None:
        self.app, self.live = app, None

        async def realtime(websocket: WebSocket) -> None:
            await self.live.serve(websocket, VllmEngine(app.state.openai_serving_transcription, self.live.metrics))

        self.route = WebSocketRoute(PATH, realtime, name="glmasr_live")
        app.router.routes.insert(0, self.route)  # the first that matches answers: vLLM's may stand behind

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Raises RuntimeError where another route would answer."""
        scope = {"type": "websocket", "path": PATH, "root_path": "", "headers": []}
        answering = next((route for route in self.app.routes if route.matches(scope)[0] == Match.FULL), None)
        if answering is not self.route:
            raise RuntimeError(f"{PATH} is answered by {answering}, not by {self.route}")
        self.live = Live(Limits.read(processes=args.api_server_count or 1), Metrics())
        self.configured = asyncio.create_task(configure_http_server(state))
        engine_client.shutdown = draining(engine_client.shutdown, self.live, asyncio.get_running_loop())


async def configure_http_server(state: State) -> None:
    """Lets a client's pong be late, and a connection that does not close hold up the end for `LINGER_S` only.

    Behind audio that comes faster than it can be worked, a pong is read with the audio; a client that is away without having
    said so is left by MAX_IDLE_S. vLLM has no options for these, and makes the HTTP server after all plugins.
    """
    while not hasattr(state, "server"):
        await asyncio.sleep(0.01)
    config = state.server.config
    config.ws_ping_timeout, config.timeout_graceful_shutdown = None, LINGER_S


def draining(shutdown: Callable[..., None], live: Live, loop: asyncio.AbstractEventLoop) -> Callable[..., None]:
    """vLLM's shutdown of the engine, which it calls in a thread after SIGTERM, once the sessions have ended.

    vLLM has no hook for that moment: the HTTP server's own shutdown comes when the engine is gone. It calls this once more
    on the event loop, which must not wait for itself.
    """

    def after_sessions(*args, **options) -> None:
        if loop.is_running() and not live.closing:
            try:
                asyncio.run_coroutine_threadsafe(live.drain(), loop).result(DRAIN_S)
            except TimeoutError:
                pass  # those left are closed with 1012 by the HTTP server
        shutdown(*args, **options)

    return after_sessions
