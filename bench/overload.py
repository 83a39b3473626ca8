"""What happens when far more requests come at once than can be served? How many are answered or refused, whether each refusal
says when to come back, how long /health takes meanwhile, and how much more memory (RSS, shared pages counted in each process)
the server's processes hold.
"""

import http.client
import sys
import threading
import time
from collections import Counter

import load
import psutil
from load import Workload
from question import Answer, chosen, parser
from run import client_processes
from servers import THIS, UPSTREAM, Server, folders, running

CANDIDATES = [UPSTREAM, THIS]
WATCH_S = 0.1  # between two looks
HEALTH_TIMEOUT_S = 60


class Watch(threading.Thread):
    """Asks a server's /health over and over and adds up its processes' memory, until `stop`."""

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self.port, self.first = int(server.url.rpartition(":")[2]), psutil.Process(server.process.pid)
        self.latencies_s: list[float] = []
        self.failures = 0
        self.idle = self.peak = self._memory()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(WATCH_S):
            began, connection = time.monotonic(), http.client.HTTPConnection("127.0.0.1", self.port, timeout=HEALTH_TIMEOUT_S)
            try:
                connection.request("GET", "/health")
                self.failures += connection.getresponse().status != 200
            except (OSError, http.client.HTTPException):
                self.failures += 1
            finally:
                connection.close()
            self.latencies_s.append(time.monotonic() - began)
            self.peak = max(self.peak, self._memory())

    def _memory(self) -> int:
        total = 0
        for process in (self.first, *self.first.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:  # it has ended meanwhile
                continue
        return total

    def stop(self) -> None:
        self._ended.set()
        self.join()


def main() -> int:
    options = parser(__doc__, CANDIDATES)
    options.add_argument("--requests", type=int, default=2000)
    args = options.parse_args()
    answer = Answer("overload", args)
    with folders(args.layers) as folder:
        for candidate in chosen(CANDIDATES, args):
            with answer.attempt(), running(candidate, folder, args.out) as server:
                load.send(server.url, Workload("7 s"), 8, 8, 1, seed=999).check()
                watch = Watch(server)
                watch.start()
                result = load.send(server.url, Workload("7 s"), args.requests, args.requests, client_processes(), seed=0)
                watch.stop()
                statuses = Counter(one.status for one in result.answered)
                answer.add({
                    "server": candidate.name, "200": statuses[200], "503": statuses[503],
                    "503 with Retry-After": sum(one.status == 503 and one.retry_after is not None for one in result.answered),
                    "other": args.requests - statuses[200] - statuses[503],
                    "slowest answer s": max(one.latency for one in result.answered),
                    "slowest /health s": max(watch.latencies_s), "failed /health": watch.failures,
                    "idle GB": watch.idle / 1e9, "more at the peak GB": (watch.peak - watch.idle) / 1e9,
                }, statuses=statuses)  # fmt: skip
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
