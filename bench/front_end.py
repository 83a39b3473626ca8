"""How many requests a second one API process could take if the engine took no time: its CPU time for each request.

Decoding, checking, tokenizing, serializing and answering are that process's alone, so one over its CPU time is the
most that a core gives. Upstream's server and this one, small models with random weights.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import load
import psutil
from load import Workload
from question import Answer, chosen, parser
from servers import THIS, UPSTREAM, folders, running

WORKLOADS = [
    Workload("7 s"), Workload("30 s"), Workload("7 s", "transcriptions"), Workload("7 s", "transcriptions", "flac"),
    Workload("7 s", "transcriptions", "mp3"), Workload("30 s", "transcriptions"),
]  # fmt: skip
LAYERS, WIDTH = 1, 256
ONE = ("--api-server-count", "1")  # then the server's first process is the API process
CANDIDATES = [replace(UPSTREAM, options=ONE), replace(THIS, options=ONE)]


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


def main() -> int:
    options = parser(__doc__, CANDIDATES, sized=False)
    options.add_argument("--requests", type=int, default=128, help="of each kind")
    options.add_argument("--in-flight", type=int, default=32, help="answers of one step are handled together")
    args = options.parse_args()
    answer = Answer("front_end", args)
    with folders(LAYERS) as folder:
        for layout in "ab":
            shrink(folder / layout)
        for candidate in chosen(CANDIDATES, args):
            with answer.attempt(), running(candidate, folder, args.out) as server:
                process = psutil.Process(server.process.pid)
                for seed, workload in enumerate(WORKLOADS):
                    load.send(server.url, workload, args.in_flight, args.in_flight, 1, seed=seed + 500).check()  # warms up
                    before = process.cpu_times()
                    load.send(server.url, workload, args.requests, args.in_flight, 1, seed=seed).check()
                    after = process.cpu_times()
                    took = (after.user + after.system - before.user - before.system) / args.requests
                    kind = f"{workload.lengths} {workload.encoding}, {workload.route}"
                    answer.add({"server": candidate.name, "request": kind, "CPU ms": 1000 * took, "requests/s a core": 1 / took})
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
