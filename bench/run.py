"""Upstream's GLM-ASR and this one, one after the other on this machine, the same sizes and clips: `make bench`.

Prints a table and writes it, all figures and a plot to bench/results/ after every row. On a GPU the full model's sizes with
random weights; without one, two of its layers. Throughput and latency are of the busy server, without ramp-up and drain.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import load
import models
import report
from load import Workload
from question import chosen, parser
from report import Row
from servers import HAS_GPU, THIS, UPSTREAM, Candidate, GpuWatch, Server, about, counters, folders, grown, running
from tqdm import tqdm

CANDIDATES = [
    UPSTREAM,
    replace(UPSTREAM, name="upstream, 8 API processes", options=("--api-server-count", "8")),
    THIS,
    replace(THIS, name="this, layout B padded", layout="b"),
]
IN_FLIGHT = (1, 8, 64, 256, 512) if HAS_GPU else (1, 16)
USUAL = 256 if HAS_GPU else 16
WORKLOADS = {  # → in flight
    Workload("7 s"): (1,),
    Workload("utterances"): IN_FLIGHT,
    Workload("30 s"): IN_FLIGHT,
    Workload("mix"): (USUAL,),
    Workload("utterances", "transcriptions"): (USUAL,),
    Workload("utterances", "transcriptions", "flac"): (USUAL,),
    Workload("utterances", "transcriptions", "mp3"): (USUAL,),
}


def client_processes(gpus: int = 1) -> int:
    """So many that the clients are never what is slow, and leave the server its cores."""
    return min(4 * gpus, max(1, os.cpu_count() // 4))


def matmul_ceiling() -> float | None:
    """ceiling.py's FLOP/s, from a process of its own, because this one shall take none of the GPU's memory; None without one."""
    return float(subprocess.check_output([sys.executable, str(Path(__file__).with_name("ceiling.py"))])) if HAS_GPU else None


def warm_up(server: Server, in_flight: int) -> None:
    """Short clips and long ones, as many in flight as will be."""
    load.send(server.url, Workload("mix"), in_flight, in_flight, client_processes(), seed=999).check()


def measure(
    server: Server, candidate: Candidate, workload: Workload, in_flight: int, most_s: float, config: dict,
    ceiling: float | None, seed: int,
) -> Row:  # fmt: skip
    """Sends one run's clips and reads off its row."""
    before = counters(server.url)
    with GpuWatch() as watch:
        result = load.steady(server.url, workload, in_flight, client_processes(), seed, most_s)
    after = grown(server.url, before)
    p50, p95, p99 = result.percentiles(50, 95, 99)
    work = sum(models.flops(config, one.audio_s, one.tokens) for one in result.counted)
    return Row(
        candidate.name, candidate.released, workload.lengths, workload.route, workload.encoding, in_flight,
        real_time_factor=result.real_time_factor,
        requests_a_second=result.requests_a_second,
        requests=len(result.counted),
        p50=p50, p95=p95, p99=p99,
        first_token=after["time_to_first_token_seconds_sum"] / after["time_to_first_token_seconds_count"],
        answered_tokens=after["generation_tokens_total"] / sum(one.tokens for one in result.answered),
        gpu_busy=watch.busy(result.begin, result.end),
        ceiling_share=work / result.took / ceiling if ceiling else None,
        gpu_memory_gb=watch.memory_gb,
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    options = parser(__doc__, CANDIDATES)
    if not HAS_GPU:
        options.set_defaults(candidates=[candidate.name for candidate in CANDIDATES if "8" not in candidate.name])
    lengths = list(dict.fromkeys(workload.lengths for workload in WORKLOADS))
    options.add_argument("--lengths", nargs="+", choices=lengths, default=lengths)
    options.add_argument("--routes", nargs="+", choices=list(load.ROUTES), default=list(load.ROUTES))
    options.add_argument("--encodings", nargs="+", choices=list(load.MEDIA_TYPES), default=list(load.MEDIA_TYPES))
    options.add_argument("--in-flight", type=int, nargs="+", choices=IN_FLIGHT, default=IN_FLIGHT, help="of those that the table has")
    return options.parse_args()


def runs(args: argparse.Namespace) -> list[tuple[Workload, int]]:
    """What each candidate is sent: kinds of clips, and how many in flight."""
    kinds = {
        workload: in_flight for workload, in_flight in WORKLOADS.items()
        if workload.lengths in args.lengths and workload.route in args.routes and workload.encoding in args.encodings
    }  # fmt: skip
    return [(workload, number) for workload, in_flight in kinds.items() for number in in_flight if number in args.in_flight]


def main() -> int:
    args = arguments()
    planned = runs(args)
    candidates = chosen(CANDIDATES, args)
    ceiling = matmul_ceiling()
    found = about() | {"ceiling_flops": ceiling, "layers": args.layers, "seconds": args.seconds, "options": args.options}
    found["rows"] = []
    failed = 0
    with folders(args.layers) as folder, tqdm(total=len(candidates) * (1 + len(planned)), unit="run", dynamic_ncols=True) as bar:
        config = json.loads((folder / "a" / "config.json").read_text())
        for i, candidate in enumerate(candidates):
            bar.set_description(f"{candidate.name} starts")
            try:
                with running(candidate, folder, args.out) as server:
                    warm_up(server, max(number for _, number in planned))
                    bar.update()
                    for seed, (workload, in_flight) in enumerate(planned):
                        bar.set_description(f"{candidate.name}, {workload.lengths} {workload.encoding}, {in_flight} in flight")
                        try:
                            row = measure(server, candidate, workload, in_flight, args.seconds, config, ceiling, seed)
                        except (RuntimeError, OSError) as error:
                            failed += 1
                            bar.write(f"{bar.desc}{error}")
                        else:
                            found["rows"].append(asdict(row))
                            report.write(found, args.out)
                            bar.write(report.line(row, [Row(**one) for one in found["rows"]]))
                        bar.update()
            except RuntimeError as error:  # it did not start, or did not answer at all
                failed += 1
                bar.write(str(error))
            bar.update((i + 1) * (1 + len(planned)) - bar.n)
    if found["rows"]:
        print(report.write(found, args.out))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
