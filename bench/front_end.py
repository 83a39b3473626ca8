"""How many requests a second one API process could take if the engine took no time: its CPU time for each request.

Decoding, checking, tokenizing, serializing and answering are that process's alone, so one over its CPU time is the
most that a core gives. Upstream's server and this one, small models with random weights.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import load
import models
import psutil
from load import Workload
from run import CANDIDATES, RESULTS, hardware, running
from upstream import released_vllm

WORKLOADS = [
    Workload("7 s"), Workload("30 s"), Workload("7 s", "transcriptions"), Workload("7 s", "transcriptions", "flac"),
    Workload("7 s", "transcriptions", "mp3"), Workload("30 s", "transcriptions"),
]  # fmt: skip
LAYERS, WIDTH = 1, 256


def api_process(url: str) -> psutil.Process:
    """The process that listens where the server does."""
    port = int(url.rpartition(":")[2])
    return next(psutil.Process(found.pid) for found in psutil.net_connections("tcp")
                if found.status == psutil.CONN_LISTEN and found.laddr.port == port and found.pid)  # fmt: skip


def shrink(folder: Path) -> None:
    """Makes the decoder and the encoder of a configuration small, so that the engine is soon done."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, sizes in {
        "whisper_config": {"d_model": WIDTH, "encoder_ffn_dim": WIDTH * 4, "encoder_attention_heads": 4},
        "audio_config": {"hidden_size": WIDTH, "intermediate_size": WIDTH * 4, "num_attention_heads": 4,
                         "num_key_value_heads": 4, "head_dim": WIDTH // 4},
        "lm_config": {"hidden_size": WIDTH, "intermediate_size": WIDTH * 3, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "head_dim": WIDTH // 4},
        "text_config": {"hidden_size": WIDTH, "intermediate_size": WIDTH * 3, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "head_dim": WIDTH // 4},
    }.items():  # fmt: skip
        if name in config:
            config[name] |= sizes
    path.write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=128, help="of each kind")
    parser.add_argument("--in-flight", type=int, default=32, help="answers of one step are handled together")
    parser.add_argument("--candidates", nargs="+", default=["upstream", "this"])
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    print(f"{hardware()}, {time.strftime('%Y-%m-%d')}\n\n| server | request | CPU ms | requests/s of one core |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        for layout in "ab":
            getattr(models, f"layout_{layout}")(folder / layout, LAYERS)
            shrink(folder / layout)
        released_vllm(folder / "released")
        for candidate in [candidate for candidate in CANDIDATES if candidate.name in args.candidates]:
            with running(candidate, folder, RESULTS / "front_end.log") as url:
                process = api_process(url)
                for seed, workload in enumerate(WORKLOADS):
                    load.send(url, workload, args.in_flight, args.in_flight, 1, seed=seed + 500)  # warms up
                    before = process.cpu_times()
                    load.send(url, workload, args.requests, args.in_flight, 1, seed=seed)
                    after = process.cpu_times()
                    took = (after.user + after.system - before.user - before.system) / args.requests
                    kind = f"{workload.lengths} {workload.encoding}, {workload.route}"
                    print(f"| {candidate.name} | {kind} | {1000 * took:.1f} | {1 / took:.0f} |", flush=True)


if __name__ == "__main__":
    main()
