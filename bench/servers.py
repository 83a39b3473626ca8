"""The servers that are measured: started one at a time on this machine, watched, and stopped."""

import contextlib
import importlib.metadata
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import models
import torch
from upstream import released_vllm
from vllm.third_party import pynvml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT / "server"))
from demo import is_healthy, stop  # noqa: E402

HAS_GPU = torch.cuda.is_available()
CPU_LAYERS = 2  # of encoder and decoder, where there is no GPU
START_S = 600  # a server that is not healthy by then has failed
LOG_LINES = 40  # shown of a server that has failed
WATCH_S = 0.1  # between two looks at the GPU
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Candidate:
    """A server to measure.

    Attributes:
        name: in tables
        layout: of its model: "a" or "b" with random weights, or "bundled" for the bundled checkpoint
        released: vLLM as released, else this project's server
        options: of `vllm serve`
    """

    name: str
    layout: str
    released: bool = False
    options: tuple[str, ...] = ()


UPSTREAM = Candidate("upstream", "b", released=True)
THIS = Candidate("this", "a")
BUNDLED = Candidate("bundled checkpoint", "bundled")


@dataclass(frozen=True)
class Server:
    """A running server: its address and its first process, which is the API process where there is one."""

    url: str
    process: subprocess.Popen


@contextlib.contextmanager
def folders(layers: int | None) -> Iterator[Path]:
    """A folder for `running`: both layouts with so many layers (None: the full model's), and the released vLLM."""
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        models.layout_a(folder / "a", layers)
        models.layout_b(folder / "b", layers)
        released_vllm(folder / "released")
        yield folder


def log_file(candidate: Candidate, out: Path) -> Path:
    return out / f"{re.sub(r'[^a-zA-Z0-9]+', '_', candidate.name)}.log"


@contextlib.contextmanager
def running(candidate: Candidate, folder: Path, out: Path) -> Iterator[Server]:
    """Starts the candidate's server, which logs to `out`, waits until it is healthy, stops it in the end.

    `folder` holds layouts a and b, as `folders` gives it; the bundled checkpoint needs none.

    Raises:
        RuntimeError: it did not start; with the end of its log
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bundled = candidate.layout == "bundled"
    model = models.BUNDLED if bundled else folder / candidate.layout
    options = [*([] if bundled else ["--load-format", "dummy"]), *candidate.options]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    if candidate.released:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder / "released"), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--max-model-len", "4096"]
        if not HAS_GPU:
            command.append("--enforce-eager")
            environment["VLLM_CPU_KVCACHE_SPACE"] = "2"
    else:
        environment["MODEL"] = str(model)
        command = [sys.executable, str(ROOT / "server" / "serve.py")]
    out.mkdir(parents=True, exist_ok=True)
    log = log_file(candidate, out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped then too
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        began = time.monotonic()
        while not is_healthy(port):
            if process.poll() is not None or time.monotonic() - began > START_S:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                raise RuntimeError(f"{candidate.name} did not start in {time.monotonic() - began:.0f} s; {log} ends:\n{end}")
            time.sleep(0.5)
        yield Server(f"http://127.0.0.1:{port}", process)
    finally:
        stop(process)
        with contextlib.suppress(ProcessLookupError):  # what it has left of its session
            os.killpg(process.pid, signal.SIGKILL)


def counters(url: str) -> dict[str, float]:
    """The server's own sums since its start, over all its processes, by their names without "vllm:"."""
    with NO_PROXY.open(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    sums: dict[str, float] = {}
    for name, value in re.findall(r"^vllm:(\w+_(?:sum|count|total))(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def grown(url: str, before: dict[str, float]) -> dict[str, float]:
    """By how much the server's sums have grown."""
    return {name: value - before.get(name, 0.0) for name, value in counters(url).items()}


class GpuWatch(threading.Thread):
    """Notes how busy the first GPU is and how much of its memory is used, inside a `with`; nothing where there is none."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples: list[tuple[float, float, float]] = []  # clock in seconds, share of time busy, bytes
        self._ended = threading.Event()

    def __enter__(self) -> "GpuWatch":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        if not HAS_GPU:
            return
        pynvml.nvmlInit()
        device = _first_gpu()
        while not self._ended.wait(WATCH_S):
            busy = pynvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            self.samples.append((time.monotonic(), busy, pynvml.nvmlDeviceGetMemoryInfo(device).used))

    def busy(self, begin: float, end: float) -> float | None:
        """Mean between two moments; None where nothing was noted."""
        noted = [busy for clock, busy, _ in self.samples if begin <= clock <= end]
        return sum(noted) / len(noted) if noted else None

    @property
    def memory_gb(self) -> float | None:
        """The most that was used at one time."""
        return max(used for _, _, used in self.samples) / 1e9 if self.samples else None


def _first_gpu():
    """NVML's handle of the first GPU that the server sees."""
    name = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)


def hardware() -> str:
    """The machine in words; asks NVML, because CUDA would take some of the GPU's memory."""
    cores = f"{os.cpu_count()} CPU cores"
    if not HAS_GPU:
        model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return f"{model[1] if model else platform.machine()}, {cores}, no GPU"
    pynvml.nvmlInit()
    name, count = pynvml.nvmlDeviceGetName(_first_gpu()), torch.cuda.device_count()
    return f"{count} × {name}, {cores}" if count > 1 else f"{name}, {cores}"


def about() -> dict:
    """What a result is worth nothing without: machine, day and versions."""
    found = {"hardware": hardware(), "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    if HAS_GPU:
        found |= {"driver": pynvml.nvmlSystemGetDriverVersion(), "cuda": torch.version.cuda}
    return found | {"versions": {name: importlib.metadata.version(name) for name in ("vllm", "torch", "transformers")}}
