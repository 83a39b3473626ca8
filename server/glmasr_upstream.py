"""Servers that transcribe for a router that runs alone, over their HTTP API."""

import io
import wave

import httpx
import numpy as np

if __package__:
    from .glmasr_events import Transcription
    from .glmasr_guard import max_tokens
    from .glmasr_scribe import EngineFailed, Text
    from .glmasr_vad import SAMPLING_RATE
else:
    from glmasr_events import Transcription
    from glmasr_guard import max_tokens
    from glmasr_scribe import EngineFailed, Text
    from glmasr_vad import SAMPLING_RATE

TIMEOUT_S = 60


def wav(samples: np.ndarray) -> bytes:
    """(samples,) float32 at 16 kHz as a WAV of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, SAMPLING_RATE, samples.size, "NONE", ""))
        file.writeframes((samples * 32768).round().clip(-32768, 32767).astype("<i2").tobytes())
    return buffer.getvalue()


class Upstreams:
    """The servers; each request goes to the one with the fewest in flight."""

    def __init__(self, urls: list[str]):
        self.in_flight = {url.rstrip("/").removesuffix("/v1"): 0 for url in urls}
        self.client = httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))

    def engine(self, authorization: str | None) -> "UpstreamEngine":
        return UpstreamEngine(self, {"Authorization": authorization} if authorization else {})

    async def ask(self, samples: np.ndarray, asked: Transcription, headers: dict[str, str], **fields: str) -> str:
        """The text. A cancelled request closes its connection, and the server aborts its work.

        Raises:
            EngineFailed: no answer, or another than 200
        """
        url = min(self.in_flight, key=self.in_flight.get)
        data = {name: value for name, value in asked.model_dump().items() if value} | fields
        self.in_flight[url] += 1
        try:
            answer = await self.client.post(
                f"{url}/v1/audio/transcriptions", data=data, files={"file": ("clip.wav", wav(samples))}, headers=headers
            )
        except httpx.HTTPError as error:
            raise EngineFailed(f"the server at {url} does not answer: {error or type(error).__name__}") from error
        finally:
            self.in_flight[url] -= 1
        if answer.status_code != 200:
            raise EngineFailed(f"the server at {url} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json()["text"]

    async def close(self) -> None:
        await self.client.aclose()


class UpstreamEngine:
    """An `Engine` for one client, whose key it passes on."""

    def __init__(self, upstreams: Upstreams, headers: dict[str, str]):
        self.upstreams, self.headers = upstreams, headers

    def check(self, asked: Transcription) -> None:
        """Nothing: the servers will say."""

    async def final(self, samples: np.ndarray, speech_s: float, asked: Transcription) -> Text:
        return Text(await self.upstreams.ask(samples, asked, self.headers))

    async def partial(self, samples: np.ndarray, asked: Transcription) -> str:
        most = max_tokens(samples.size / SAMPLING_RATE)
        return await self.upstreams.ask(samples, asked, self.headers, max_completion_tokens=str(most))
