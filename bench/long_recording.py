"""Does a long recording come out whole? The bundled checkpoint in float32; --hours 3 is what it is held to.

A recording of held-out sentences with pauses, noise and music between them is sent streamed, as verbose_json, and sentence
by sentence. Counted in percent: errors against what was said, and segment times within 0.3 s. Memory is the API process's.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import recordings
from memory import Peak
from question import Answer, parser
from recordings import Sentence
from servers import BUNDLED, Server, running
from transcripts import wav_bytes

ROUTE = "/v1/audio/transcriptions"
TIMEOUT_S = 3600
ALONE_IN_FLIGHT = 16
WARM_UP = 8  # sentences


def post(server: Server, file: Path, **fields: str) -> httpx.Response:
    with file.open("rb") as opened:
        response = httpx.post(server.url + ROUTE, files={"file": (file.name, opened)}, data=fields, timeout=TIMEOUT_S, trust_env=False)
    response.raise_for_status()
    return response


def streamed(server: Server, file: Path) -> dict:
    """The transcript, seconds until the first delta and until the end, and the share of the deltas that came last."""
    began, first_s = time.monotonic(), None
    with file.open("rb") as opened, httpx.stream(
        "POST", server.url + ROUTE, files={"file": (file.name, opened)}, data={"stream": "true"}, timeout=TIMEOUT_S, trust_env=False
    ) as response:  # fmt: skip
        response.raise_for_status()
        for line in filter(None, response.iter_lines()):
            event = json.loads(line.removeprefix("data: "))
            first_s = first_s or time.monotonic() - began
    if event["type"] != "transcript.text.done":
        raise RuntimeError(f"the stream ended with {event}")
    return {"text": event["text"], "first delta s": first_s, "took s": time.monotonic() - began}


def one_by_one(server: Server, file: Path, sentences: list[Sentence]) -> list[str]:
    """Each sentence's text when it is sent alone."""

    def ask(sentence: Sentence) -> str:
        data = {"file": ("sentence.wav", wav_bytes(recordings.clip(file, sentence)))}
        response = httpx.post(server.url + ROUTE, files=data, timeout=TIMEOUT_S, trust_env=False)
        response.raise_for_status()
        return response.json()["text"]

    with ThreadPoolExecutor(ALONE_IN_FLIGHT) as pool:
        return list(pool.map(ask, sentences))


def measure(server: Server, file: Path, sentences: list[Sentence], seconds: float, answer: Answer) -> None:
    """Adds a row for each way."""
    peak = Peak(server.process.pid)
    stream = streamed(server, file)
    scored = recordings.score(sentences, stream.pop("text"))
    answer.add(
        row("streamed", seconds, sentences, scored) | {"MB above idle": peak.rise / 1e6} | stream,
        missing_texts=scored.missing, twice_texts=scored.twice, wrong=scored.wrong,
    )  # fmt: skip
    began = time.monotonic()
    found = post(server, file, response_format="verbose_json").json()
    took_s, rise = time.monotonic() - began, peak.rise
    times = [(segment["start"], segment["end"]) for segment in found["segments"]]
    errors = recordings.time_errors(sentences, times)
    scored = recordings.score(sentences, found["text"])
    answer.add(
        row("verbose_json", seconds, sentences, scored)
        | {"MB above idle": rise / 1e6, "took s": took_s, "segments": len(times),
           "times near %": 100 * (errors <= recordings.NEAR_S).mean(), "worst s": float(errors.max())},
        missing_texts=scored.missing, twice_texts=scored.twice, wrong=scored.wrong, warnings=found["warnings"],
        far=[(*times[i], *errors[i]) for i in np.flatnonzero((errors > recordings.NEAR_S).any(axis=1))],
    )  # fmt: skip
    alone = one_by_one(server, file, sentences)
    scored = recordings.score(sentences, " ".join(alone))
    answer.add(row("one by one", seconds, sentences, scored), wrong=scored.wrong)


HEADINGS = ("sent", "hours", "sentences", "WER %", "missing", "twice", "MB above idle", "first delta s", "took s", "segments",
            "times near %", "worst s")  # fmt: skip


def row(sent: str, seconds: float, sentences: list[Sentence], scored: recordings.Score) -> dict:
    known = {"sent": sent, "hours": seconds / 3600, "sentences": len(sentences), "WER %": scored.wer,
             "missing": len(scored.missing), "twice": len(scored.twice)}  # fmt: skip
    return dict.fromkeys(HEADINGS) | known


def options() -> argparse.ArgumentParser:
    made = parser(__doc__, sized=False)
    made.add_argument("--hours", type=float, default=3)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--kind", default="wav", choices=("wav", "flac", "ogg", "mp3"), help="of file")
    return made


def main() -> int:
    args = options().parse_args()
    answer, file = Answer("long_recording", args), args.out / f"recording.{args.kind}"
    began = time.monotonic()
    sentences = recordings.write(file, args.hours * 3600, args.seed)
    print(f"{len(sentences)} sentences spoken in {time.monotonic() - began:.0f} s\n", flush=True)
    candidate = replace(BUNDLED, options=("--dtype", "float32", *args.options))
    with answer.attempt(), running(candidate, args.out, args.out) as server:
        one_by_one(server, file, sentences[:WARM_UP])
        measure(server, file, sentences, args.hours * 3600, answer)
    file.unlink()
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
