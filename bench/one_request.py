"""How long does one clip of 7 s take when nothing else is in flight, and where does the time go?

Median and 95th percentile as the client sees them; then means, of which queue, prefill (the encoder's time is in it) and
decode are the engine's by the server's own clocks, and the rest is the API process's, the way between both, and HTTP.
"""

import sys

import load
import numpy as np
from load import Workload
from question import Answer, chosen, parser
from servers import THIS, UPSTREAM, counters, folders, grown, running

CANDIDATES = [UPSTREAM, THIS]
STAGES = ("queue", "prefill", "decode")
WARM_UP = 5  # requests


def mean_ms(sums: dict[str, float], name: str) -> float:
    """Of a histogram of the server's."""
    return 1000 * sums[f"{name}_seconds_sum"] / max(1, sums[f"{name}_seconds_count"])


def main() -> int:
    options = parser(__doc__, CANDIDATES)
    options.add_argument("--requests", type=int, default=50)
    args = options.parse_args()
    answer = Answer("one_request", args)
    with folders(args.layers) as folder:
        for candidate in chosen(CANDIDATES, args):
            with answer.attempt(), running(candidate, folder, args.out) as server:
                load.send(server.url, Workload("7 s"), WARM_UP, 1, 1, seed=999).check()
                before = counters(server.url)
                result = load.send(server.url, Workload("7 s"), args.requests, 1, 1, 0, load.Until(most_s=args.seconds)).check()
                sums = grown(server.url, before)
                latencies = 1000 * np.array([one.latency for one in result.answered])
                median, p95 = np.percentile(latencies, (50, 95)).tolist()
                mean = float(latencies.mean())
                spent = {stage: mean_ms(sums, f"request_{stage}_time") for stage in STAGES}
                answer.add({
                    "server": candidate.name, "requests": len(latencies), "median ms": median, "p95 ms": p95,
                    "mean ms": mean, **spent, "rest": mean - sum(spent.values()),
                    "first token": mean_ms(sums, "time_to_first_token"), "between tokens": mean_ms(sums, "inter_token_latency"),
                })  # fmt: skip
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
