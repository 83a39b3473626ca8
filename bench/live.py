"""How many live streams at a time does the server keep up with? Each is paced in real time: utterances with pauses between.

A word's latency is taken by its audio, so that random weights do: from its arrival to the moment when two answers in a row,
or the final, have heard it, which is when a text that agrees is shown (the server's glmasr_live_word_seconds). A final's is
from speech_stopped, which comes once the configured silence is over, to completed, as the client sees both; speech_started
is from the first loud sample sent. The ramp ends with the first number of streams that misses a target.
"""

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import time
from itertools import pairwise

import aiohttp
import load
import numpy as np
import psutil
from question import Answer, chosen, parser
from run import client_processes
from servers import BUNDLED, NO_PROXY, THIS, GpuWatch, Server, folders, running

CANDIDATES = [THIS, BUNDLED]
PIECE_S = 0.1  # of audio in a message
PAUSE_S = (0.8, 2.5)
WARM_UP_S = 10  # not counted
WORD_P95_S, FINAL_P95_S = 1.5, 0.7
LOUD = 650  # of 32768
SETTINGS = {"type": "session.update", "session": {"type": "transcription", "audio": {"input": {"format": {"type": "audio/pcm", "rate": load.RATE}}}}}


def utterances(seconds: float, rng: np.random.Generator) -> tuple[np.ndarray, list[float]]:
    """(samples,) int16 for so many seconds, and when each utterance in it begins to be loud."""
    lengths = load.seconds(load.Workload("utterances"), 1 + int(seconds / 4), rng).tolist()
    clip, parts, onsets, place = load.speech(lengths, rng), [], [], 0
    for i in range(len(lengths)):
        pause = (load.NOISE * rng.standard_normal(int(rng.uniform(*PAUSE_S) * load.RATE))).astype(np.int16)
        spoken = clip(i)
        onsets.append((place + pause.size + int(np.argmax(np.abs(spoken) > LOUD))) / load.RATE)
        parts += [pause, spoken]
        place += pause.size + spoken.size
        if place > seconds * load.RATE:
            break
    return np.concatenate(parts)[: int(seconds * load.RATE)], onsets


async def stream(session: aiohttp.ClientSession, url: str, seconds: float, seed: list[int], found: dict[str, list]) -> None:
    """One live stream; adds what it measures to `found`."""
    rng = np.random.default_rng(seed)
    samples, onsets = utterances(seconds, rng)
    size = int(PIECE_S * load.RATE)
    messages = [json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(samples[at : at + size].tobytes()).decode()})
                for at in range(0, samples.size, size)]  # fmt: skip
    await asyncio.sleep(rng.uniform(0, 3))  # not all at once
    async with session.ws_connect(f"{url}/v1/realtime", compress=0) as socket:
        await socket.send_json(SETTINGS)
        began, stopped = time.monotonic(), {}

        async def listen() -> None:
            async for message in socket:
                event, now = json.loads(message.data), time.monotonic()
                kind = event["type"].rpartition(".")[2]
                if kind == "speech_started":
                    heard = [onset for onset in onsets if abs(event["audio_start_ms"] / 1000 - onset) < 0.5]
                    if heard and now - began > WARM_UP_S:
                        found["started"].append(now - began - heard[0])
                elif kind == "speech_stopped":
                    stopped[event["item_id"]] = now
                elif kind == "completed" and now - began > WARM_UP_S:
                    found["finals"].append(now - stopped[event["item_id"]])
                elif kind in ("failed", "error"):
                    found["errors"].append(event["error"]["message"])

        listener = asyncio.create_task(listen())
        for i, message in enumerate(messages):
            await asyncio.sleep(max(0.0, began + (i + 1) * PIECE_S - time.monotonic()))
            await socket.send_str(message)
        await asyncio.sleep(2)
        listener.cancel()


async def streams(work: dict) -> dict[str, list]:
    found: dict[str, list] = {"started": [], "finals": [], "errors": []}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        ended = await asyncio.gather(
            *(stream(session, work["url"], work["seconds"], [work["seed"], i], found) for i in range(work["count"])), return_exceptions=True
        )
    found["errors"] += [f"{type(one).__name__}: {one}" for one in ended if isinstance(one, Exception)]
    return found


def run(url: str, count: int, seconds: float, processes: int) -> dict[str, list]:
    """`count` streams from several client processes; what they measured, together."""
    shares = [count // processes + (i < count % processes) for i in range(min(processes, count))]
    clients = []
    for i, share in enumerate(shares):
        one = subprocess.Popen([sys.executable, __file__, "--client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        one.stdin.write(json.dumps({"url": url, "count": share, "seconds": seconds, "seed": 1000 * count + i}) + "\n")
        one.stdin.flush()
        clients.append(one)
    found = [json.loads(one.communicate()[0]) for one in clients]
    return {name: [value for own in found for value in own[name]] for name in found[0]}


def words(url: str) -> dict[float, float]:
    """The server's count of words by the upper bound of their latency, over all its processes."""
    with NO_PROXY.open(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    counts: dict[float, float] = {}
    for bound, value in re.findall(r'^glmasr_live_word_seconds_bucket\{[^}]*le="([^"]+)"[^}]*\} (\S+)$', text, re.MULTILINE):
        counts[float(bound)] = counts.get(float(bound), 0.0) + float(value)
    return counts


def percentile(before: dict[float, float], after: dict[float, float], share: float) -> float | None:
    """Of what came between two looks, to a line within a bucket."""
    grown = [(0.0, 0.0), *((bound, after[bound] - before.get(bound, 0.0)) for bound in sorted(after))]
    wanted = share * grown[-1][1]
    for (low, below), (high, upto) in pairwise(grown):
        if upto >= wanted > below:
            return low + (high - low) * (wanted - below) / (upto - below)
    return None


def cpu_seconds(server: Server) -> dict[str, float]:
    """Of the server's processes, by kind."""
    spent = {"engine": 0.0, "API": 0.0}
    first = psutil.Process(server.process.pid)
    for process in (first, *first.children(recursive=True)):
        try:
            times, name = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        spent["engine" if "EngineCore" in name or "Worker" in name else "API"] += times.user + times.system
    return spent


def measure(server: Server, watch: GpuWatch, count: int, seconds: float) -> dict:
    """One row."""
    before, spent, began = words(server.url), cpu_seconds(server), time.monotonic()
    found = run(server.url, count, seconds + WARM_UP_S, client_processes())
    after, took = words(server.url), time.monotonic() - began
    cores = {name: (value - spent[name]) / took for name, value in cpu_seconds(server).items()}

    def of(name: str, percent: float) -> float | None:
        return float(np.percentile(found[name], percent)) if found[name] else None

    return {
        "streams": count, "speech_started median s": of("started", 50), "word median s": percentile(before, after, 0.5),
        "word p95 s": percentile(before, after, 0.95), "final median s": of("finals", 50), "final p95 s": of("finals", 95),
        "finals": len(found["finals"]), "errors": len(found["errors"]), "first error": next(iter(found["errors"]), "")[:60],
        "API cores": cores["API"], "engine cores": cores["engine"], "GPU busy": watch.busy(began, began + took),
    }  # fmt: skip


def main() -> int:
    if sys.argv[1:] == ["--client"]:
        print(json.dumps(asyncio.run(streams(json.loads(sys.stdin.readline())))))
        return 0
    options = parser(__doc__, CANDIDATES)
    options.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 100, 200, 400, 700, 1000, 1400])
    args = options.parse_args()
    answer = Answer("live", args)
    os.environ |= {"MAX_SESSIONS": "4096", "MAX_PARTIALS": "2048"}
    with folders(args.layers) as folder:
        for candidate in chosen(CANDIDATES, args):
            with answer.attempt(), running(candidate, folder, args.out) as server, GpuWatch() as watch:
                for count in args.streams:
                    row = measure(server, watch, count, args.seconds)
                    answer.add({"server": candidate.name, **row})
                    if (row["word p95 s"] or 0) > WORD_P95_S or (row["final p95 s"] or 0) > FINAL_P95_S:
                        break
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
