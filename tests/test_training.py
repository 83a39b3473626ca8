"""training/train.py, for a minute on the CPU: it takes in what is spoken meanwhile, learns, and leaves a checkpoint."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, ROOT
from transformers import AutoModelForCausalLM

SECONDS = 45  # on one core, so that the other can speak
OPTIONS = (
    f"--minutes {SECONDS / 60} --first-sentences 40 --sentences 60 --batch-items 6 --batch-seconds 30 "
    "--planners 1 --processes 1 --warm-up 5 --held-out 2 --device cpu"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a checkpoint trained from nothing, and what the training printed."""
    folder = tmp_path_factory.mktemp("training") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    command = [sys.executable, str(ROOT / "training" / "train.py"), "--out", str(folder), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.returncode}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder, done.stdout


def test_speech_is_taken_in_while_it_goes_on(trained):
    heard = [int(count) for count in re.findall(r"of (\d+) utterances", trained[1])]
    print(heard)
    assert len(heard) >= 2 and heard[-1] > heard[0]


def test_the_loss_falls(trained):
    losses = [float(loss) for loss in re.findall(r"  loss (\S+)", trained[1])]
    print(losses)
    assert losses[-1] < losses[0]


def test_the_checkpoint_loads_and_has_no_heads(trained):
    model, info = AutoModelForCausalLM.from_pretrained(
        trained[0], trust_remote_code=True, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_the_scores_are_printed(trained):
    assert "described rightly" in trained[1] and "sounds without speech" in trained[1]
