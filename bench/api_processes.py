"""How many API processes does this project's server need to keep one GPU busy? Throughput on utterances over their number."""

import os
import sys
from dataclasses import replace

from load import Workload, steady
from question import Answer, parser
from run import client_processes, warm_up
from servers import THIS, GpuWatch, folders, running

COUNTS = [count for count in (1, 2, 4, 8, 16) if count <= max(2, os.cpu_count() // 2)]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="of API processes")
    options.add_argument("--in-flight", type=int, default=256)
    args = options.parse_args()
    answer = Answer("api_processes", args)
    with folders(args.layers) as folder:
        for count in args.counts:
            candidate = replace(THIS, name=f"{count} API processes", options=("--api-server-count", str(count), *args.options))
            with answer.attempt(), running(candidate, folder, args.out) as server:
                warm_up(server, args.in_flight)
                with GpuWatch() as watch:
                    result = steady(server.url, Workload("utterances"), args.in_flight, client_processes(), 0, args.seconds)
                p50, p99 = result.percentiles(50, 99)
                answer.add({
                    "API processes": count, "requests/s": result.requests_a_second, "real time ×": result.real_time_factor,
                    "p50 s": p50, "p99 s": p99, "GPU busy": watch.busy(result.begin, result.end),
                })  # fmt: skip
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
