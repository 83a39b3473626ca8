"""How long does the encoder take, alone? With CUDA graphs and without, against the card's matrix products alone.

A GPU is needed. The full model's sizes with random weights, bfloat16, clips of noise; spectrogram and adapter included.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import torch

SECONDS, CLIPS = (7.0, 30.0), (1, 4, 16, 64)
REPEATS = 10


def milliseconds(work: Callable[[], object]) -> tuple[float, float]:
    """Of one call after three: on the GPU, and of the host until it has handed everything over."""
    for _ in range(3):
        work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    handed_over = time.perf_counter() - began
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / REPEATS, 1000 * handed_over / REPEATS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true", help="list where the GPU's time goes, for 16 clips of 7 s")
    parser.add_argument("--layers", type=int, help="of encoder and decoder")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the model is at hand
    from run import matmul_ceiling
    from serve import GPU_FLAGS
    from servers import hardware
    from vllm import LLM

    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = models.layout_a(Path(temporary) / "a", args.layers)
        config = json.loads((folder / "config.json").read_text())
        graphs = {name: value for name, value in json.loads(GPU_FLAGS[1]).items() if "encoder" in name}
        engine = LLM(
            str(folder), load_format="dummy", max_model_len=4096, gpu_memory_utilization=0.2, mm_processor_cache_gb=0,
            compilation_config=graphs | {"cudagraph_mode": "NONE", "mode": 0},
        )  # fmt: skip
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    ceiling, rng = matmul_ceiling(), np.random.default_rng(0)
    print(f"{hardware()}, {time.strftime('%Y-%m-%d')}; ceiling {ceiling / 1e12:.0f} TFLOP/s\n")
    print("| clips | floor, ms a clip | graphs | of ceiling | no graphs | host, graphs | host, no graphs |\n" + "|---" * 7 + "|")
    with torch.inference_mode():
        for seconds in SECONDS:
            for count in CLIPS:
                waveforms = [torch.from_numpy(0.1 * rng.standard_normal(int(16000 * seconds), np.float32)) for _ in range(count)]
                inputs = {"waveform": waveforms, "window_starts": [torch.tensor([0])] * count}
                manager = runner.model_state.encoder_runner.cudagraph_manager
                with_graphs, host = milliseconds(lambda inputs=inputs: manager.execute(inputs))
                without, host_without = milliseconds(lambda inputs=inputs: runner.model.embed_multimodal(**inputs))
                floor = 1000 * models.encoder_flops(config, seconds) / ceiling
                print(f"| {count} of {seconds:.0f} s | {floor:.2f} | {with_graphs / count:.2f} | {floor * count / with_graphs:.0%} "
                      f"| {without / count:.2f} | {host / count:.2f} | {host_without / count:.2f} |", flush=True)  # fmt: skip
                if args.kernels and (seconds, count) == (7.0, 16):
                    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                        manager.execute(inputs)
                        torch.cuda.synchronize()
                    listed = profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60)
                    print("\n".join(line[:62] + line[-70:] for line in listed.splitlines()))


if __name__ == "__main__":
    main()
