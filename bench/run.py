"""Upstream's GLM-ASR and this one, one after the other on this machine, the same sizes and clips: `python bench/run.py`.

Prints a table and writes it with all figures to bench/results/. On a GPU the full model's sizes with random weights;
without one, two of its layers.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import load
import models
import numpy as np
import torch
from load import Workload
from tqdm import tqdm
from upstream import released_vllm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT / "server"))
from demo import is_healthy, stop  # noqa: E402

START_S = 900  # a server that is not healthy by then has failed
IN_FLIGHT = {"gpu": (1, 8, 64, 256, 512), "cpu": (1, 16)}
ROUNDS = {1: 20, 8: 10}  # clips to one in flight, else
USUAL_ROUNDS = 5
CPU_LAYERS = 2
WORKLOADS = [
    Workload("utterances"), Workload("30 s"), Workload("mix"), Workload("utterances", "transcriptions"),
    Workload("utterances", "transcriptions", "flac"), Workload("utterances", "transcriptions", "mp3"),
]  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A server to measure: its model's layout, its command's options, and whether vLLM is as released."""

    name: str
    layout: str
    released: bool = False
    options: tuple[str, ...] = ()


CANDIDATES = [
    Candidate("upstream", "b", released=True),
    Candidate("upstream, 8 API processes", "b", released=True, options=("--api-server-count", "8")),
    Candidate("this", "a"),
    Candidate("this, layout B padded", "b"),
]


@dataclass(frozen=True)
class Row:
    """One line of the table; latencies in seconds, shares from 0 to 1, None where there is no GPU."""

    candidate: str
    lengths: str
    route: str
    encoding: str
    in_flight: int
    real_time_factor: float
    requests_a_second: float
    p50: float
    p95: float
    p99: float
    first_token: float
    gpu_busy: float | None
    ceiling_share: float | None
    gpu_memory_gb: float | None


@contextlib.contextmanager
def running(candidate: Candidate, folder: Path, log: Path) -> Iterator[str]:
    """Starts the candidate's server, waits until it is healthy, yields its URL, stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = folder / candidate.layout
    options = ["--load-format", "dummy", *candidate.options]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    if candidate.released:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "released"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--max-model-len", "4096"]
        if not torch.cuda.is_available():
            command.append("--enforce-eager")
            environment["VLLM_CPU_KVCACHE_SPACE"] = "2"
    else:
        environment["MODEL"] = str(model)
        command = [sys.executable, str(ROOT / "server" / "serve.py")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        began = time.monotonic()
        while not is_healthy(port):
            if process.poll() is not None or time.monotonic() - began > START_S:
                raise RuntimeError(f"{candidate.name} did not start; see {log}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def counters(url: str) -> dict[str, float]:
    """The server's own sums, over all its API processes."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^(vllm:time_to_first_token_seconds_(?:sum|count))\{.*\} (\S+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


class GpuWatch(threading.Thread):
    """Notes how busy the GPU is, ten times a second, until `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.busy: list[float] = []
        self.memory_mb = 0.0
        self.process: subprocess.Popen | None = None

    def run(self) -> None:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            busy, memory = map(float, line.split(","))
            self.busy.append(busy / 100)
            self.memory_mb = max(self.memory_mb, memory)

    def stop(self) -> None:
        self.process.terminate()
        self.join()


def matmul_ceiling() -> float | None:
    """FLOP/s of an 8192³ product in bfloat16 on random data; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    rate = 10 * 2 * 8192**3 / (begin.elapsed_time(end) / 1000)
    del a, b
    torch.cuda.empty_cache()
    return rate


def measure(url: str, candidate: str, workload: Workload, in_flight: int, config: dict, ceiling: float | None, seed: int) -> Row:
    """Sends one run's clips and reads off its row."""
    processes = min(4, max(1, os.cpu_count() // 4))
    count = in_flight * ROUNDS.get(in_flight, USUAL_ROUNDS)
    watch = GpuWatch() if ceiling else None
    before = counters(url)
    if watch:
        watch.start()
    answered = load.send(url, workload, count, in_flight, processes, seed)
    if watch:
        watch.stop()
    after = counters(url)
    took = max(one.done for one in answered) - min(one.sent for one in answered)
    latencies = [one.done - one.sent for one in answered]
    tokens = {one.audio_s: max(1, round(load.TOKENS_A_SECOND * one.audio_s)) for one in answered}
    work = sum(models.flops(config, one.audio_s, tokens[one.audio_s]) for one in answered)
    first, firsts = (after[f"vllm:time_to_first_token_seconds_{part}"] - before.get(f"vllm:time_to_first_token_seconds_{part}", 0)
                     for part in ("sum", "count"))  # fmt: skip
    return Row(
        candidate, workload.lengths, workload.route, workload.encoding, in_flight,
        real_time_factor=sum(one.audio_s for one in answered) / took,
        requests_a_second=len(answered) / took,
        **dict(zip(("p50", "p95", "p99"), np.percentile(latencies, (50, 95, 99)).tolist(), strict=True)),
        first_token=first / max(firsts, 1),
        gpu_busy=float(np.mean(watch.busy)) if watch else None,
        ceiling_share=work / took / ceiling if ceiling else None,
        gpu_memory_gb=watch.memory_mb / 1000 if watch else None,
    )  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| server | clips | route | in flight | real time × | requests/s | p50 s | p95 s | p99 s | first token s | GPU busy | of ceiling |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    percent = lambda share: "" if share is None else f"{share:.0%}"  # noqa: E731
    for row in rows:
        lines.append(
            f"| {row.candidate} | {row.lengths} | {row.route} {row.encoding} | {row.in_flight} | {row.real_time_factor:.0f} "
            f"| {row.requests_a_second:.1f} | {row.p50:.3f} | {row.p95:.3f} | {row.p99:.3f} | {row.first_token:.3f} "
            f"| {percent(row.gpu_busy)} | {percent(row.ceiling_share)} |"
        )
    return "\n".join(lines)


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores, no GPU"


def main() -> None:
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--candidates", nargs="+", default=[c.name for c in CANDIDATES if kind == "gpu" or "8" not in c.name])
    parser.add_argument("--lengths", nargs="+", help="utterances, '30 s', '7 s', mix; default: all of the table's")
    parser.add_argument("--routes", nargs="+", help="of chat and transcriptions; default: both")
    parser.add_argument("--in-flight", type=int, nargs="+", default=IN_FLIGHT[kind])
    parser.add_argument("--layers", type=int, default=None if kind == "gpu" else CPU_LAYERS, help="of encoder and decoder")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="everything behind: for this project's server")
    args = parser.parse_args()

    workloads = [workload for workload in WORKLOADS if args.routes is None or workload.route in args.routes]
    if args.lengths:
        listed = {workload.lengths for workload in workloads}
        workloads = [workload for workload in workloads if workload.lengths in args.lengths]
        workloads += [Workload(lengths) for lengths in args.lengths if lengths not in listed]
    candidates = [candidate for candidate in CANDIDATES if candidate.name in args.candidates]
    candidates = [c if c.released else replace(c, options=(*c.options, *args.options)) for c in candidates]
    RESULTS.mkdir(exist_ok=True)
    ceiling, rows = matmul_ceiling(), []
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        models.layout_a(folder / "a", args.layers)
        models.layout_b(folder / "b", args.layers)
        released_vllm(folder / "released")
        config = json.loads((folder / "a" / "config.json").read_text())
        runs = [(workload, in_flight) for workload in workloads for in_flight in args.in_flight]
        bar = tqdm(total=len(candidates) * (len(runs) + 1), unit="run")
        for candidate in candidates:
            bar.set_description(f"{candidate.name} starts")
            with running(candidate, folder, RESULTS / f"{candidate.name.replace(' ', '_')}.log") as url:
                bar.update()
                load.send(url, Workload("utterances"), 2 * max(args.in_flight), max(args.in_flight), 2, seed=999)  # warms up
                for seed, (workload, in_flight) in enumerate(runs):
                    bar.set_description(f"{candidate.name}, {workload.lengths}, {in_flight} in flight")
                    rows.append(measure(url, candidate.name, workload, in_flight, config, ceiling, seed))
                    bar.update()
                    bar.write(table(rows[-1:]).splitlines()[-1])
                    found = {"hardware": hardware(), "date": time.strftime("%Y-%m-%d"), "ceiling_flops": ceiling,
                             "layers": args.layers, "rows": [asdict(row) for row in rows]}  # fmt: skip
                    (RESULTS / "results.json").write_text(json.dumps(found, indent=1))
        bar.close()
    print(f"{hardware()}, {time.strftime('%Y-%m-%d')}\n\n{table(rows)}")
    (RESULTS / "table.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
