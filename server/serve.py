"""Starts vLLM's OpenAI-compatible server on GLM-ASR, with defaults that just work.

    python server/serve.py [any option of `vllm serve`]

Settings come from the environment (see SETTINGS) or suit the machine, an option on the command line wins. MODEL is a
folder; without it the weights in model/ are served, or the bundled checkpoint where there are none.
"""

import importlib.metadata
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import registry
from glmasr_limits import COUNTS, LIVE_LIMITS

ROOT = Path(__file__).resolve().parent.parent
FULL_MODEL, BUNDLED = ROOT / "model", ROOT / "checkpoint"

# Environment variable → option of `vllm serve`, default; empty where `machine_defaults` gives it.
SETTINGS = {
    "HOST": ("--host", "0.0.0.0"),
    "PORT": ("--port", "8300"),
    "SERVED_MODEL_NAME": ("--served-model-name", "glm-asr-eligant"),
    "DTYPE": ("--dtype", "auto"),
    "TENSOR_PARALLEL_SIZE": ("--tensor-parallel-size", "1"),
    "MAX_MODEL_LEN": ("--max-model-len", "4096"),
    "GPU_MEMORY_UTILIZATION": ("--gpu-memory-utilization", ""),
    "API_SERVER_COUNT": ("--api-server-count", ""),
    "API_KEY": ("--api-key", "EMPTY"),
}
OPEN_KEY = "EMPTY"  # this key means that none is asked for
# No cache of decoded audio: fresh audio never hits it, and after a client has left in the midst of a stream vLLM 0.32
# takes windows for cached that the engine never got, and answers the next request for them without text.
# Nor of prompts: they begin with the audio, of which every sample would have to be hashed.
ADMISSION = ["--middleware", "vllm.entrypoints.serve.middleware.glmasr_admission.Admission"]
SUBPROTOCOL = ["--middleware", "vllm.model_executor.models.glmasr_live.KeyInSubprotocol"]
FLAGS = ["--mm-processor-cache-gb", "0", "--no-enable-prefix-caching", *ADMISSION, *SUBPROTOCOL]
# Environment variable → default: requests at once, of all API processes together (7 s of audio take 1 MB there, 30 s
# take 4 MB), and the size and length of one file to transcribe.
LIMITS = {"MAX_IN_FLIGHT": "1024", "MAX_UPLOAD_MB": "1024", "MAX_AUDIO_HOURS": "12", **LIVE_LIMITS}
# The routes and the page, and the group that they are in.
PLUGINS, ENDPOINTS = ("glmasr", "glmasr_live", "glmasr_page"), "vllm.endpoint_plugins"
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2"}  # GiB
# Compiling takes longer than it saves. Hotwords have been tried on the CPU alone so far.
CPU_FLAGS = ["--enforce-eager", "--logits-processors", "vllm.model_executor.models.glmasr_hotwords:HotwordBias"]
# The encoder's CUDA graphs, by audio tokens (12.5 to a second), eight to each doubling; larger batches are divided.
GRAPH_SIZES = [2**octave * eighth // 8 for octave in range(5, 11) for eighth in range(8, 16)] + [2048]
GPU_FLAGS = [
    "--compilation-config",
    json.dumps(
        {
            "cudagraph_mm_encoder": True,
            "encoder_cudagraph_token_budgets": GRAPH_SIZES,
            "encoder_cudagraph_max_vision_items_per_batch": GRAPH_SIZES[0],
        }
    ),
]
GPU_MEMORY = 28e9  # bytes: weights, graphs and a cache for 512 clips of 30 s at once
MOST_GPU_MEMORY = 0.9  # of a smaller card
CORES_PER_API_SERVER, MOST_API_SERVERS = 2, 8
ONE_PROCESS = ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]  # starts sooner


def gpu_memory() -> float | None:
    """Bytes of the smallest GPU's memory; None where no NVIDIA GPU answers."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return min((float(mib) * 2**20 for mib in listed.stdout.split()), default=None)


def machine_defaults(gpu_bytes: float | None, cores: int) -> dict[str, str]:
    """What suits a machine with so much GPU memory (None: no GPU) and so many cores."""
    if gpu_bytes is None:
        return {"GPU_MEMORY_UTILIZATION": "0.1", "API_SERVER_COUNT": "1"}
    return {
        "GPU_MEMORY_UTILIZATION": f"{min(MOST_GPU_MEMORY, GPU_MEMORY / gpu_bytes):.2f}",
        "API_SERVER_COUNT": str(min(MOST_API_SERVERS, max(1, cores // CORES_PER_API_SERVER))),
    }


def options(arguments: list[str], environment: dict[str, str], machine: dict[str, str]) -> dict[str, str]:
    """Each setting's option and value: the command line's, else the environment's, else the default or the machine's."""
    chosen = {}
    for name, (option, default) in SETTINGS.items():
        value = environment.get(name) or default or machine[name]
        for i, argument in enumerate(arguments):
            if argument == option and i + 1 < len(arguments):
                value = arguments[i + 1]
            elif argument.startswith(option + "="):
                value = argument.partition("=")[2]
        chosen[option] = value
    return chosen


def model_folder(environment: dict[str, str]) -> Path:
    """The folder to serve.

    Raises:
        ValueError: MODEL is not a folder with a config.json and weights
    """
    if named := environment.get("MODEL"):
        path = Path(named)
        if not (path / "config.json").is_file():
            raise ValueError(f"MODEL={named}: no such model folder (it needs a config.json)")
        if not _has_weights(path):
            raise ValueError(f"MODEL={named}: no *.safetensors in it; download the weights into it first")
        return path
    if _has_weights(FULL_MODEL):
        return FULL_MODEL
    print(f"serve: no weights in {FULL_MODEL}; serving the bundled checkpoint, a small model trained on synthetic speech")
    return BUNDLED


def _has_weights(path: Path) -> bool:
    return any(path.glob("*.safetensors"))


def check_port(host: str, port: str) -> None:
    """Raises ValueError where the server could not listen."""
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"PORT={port}: expected a number from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); set PORT to a free one") from error


def check_limits(environment: dict[str, str]) -> None:
    """Raises ValueError for a limit that is none."""
    for name in LIMITS:
        value = environment[name]
        if name == "MAX_IN_FLIGHT" and not (value.isdecimal() and int(value) > 0):
            raise ValueError(f"{name}={value}: expected a number of requests, 1 or more")
        if name in COUNTS and not (value.isdecimal() and int(value) > 0):
            raise ValueError(f"{name}={value}: expected a whole number, 1 or more")
        if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) == 0:
            raise ValueError(f"{name}={value}: expected a number above 0")


def plugins(environment: dict[str, str]) -> list[str]:
    """vLLM's plugins to load: ours, and those that it would load without; once one is named, it loads no others."""
    if named := environment.get("VLLM_PLUGINS"):
        return [*named.split(","), *PLUGINS]
    installed = (one for distribution in importlib.metadata.distributions() for one in distribution.entry_points)
    others = {one.name for one in installed if one.group.startswith("vllm.") and one.group != ENDPOINTS}
    return [*sorted(others), *PLUGINS]


def command(arguments: list[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The vLLM command to run and its environment.

    Raises:
        ValueError, registry.RegistryError: with one line that says what to do
    """
    if not registry.is_patched(package := registry.find_vllm()):
        raise registry.RegistryError(f"{package} does not know GLM-ASR yet; run: python server/registry.py")
    on_cpu = importlib.metadata.version("vllm").endswith("+cpu")
    machine = machine_defaults(None if on_cpu else gpu_memory(), len(os.sched_getaffinity(0)))
    chosen = options(arguments, environment, machine)
    check_port(chosen["--host"], chosen["--port"])
    model = model_folder(environment)
    if chosen["--api-key"] == OPEN_KEY:
        del chosen["--api-key"]
        arguments = [argument for argument in arguments if argument not in ("--api-key", OPEN_KEY)]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_MEDIA_CONNECTOR": "glmasr", **environment}
    environment["VLLM_PLUGINS"] = ",".join(plugins(environment))
    environment |= {name: environment.get(name) or default for name, default in LIMITS.items()}
    check_limits(environment)
    if not environment.get("CUDA_VISIBLE_DEVICES"):
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # empty would hide every GPU
    flags = FLAGS + GPU_FLAGS
    if on_cpu:
        environment = {**CPU_ENVIRONMENT, **environment}
        flags = FLAGS + CPU_FLAGS + (ONE_PROCESS if chosen["--tensor-parallel-size"] == "1" else [])
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *flags]
    return [*serve, *(part for pair in chosen.items() for part in pair), *arguments], environment


def main() -> None:
    try:
        arguments, environment = command(sys.argv[1:], dict(os.environ))
    except (ValueError, registry.RegistryError) as error:
        sys.exit(f"serve: {error}")
    sys.stdout.flush()
    os.execve(arguments[0], arguments, environment)


if __name__ == "__main__":
    main()
