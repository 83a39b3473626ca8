"""What do two GPUs bring: the model on each (data parallel), or half of it on each (tensor parallel)?

Throughput beside one GPU's, with as many requests in flight and API processes for each GPU. And whether the halves give the
right text: the bundled checkpoint's, spread over two GPUs, of wavs/.
"""

import json
import os
import sys
from dataclasses import replace

import torch
from load import Workload, steady
from models import BUNDLED as CHECKPOINT
from question import Answer, parser
from run import client_processes, warm_up
from servers import BUNDLED, THIS, folders, running
from transcripts import samples, transcripts

SPREADS = {  # → GPUs, options
    "one GPU": (1, ()),
    "data parallel 2": (2, ("--data-parallel-size", "2")),
    "tensor parallel 2": (2, ("--tensor-parallel-size", "2")),
}
HEADS = {"whisper_config": ("encoder_attention_heads",), "lm_config": ("num_attention_heads", "num_key_value_heads")}
WORKLOADS = (Workload("utterances"), Workload("30 s"))


def check_heads() -> None:
    """Ends with a message where the bundled checkpoint's attention heads cannot be halved."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    if odd := [name for part, names in HEADS.items() for name in names if config[part][name] % 2]:
        sys.exit(f"parallel: the bundled checkpoint's {odd} cannot be halved")


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--spreads", nargs="+", choices=list(SPREADS), default=list(SPREADS), help="one GPU first")
    options.add_argument("--in-flight", type=int, default=256, help="for each GPU")
    options.add_argument("--api-processes", type=int, default=max(1, os.cpu_count() // 4), help="for each GPU")
    options.add_argument("--dtype", default="float32", help="for the texts, where they shall be exact")
    args = options.parse_args()
    if torch.cuda.device_count() < 2:
        sys.exit(f"parallel: 2 GPUs are needed, and this machine has {torch.cuda.device_count()}")
    check_heads()
    halves = replace(BUNDLED, name="bundled, tensor parallel 2",
                     options=("--tensor-parallel-size", "2", "--dtype", args.dtype, *args.options))  # fmt: skip
    waveforms, expected = samples()
    with folders(args.layers) as folder:
        with running(halves, folder, args.out) as server:
            texts = transcripts(server.url, waveforms, len(waveforms))
        wrong = [pair for pair in zip(expected, texts, strict=True) if pair[0] != pair[1]]
        print(f"tensor parallel 2: {len(texts) - len(wrong)} of {len(texts)} texts are right; wrong: {wrong}\n")
        answer, alone = Answer("parallel", args), {}
        answer.found["wrong_texts"] = wrong
        for spread in args.spreads:
            gpus, spreading = SPREADS[spread]
            processes = ("--api-server-count", str(gpus * args.api_processes))
            candidate = replace(THIS, name=spread, options=(*spreading, *processes, *args.options))
            with answer.attempt(), running(candidate, folder, args.out) as server:
                warm_up(server, gpus * args.in_flight)
                for seed, workload in enumerate(WORKLOADS):
                    load = steady(server.url, workload, gpus * args.in_flight, client_processes(gpus), seed, args.seconds)
                    factor, (p50, p99) = load.real_time_factor, load.percentiles(50, 99)
                    alone.setdefault(workload, factor if gpus == 1 else None)
                    answer.add({
                        "server": spread, "clips": workload.lengths, "in flight": gpus * args.in_flight,
                        "real time ×": factor, "over one GPU": alone[workload] and factor / alone[workload],
                        "requests/s": load.requests_a_second, "p50 s": p50, "p99 s": p99,
                    })  # fmt: skip
    return int(bool(wrong) or answer.failed)


if __name__ == "__main__":
    sys.exit(main())
