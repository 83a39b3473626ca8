"""Starts the server, says what it is waiting for, transcribes wavs/ with test_vllm_api.py, and stops the server."""

import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "server.log"
# What the log says while the server starts → what that means.
STAGES = {
    "Initializing a V1 LLM engine": "starting the engine",
    "Loading weights took": "weights are loaded",
    "KV cache size": "cache is allocated",
    "Starting vLLM server": "routes are up",
}


def is_healthy(port: int) -> bool:
    """True if the server on this machine's `port` would answer a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def wait(server: subprocess.Popen, port: int) -> bool:
    """Reports the stages of the start, with seconds; False if the server ended."""
    began, seen = time.monotonic(), set()
    while not is_healthy(port):
        if server.poll() is not None:
            return False
        log = LOG.read_text(errors="replace")
        for mark, meaning in STAGES.items():
            if mark in log and mark not in seen:
                seen.add(mark)
                print(f"  {time.monotonic() - began:4.0f} s  {meaning}", flush=True)
        time.sleep(0.5)
    print(f"  {time.monotonic() - began:4.0f} s  healthy", flush=True)
    return True


def stop(server: subprocess.Popen) -> None:
    """Ends a server that was started in a session of its own, with all its processes."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGINT)
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main() -> int:
    port = int(os.environ.get("PORT") or 8300)
    print(f"starting the server on port {port} (log: {LOG})", flush=True)
    with LOG.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "server" / "serve.py")], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        if not wait(server, port):
            print("\n".join(LOG.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
            print(f"demo: the server did not start; the whole log is in {LOG}", file=sys.stderr)
            return 1
        client = [sys.executable, str(ROOT / "test_vllm_api.py"), "--base-url", f"http://localhost:{port}/v1"]
        return subprocess.run(client, check=False).returncode
    finally:
        stop(server)
        print("the server is stopped", flush=True)


if __name__ == "__main__":
    sys.exit(main())
