"""server/glm_asr.py and server/glmasr_audio.py in vLLM's offline engine, float32, against each layout's reference.

Each engine runs in its own process: `python tests/test_encoder.py JOB_FOLDER` answers what `run_engine` asks.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoint"
SAMPLING_RATE = 16000
SECONDS = (1, 7, 29.99, 30)
NEW_TOKENS = 16
MAX_LOGIT_DIFFERENCE = 1e-3
MAX_PACKING_DIFFERENCE = 1e-4
ENGINE_S = 200  # an engine that has not answered by then has failed
PROMPTS = {
    "A": "<|user|>\n<|begin_of_audio|><|audio|><|end_of_audio|>\nPlease transcribe this audio.<|assistant|>\n",
    "B": "<|user|>\n<|begin_of_audio|><|pad|><|end_of_audio|><|user|>\nPlease transcribe this audio into text<|assistant|>\n",
}


# --- the engine's process ---------------------------------------------------------------------------


def answer(job: Path) -> None:
    """Runs one engine over a job's clips and leaves what it gave in the job's folder."""
    from vllm import LLM, SamplingParams

    wanted = json.loads((job / "job.json").read_text())
    clips = list(np.load(job / "clips.npz").values())
    engine = LLM(
        seed=0, dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8, max_logprobs=-1,
        logprobs_mode="raw_logits", limit_mm_per_prompt={"audio": 2}, **wanted["options"],
    )  # fmt: skip
    requests = [{"prompt": wanted["prompt"], "multi_modal_data": {"audio": [clip]}} for clip in clips]
    greedy = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "detokenize": False}

    together = engine.generate(requests, SamplingParams(**greedy), use_tqdm=False)
    engine.reset_prefix_cache()
    engine.llm_engine.engine_core.reset_encoder_cache()
    every_logit = SamplingParams(**greedy, logprobs=-1, prompt_logprobs=-1, flat_logprobs=True)
    answers = {}
    alone = [
        engine.generate([request], every_logit if wanted["logits"] else SamplingParams(**greedy), use_tqdm=False)[0]
        for request in requests
    ]
    for i, output in enumerate(alone):
        answers[f"prompt_{i}"] = np.array(output.prompt_token_ids)
        answers[f"tokens_{i}"] = np.array(output.outputs[0].token_ids)
        answers[f"together_{i}"] = np.array(together[i].outputs[0].token_ids)
        if wanted["logits"]:
            answers[f"logits_{i}"] = np.concatenate([table(output.prompt_logprobs), table(output.outputs[0].logprobs)])
    if wanted["logits"]:
        answers["packing"] = np.array(engine.apply_model(Packing(clips)))
    np.savez(job / "answers.npz", **answers)


def table(scores) -> np.ndarray:
    """vLLM's flat scores of every token at every position to (positions, vocabulary)."""
    sizes = np.array(scores.end_indices) - np.array(scores.start_indices)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    filled = np.full((len(sizes), max(scores.token_ids) + 1), np.nan, np.float32)
    filled[rows, scores.token_ids] = scores.logprobs
    return filled[sizes > 0]  # nothing precedes a prompt's first token


@dataclass
class Packing:
    """Largest difference between the embeddings of clips encoded in one pass and one by one."""

    clips: list[np.ndarray]

    def __call__(self, model: nn.Module) -> float:
        together = self.embed(model, self.clips)
        alone = [self.embed(model, [clip])[0] for clip in self.clips]
        return max(float((a - b).abs().max()) for a, b in zip(together, alone, strict=True))

    def embed(self, model: nn.Module, clips: list[np.ndarray]) -> list[Tensor]:
        with torch.no_grad():
            return list(
                model.embed_multimodal(
                    waveform=[torch.from_numpy(clip) for clip in clips],
                    window_starts=[torch.tensor([0]) for _ in clips],
                )
            )


if __name__ == "__main__":
    answer(Path(sys.argv[1]))
