"""What does --quantization fp8 bring, and what does it cost? Throughput on clips of 30 s with the full model's sizes and
random weights; error rates of the bundled checkpoint on held-out clips. Where it does not start, what vLLM says.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import aiohttp
from load import Workload, steady
from question import Answer, parser
from run import client_processes, warm_up
from servers import BUNDLED, THIS, Candidate, Server, folders, log_file, running
from transcripts import held_out_clips, scores, transcripts

KINDS = {"bf16": ("--dtype", "bfloat16"), "fp8": ("--dtype", "bfloat16", "--quantization", "fp8")}


def first_error(log: Path) -> str:
    """What went wrong, by a server's log: the first error that it names, or its last line."""
    lines = log.read_text(errors="replace").splitlines()
    errors = (re.search(r"\w+(?:Error|Exception): .*", line) for line in lines if "WARNING" not in line)
    return next((error[0] for error in errors if error), lines[-1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options.add_argument("--models", nargs="+", choices=["full", "bundled"], default=["full", "bundled"])
    options.add_argument("--in-flight", type=int, default=256)
    options.add_argument("--clips", type=int, default=400, help="held out, for the error rates")
    args = options.parse_args()
    clips = held_out_clips(args.clips) if "bundled" in args.models else []
    answer = Answer("fp8", args)

    def full(server: Server) -> dict:
        warm_up(server, args.in_flight)
        load = steady(server.url, Workload("30 s"), args.in_flight, client_processes(), 0, args.seconds)
        return {"real time ×": load.real_time_factor, "requests/s": load.requests_a_second, "p50 s": load.percentiles(50)[0]}

    def bundled(server: Server) -> dict:
        return scores(clips, transcripts(server.url, [clip.waveform for clip in clips], args.in_flight))

    def measure(candidate: Candidate, what: Callable[[Server], dict]) -> dict:
        try:
            with running(candidate, folder, args.out) as server:
                return what(server)
        except (RuntimeError, aiohttp.ClientError):
            return {"note": first_error(log_file(candidate, args.out))}

    columns = ("model", "weights", "real time ×", "requests/s", "p50 s", "WER %", "CER %", "note")
    with folders(args.layers) as folder:
        for model, base, what in (("full", THIS, full), ("bundled", BUNDLED, bundled)):
            for kind in args.kinds if model in args.models else ():
                candidate = replace(base, name=f"{model} {kind}", options=(*KINDS[kind], *args.options))
                answer.add(dict.fromkeys(columns) | {"model": model, "weights": kind} | measure(candidate, what))


if __name__ == "__main__":
    main()
