"""What the tests share: the project's folders on the path, and one real server on the bundled checkpoint."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "checkpoint"
START_S = 300  # a server that is not healthy by then has failed
sys.path[:0] = [str(ROOT / "training"), str(ROOT / "server"), str(ROOT / "model"), str(ROOT)]

from demo import is_healthy, stop  # noqa: E402


@dataclass(frozen=True)
class Server:
    """A running server: its address, how long it took to be healthy, where it logs, and its API process."""

    url: str
    started_s: float
    log: Path
    pid: int

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="EMPTY", max_retries=0)


@contextmanager
def run_server(log: Path, *options: str, **settings: str) -> Iterator[Server]:
    """Starts server/serve.py with `settings` in its environment, waits until it is healthy, stops it in the end."""
    port = free_port()
    environment = os.environ | {"HOST": "127.0.0.1", "PORT": str(port)} | settings
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "server" / "serve.py"), *options],
            env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        while not is_healthy(port):
            assert process.poll() is None, f"the server ended with {process.returncode}:\n{tail(log)}"
            assert time.monotonic() - began < START_S, f"not healthy after {START_S} s:\n{tail(log)}"
            time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}", time.monotonic() - began, log, process.pid)
    finally:
        stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server in float32, where the text must equal the reference's to the letter; it may fetch from this machine."""
    allowed = ("--allowed-media-domains", "127.0.0.1", "localhost")
    with run_server(tmp_path_factory.mktemp("server") / "server.log", *allowed, DTYPE="float32") as running:
        yield running
