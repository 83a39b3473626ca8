"""Load on a running server: clips of speech that no cache has seen, so many requests in flight, for a bounded time.

The clients are processes of their own (`python bench/load.py` is one), which import neither torch nor vLLM. They make all
bodies before the clock starts.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
import numpy as np
import soundfile

WAVS = Path(__file__).resolve().parent.parent / "wavs"
RATE = 16000  # Hz
TOKENS_A_SECOND = 4  # of the answer
UTTERANCE_MEAN_S, UTTERANCE_SIGMA, SHORTEST_S, LONGEST_S = 7.0, 0.6, 0.5, 30.0
NOISE = 33  # of 32768: the level of what makes each clip new
MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}
ROUTES = {"chat": "/v1/chat/completions", "transcriptions": "/v1/audio/transcriptions"}
INSTRUCTION = "Please transcribe this audio."
BOUNDARY = "b7d3a1c94e6f4d0c8a52"  # of forms
TIMEOUT_S = 120  # of one request
# How long `steady` counts: so many answers to each request in flight, so many in all, and so many seconds.
ROUNDS, LEAST_ANSWERS, LEAST_S = 2, 20, 5.0
RAMP_S = 3.0  # in which the first requests are sent; clips of one length sent together would be answered in waves
# No server answers faster; more clips than that need not be made.
FASTEST_ANSWER_S, FASTEST_REAL_TIME_FACTOR = 0.04, 5000


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
    """One request: seconds of audio, seconds on the clock of when it was sent and answered, how; status 0: not at all."""

    audio_s: float
    sent: float
    done: float
    status: int
    retry_after: str | None

    @property
    def latency(self) -> float:
        return self.done - self.sent

    @property
    def tokens(self) -> int:
        """What was asked for, and given unless the model ended its text before."""
        return answer_tokens(self.audio_s)


@dataclass(frozen=True)
class Load:
    """What became of a run.

    Attributes:
        answered: all requests, in the order of their answers
        begin: when the ramp-up was over: as many had been answered as were in flight
        end: when the first client had no more to send; up to then as many as were wanted were in flight
    """

    answered: list[Answered]
    begin: float
    end: float

    @property
    def took(self) -> float:
        return self.end - self.begin

    @property
    def counted(self) -> list[Answered]:
        """The requests answered between `begin` and `end`: neither ramp-up nor drain is among them."""
        return [one for one in self.answered if self.begin < one.done <= self.end]

    @property
    def requests_a_second(self) -> float:
        return len(self.counted) / self.took

    @property
    def real_time_factor(self) -> float:
        """Seconds of audio answered in a second."""
        return sum(one.audio_s for one in self.counted) / self.took

    def percentiles(self, *percents: float) -> list[float]:
        """Of the counted latencies, in seconds."""
        return np.percentile([one.latency for one in self.counted], percents).tolist()

    def check(self) -> "Load":
        """Raises RuntimeError where an answer was not 200."""
        if bad := [one.status for one in self.answered if one.status != 200]:
            raise RuntimeError(f"{len(bad)} of {len(self.answered)} requests were not answered with 200: {sorted(set(bad))}")
        return self


@dataclass(frozen=True)
class Until:
    """When clients stop although clips are left: after `rounds` answers to each in flight and `least_s`, or after `most_s`.

    Before that, they send their first requests within `ramp_s`, evenly.
    """

    rounds: float = field(default=float("inf"))
    least_s: float = 0.0
    most_s: float = field(default=float("inf"))
    ramp_s: float = 0.0


def answer_tokens(length_s: float) -> int:
    return max(1, round(TOKENS_A_SECOND * length_s))


def seconds(workload: Workload, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) lengths of clips in seconds."""
    mu = np.log(UTTERANCE_MEAN_S) - UTTERANCE_SIGMA**2 / 2
    drawn = np.clip(rng.lognormal(mu, UTTERANCE_SIGMA, count), SHORTEST_S, LONGEST_S)
    if workload.lengths == "utterances":
        return drawn
    if workload.lengths == "mix":
        return np.where(np.arange(count) % 2, drawn, LONGEST_S)
    return np.full(count, float(workload.lengths.removesuffix(" s")))


def speech(lengths: list[float], rng: np.random.Generator) -> Callable[[int], np.ndarray]:
    """Gives clip i, (samples,) int16: the recordings from a random place on, plus faint noise from another."""
    longest = round(max(lengths) * RATE)
    recordings = np.concatenate([soundfile.read(path, dtype="int16")[0] for path in sorted(WAVS.glob("*.wav"))]) // 2
    again = np.tile(recordings, 1 + -(-longest // recordings.size))
    noise = (NOISE * rng.standard_normal(2**20 + longest)).astype(np.int16)
    places = rng.integers((recordings.size, 2**20), size=(len(lengths), 2))

    def clip(i: int) -> np.ndarray:
        (place, noise_place), count = places[i], round(lengths[i] * RATE)
        return again[place : place + count] + noise[noise_place : noise_place + count]

    return clip


def encoded(samples: np.ndarray, encoding: str) -> bytes:
    """The audio file of (samples,) int16."""
    buffer = io.BytesIO()
    if encoding == "wav":
        with wave.open(buffer, "wb") as file:
            file.setparams((1, 2, RATE, samples.size, "NONE", ""))
            file.writeframes(samples.tobytes())
    else:
        soundfile.write(buffer, samples, RATE, format=encoding.upper())
    return buffer.getvalue()


def body(workload: Workload, samples: np.ndarray) -> bytes:
    """A request's body."""
    audio, tokens = encoded(samples, workload.encoding), answer_tokens(samples.size / RATE)
    if workload.route == "chat":
        part = {"type": "input_audio", "input_audio": {"data": "AUDIO", "format": workload.encoding}}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": INSTRUCTION}]}]
        request = {"messages": messages, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
        before, after = json.dumps(request).encode().split(b"AUDIO")
        return before + base64.b64encode(audio) + after
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in (("temperature", 0), ("max_completion_tokens", tokens))]
    named = f'name="file"; filename="clip.{workload.encoding}"\r\nContent-Type: {MEDIA_TYPES[workload.encoding]}\r\n\r\n'
    parts.append(named.encode() + audio)
    begin = f"--{BOUNDARY}\r\nContent-Disposition: form-data; ".encode()
    return b"".join(begin + part + b"\r\n" for part in parts) + f"--{BOUNDARY}--\r\n".encode()


def content_type(workload: Workload) -> str:
    return "application/json" if workload.route == "chat" else f"multipart/form-data; boundary={BOUNDARY}"


def client() -> None:
    """One process: takes its work from standard input, makes its bodies, says so, waits for a line, sends, prints answers."""
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    work = json.loads(sys.stdin.readline())
    workload, lengths = Workload(**work["workload"]), work["lengths"]
    clip = speech(lengths, np.random.default_rng(work["seed"]))
    with ThreadPoolExecutor(work["threads"]) as pool:
        bodies = list(pool.map(lambda i: body(workload, clip(i)), range(len(lengths))))
    print("ready", flush=True)
    if sys.stdin.readline():
        clips = zip(lengths, bodies, strict=True)
        answered, end = asyncio.run(_send_all(work["url"], workload, clips, work["in_flight"], Until(**work["until"])))
        print(json.dumps({"answered": [asdict(one) for one in answered], "end": end}))


async def _send_all(url: str, workload: Workload, clips: Iterator, in_flight: int, until: Until) -> tuple[list[Answered], float]:
    answered, ends = [], []
    headers = {"Content-Type": content_type(workload)}
    began = ramped = time.monotonic()

    def is_enough() -> bool:
        now = time.monotonic()
        return now > began + until.most_s or (len(answered) >= (1 + until.rounds) * in_flight and now > ramped + until.least_s)

    async def keep_sending(session: aiohttp.ClientSession, i: int) -> None:
        nonlocal ramped
        await asyncio.sleep(until.ramp_s * i / in_flight)
        for length, data in clips:  # shared by all
            sent, status, retry_after = time.monotonic(), 0, None
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.post(url + ROUTES[workload.route], data=data, headers=headers) as response:
                    await response.read()
                    status, retry_after = response.status, response.headers.get("Retry-After")
            answered.append(Answered(length, sent, time.monotonic(), status, retry_after))
            if len(answered) == in_flight:
                ramped = time.monotonic()
            if is_enough():
                break
        ends.append(time.monotonic())

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(TIMEOUT_S)) as session:
        await asyncio.gather(*(keep_sending(session, i) for i in range(in_flight)))
    return answered, min(ends)


def send(url: str, workload: Workload, count: int, in_flight: int, processes: int, seed: int, until: Until | None = None) -> Load:
    """Sends `count` clips, or those before `until`, `in_flight` at a time, each as soon as another is answered.

    Ends once all sent are answered, `TIMEOUT_S` after the last was sent at most.

    Raises:
        RuntimeError: a client failed
    """
    processes = min(processes, in_flight)
    lengths = seconds(workload, count, np.random.default_rng(seed)).tolist()
    work = {"url": url, "workload": asdict(workload), "until": asdict(until or Until()),
            "threads": max(1, os.cpu_count() // processes)}  # fmt: skip
    with contextlib.ExitStack() as stack:
        clients = []
        for i in range(processes):
            share = in_flight // processes + (i < in_flight % processes)
            own = {"lengths": lengths[i::processes], "in_flight": share, "seed": [seed, i]}
            one = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(one.wait)
            stack.callback(one.kill)
            clients.append(one)
            one.stdin.write(json.dumps(work | own) + "\n")
            one.stdin.flush()
        for one in clients:
            _line(one)
        for one in clients:
            one.stdin.write("go\n")
            one.stdin.flush()
        sent = [json.loads(_line(one)) for one in clients]
    answered = sorted((Answered(**one) for own in sent for one in own["answered"]), key=lambda one: one.done)
    return Load(answered, begin=answered[in_flight - 1].done, end=min(own["end"] for own in sent))


def _line(one: subprocess.Popen) -> str:
    line = one.stdout.readline()
    if not line:
        raise RuntimeError(f"a client ended with {one.wait()}; its error is above")
    return line


def steady(url: str, workload: Workload, in_flight: int, processes: int, seed: int, most_s: float) -> Load:
    """Load for `most_s` at most, whose `counted` is what the server does when kept busy.

    After the ramp-up it goes on for `ROUNDS` answers to each request in flight, `LEAST_ANSWERS` and `LEAST_S`.

    Raises:
        RuntimeError: an answer was not 200, or there were not enough in this time
    """
    mean_s = seconds(workload, 1000, np.random.default_rng(0)).mean()
    rounds = max(ROUNDS, LEAST_ANSWERS / in_flight)
    fastest = min(in_flight / FASTEST_ANSWER_S, FASTEST_REAL_TIME_FACTOR / mean_s)  # requests a second
    count = round(in_flight * (2 + rounds) + LEAST_S * fastest)
    load = send(url, workload, count, in_flight, processes, seed, Until(rounds, LEAST_S, most_s, RAMP_S)).check()
    if not load.counted:
        raise RuntimeError(f"nothing to count: {len(load.answered)} requests answered in {most_s} s, with {in_flight} in flight")
    return load


if __name__ == "__main__":
    client()
