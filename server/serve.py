"""Starts vLLM's OpenAI-compatible server on GLM-ASR, with defaults that just work.

    python server/serve.py [any option of `vllm serve`]

Settings come from the environment (see SETTINGS), an option on the command line wins. MODEL is a
folder; without it the weights in model/ are served, or the bundled checkpoint where there are none.
"""

import importlib.metadata
import os
import socket
import sys
from pathlib import Path

import registry

ROOT = Path(__file__).resolve().parent.parent
FULL_MODEL, BUNDLED = ROOT / "model", ROOT / "checkpoint"

# Environment variable → option of `vllm serve`, default.
SETTINGS = {
    "HOST": ("--host", "0.0.0.0"),
    "PORT": ("--port", "8300"),
    "SERVED_MODEL_NAME": ("--served-model-name", "glm-asr-eligant"),
    "DTYPE": ("--dtype", "auto"),
    "TENSOR_PARALLEL_SIZE": ("--tensor-parallel-size", "1"),
    "MAX_MODEL_LEN": ("--max-model-len", "4096"),
    "GPU_MEMORY_UTILIZATION": ("--gpu-memory-utilization", "0.1"),
    "API_KEY": ("--api-key", "EMPTY"),
}
OPEN_KEY = "EMPTY"  # this key means that none is asked for
# No cache of decoded audio: fresh audio never hits it, and after a client has left in the midst of a stream vLLM 0.32
# takes windows for cached that the engine never got, and answers the next request for them without text.
FLAGS = ["--mm-processor-cache-gb", "0"]
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "2"}  # GiB
CPU_FLAGS = ["--enforce-eager"]  # compiling takes longer than it saves
ONE_PROCESS = ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]  # starts sooner


def options(arguments: list[str], environment: dict[str, str]) -> dict[str, str]:
    """Each setting's option and value: the command line's, else the environment's, else the default."""
    chosen = {}
    for name, (option, default) in SETTINGS.items():
        value = environment.get(name) or default
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


def command(arguments: list[str], environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """The vLLM command to run and its environment.

    Raises:
        ValueError, registry.RegistryError: with one line that says what to do
    """
    if not registry.is_patched(package := registry.find_vllm()):
        raise registry.RegistryError(f"{package} does not know GLM-ASR yet; run: python server/registry.py")
    chosen = options(arguments, environment)
    check_port(chosen["--host"], chosen["--port"])
    model = model_folder(environment)
    if chosen["--api-key"] == OPEN_KEY:
        del chosen["--api-key"]
        arguments = [argument for argument in arguments if argument not in ("--api-key", OPEN_KEY)]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_MEDIA_CONNECTOR": "glmasr", **environment}
    if not environment.get("CUDA_VISIBLE_DEVICES"):
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # empty would hide every GPU
    flags = FLAGS
    if importlib.metadata.version("vllm").endswith("+cpu"):
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
