"""What a running server transcribes, so many clips at a time, and how well: for the bundled checkpoint."""

import asyncio
import base64
import io
import json
import sys
from pathlib import Path

import aiohttp
import numpy as np
import soundfile
from load import INSTRUCTION, RATE, ROUTES, WAVS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
import held_out  # noqa: E402

MAX_TOKENS = 300  # of an answer
TIMEOUT_S = 600  # of one request


def held_out_clips(count: int) -> list[held_out.Clip]:
    """The clips of tests/test_accuracy.py."""
    return held_out.speech_clips(count)


def samples() -> tuple[list[np.ndarray], list[str]]:
    """The recordings in wavs/ and their expected texts."""
    paths = sorted(WAVS.glob("*.wav"))
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
    return [soundfile.read(path, dtype="float32")[0] for path in paths], texts


def transcripts(url: str, waveforms: list[np.ndarray], in_flight: int) -> list[str]:
    """The texts of (samples,) float32 each; sent as float WAV, which keeps every bit.

    Raises:
        aiohttp.ClientResponseError: an answer was not 200
    """
    return asyncio.run(_ask_all(url, [_body(waveform) for waveform in waveforms], in_flight))


def wav_bytes(waveform: np.ndarray) -> bytes:
    """(samples,) float32 as float WAV, which keeps every bit."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def _body(waveform: np.ndarray) -> bytes:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav_bytes(waveform)).decode(), "format": "wav"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": INSTRUCTION}]}]
    return json.dumps({"messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}).encode()


def transcribed(url: str, waveforms: list[np.ndarray], in_flight: int, **fields: str) -> list[str]:
    """As `transcripts`, by the transcription route, with further fields of its form."""
    return asyncio.run(_ask_all(url, [wav_bytes(waveform) for waveform in waveforms], in_flight, fields))


async def _ask_all(url: str, bodies: list[bytes], in_flight: int, fields: dict[str, str] | None = None) -> list[str]:
    """By chat, or by the transcription route where there are fields."""
    free = asyncio.Semaphore(in_flight)

    async def ask(session: aiohttp.ClientSession, body: bytes) -> str:
        if fields is None:
            async with free, session.post(url + ROUTES["chat"], data=body, headers={"Content-Type": "application/json"}) as response:
                return (await response.json())["choices"][0]["message"]["content"]
        form = aiohttp.FormData(fields)
        form.add_field("file", body, filename="speech.wav")
        async with free, session.post(url + ROUTES["transcriptions"], data=form) as response:
            return (await response.json())["text"]

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, raise_for_status=True) as session:
        return await asyncio.gather(*(ask(session, body) for body in bodies))


def scores(clips: list[held_out.Clip], texts: list[str]) -> dict[str, float]:
    """Error rates in percent, as columns."""
    return {f"{name} %": rate for name, rate in held_out.error_rates(clips, texts).items()}
