"""Load on a running server: clips of speech that no cache has seen, sent with so many requests in flight.

The bodies are made before the clock starts, and the clients run in processes of their own.
"""

import asyncio
import base64
import io
import json
import multiprocessing
import queue
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import soundfile

WAVS = Path(__file__).resolve().parent.parent / "wavs"
RATE = 16000  # Hz
TOKENS_A_SECOND = 4  # of the answer
UTTERANCE_MEAN_S, UTTERANCE_SIGMA, SHORTEST_S, LONGEST_S = 7.0, 0.6, 0.5, 30.0
MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}
INSTRUCTION = "Please transcribe this audio."
TIMEOUT_S = 600


@dataclass(frozen=True)
class Workload:
    """What one run sends.

    Attributes:
        lengths: "utterances" (log-normal, 7 s on average), "30 s", "7 s" or "mix" (half utterances, half 30 s)
        route: "chat" (base64 in JSON) or "transcriptions" (multipart form)
        encoding: of the audio: wav, flac or mp3
    """

    lengths: str
    route: str = "chat"
    encoding: str = "wav"


@dataclass(frozen=True)
class Answered:
    """One request: seconds of audio, and seconds on the clock of when it was sent and answered."""

    audio_s: float
    sent: float
    done: float
    status: int


def seconds(workload: Workload, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) lengths of clips in seconds."""
    mu = np.log(UTTERANCE_MEAN_S) - UTTERANCE_SIGMA**2 / 2
    drawn = np.clip(rng.lognormal(mu, UTTERANCE_SIGMA, count), SHORTEST_S, LONGEST_S)
    if workload.lengths == "utterances":
        return drawn
    if workload.lengths == "mix":
        return np.where(np.arange(count) % 2, drawn, LONGEST_S)
    return np.full(count, float(workload.lengths.removesuffix(" s")))


def speech(length_s: float, recordings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(samples,) float32: the recordings from a random place on, over and over, with faint noise that makes it new."""
    count = round(length_s * RATE)
    samples = np.take(recordings, np.arange(count) + rng.integers(recordings.size), mode="wrap")
    return samples + 1e-3 * rng.standard_normal(count).astype(np.float32)


def body(workload: Workload, samples: np.ndarray) -> tuple[bytes, str]:
    """A request's body and its content type."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=workload.encoding.upper())
    answer_tokens = max(1, round(TOKENS_A_SECOND * samples.size / RATE))
    if workload.route == "chat":
        audio = {"data": base64.b64encode(buffer.getvalue()).decode(), "format": workload.encoding}
        content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": INSTRUCTION}]
        request = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": answer_tokens}
        return json.dumps(request | {"ignore_eos": True}).encode(), "application/json"
    form = aiohttp.MultipartWriter("form-data")
    for name, value in {"temperature": "0", "max_completion_tokens": str(answer_tokens)}.items():
        form.append(value).set_content_disposition("form-data", name=name)
    part = form.append(buffer.getvalue(), {"Content-Type": MEDIA_TYPES[workload.encoding]})
    part.set_content_disposition("form-data", name="file", filename=f"clip.{workload.encoding}")
    return asyncio.run(form.as_bytes()), form.headers["Content-Type"]


def _client(url: str, workload: Workload, lengths: list[float], in_flight: int, seed: int, barrier, results) -> None:
    """One process: makes its bodies, waits for the others, sends."""
    rng = np.random.default_rng(seed)
    recordings = np.concatenate([soundfile.read(path, dtype="float32")[0] for path in sorted(WAVS.glob("*.wav"))])
    bodies = [body(workload, speech(length, recordings, rng)) for length in lengths]
    barrier.wait()
    results.put(asyncio.run(_send_all(url, workload, lengths, bodies, in_flight)))


async def _send_all(url: str, workload: Workload, lengths: list[float], bodies: list, in_flight: int) -> list[Answered]:
    route = {"chat": "/v1/chat/completions", "transcriptions": "/v1/audio/transcriptions"}[workload.route]
    waiting, answered = iter(zip(lengths, bodies, strict=True)), []

    async def keep_sending(session: aiohttp.ClientSession) -> None:
        for length, (data, content_type) in waiting:  # shared by all
            sent = time.time()
            async with session.post(url + route, data=data, headers={"Content-Type": content_type}) as response:
                await response.read()
            answered.append(Answered(length, sent, time.time(), response.status))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:
        await asyncio.gather(*(keep_sending(session) for _ in range(in_flight)))
    return answered


def send(url: str, workload: Workload, count: int, in_flight: int, processes: int, seed: int) -> list[Answered]:
    """Sends `count` clips, `in_flight` at a time, each as soon as another is answered.

    Raises:
        RuntimeError: an answer was not 200, or none came
    """
    processes = min(processes, in_flight)
    lengths = seconds(workload, count, np.random.default_rng(seed)).tolist()
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    clients = []
    for i in range(processes):
        share = in_flight // processes + (i < in_flight % processes)
        arguments = (url, workload, lengths[i::processes], share, seed + 1000 * (i + 1), barrier, results)
        clients.append(context.Process(target=_client, args=arguments, daemon=True))
        clients[-1].start()
    answered, missing = [], len(clients)
    while missing:
        try:
            answered += results.get(timeout=1)
            missing -= 1
        except queue.Empty:
            if failed := [client.exitcode for client in clients if client.exitcode]:
                raise RuntimeError(f"a client of {url} ended with {failed[0]}; its error is above") from None
    for client in clients:
        client.join()
    if bad := [one.status for one in answered if one.status != 200]:
        raise RuntimeError(f"{len(bad)} of {len(answered)} requests to {url} were not answered with 200: {sorted(set(bad))}")
    return answered
