"""What run.py has measured, as a table and a plot: `python bench/report.py A/results.json B/results.json --out FOLDER`.

Several runs on the same machine, a part of the servers each, become one table; the same row measured again replaces the first.
"""

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

HEADINGS = (
    "clips", "route", "in flight", "server", "real time ×", "over upstream's best", "requests/s", "p50 s", "p95 s", "p99 s",
    "first token s", "tokens of those asked", "GPU busy", "of ceiling", "GPU memory GB",
)  # fmt: skip
PANELS = {"utterances": "Utterances of 7 s on average", "30 s": "Clips of 30 s"}  # lengths, sent to chat as wav
SIZE_IN, DPI = (8, 3.7), 200
GREYS, COLOURS = ("#8a8a8a", "#444444"), ("#c8102e", "#1f6fa8", "#3a7d44", "#b5651d")  # of released vLLM and of this project's
LINE = 0.07  # height of a label's line, in a panel's height
SAME = ("hardware", "versions", "layers")  # of runs that may stand in one table


@dataclass(frozen=True)
class Row:
    """One line of the table; latencies in seconds, shares from 0 to 1, None where there is no GPU.

    Attributes:
        real_time_factor: seconds of audio answered in a second
        requests: that were counted for throughput and latency
        first_token: the mean by the server's own clock, over all of the run's requests
        answered_tokens: those generated, as a share of those asked for, over all of the run's requests
        gpu_busy: share of the time in which something ran on the GPU
        ceiling_share: the multiplications and additions needed, as a share of what a large matrix product does meanwhile
    """

    candidate: str
    released: bool
    lengths: str
    route: str
    encoding: str
    in_flight: int
    real_time_factor: float
    requests_a_second: float
    requests: int
    p50: float
    p95: float
    p99: float
    first_token: float
    answered_tokens: float
    gpu_busy: float | None
    ceiling_share: float | None
    gpu_memory_gb: float | None

    @property
    def load(self) -> tuple:
        """What was sent: the same for rows that can be compared."""
        return self.lengths, self.route, self.encoding, self.in_flight


def ratio(row: Row, rows: list[Row]) -> float | None:
    """Real-time factor over that of upstream's best configuration under the same load; None where that was not measured."""
    best = max((other.real_time_factor for other in rows if other.released and other.load == row.load), default=None)
    return best and row.real_time_factor / best


def line(row: Row, rows: list[Row]) -> str:
    """A row of the table of `rows`."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    cells = (
        row.lengths, f"{row.route} {row.encoding}", str(row.in_flight), row.candidate, f"{row.real_time_factor:.4g}",
        cell(ratio(row, rows), ".2f"), f"{row.requests_a_second:.4g}", f"{row.p50:.3f}", f"{row.p95:.3f}", f"{row.p99:.3f}",
        f"{row.first_token:.3f}", f"{row.answered_tokens:.0%}", cell(row.gpu_busy, ".0%"), cell(row.ceiling_share, ".0%"),
        cell(row.gpu_memory_gb, ".1f"),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """The rows in Markdown, those of one load together."""
    loads = list(dict.fromkeys(row.load for row in rows))
    lines = [line(row, rows) for row in sorted(rows, key=lambda row: loads.index(row.load))]
    return "\n".join([f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *lines])


def plot(rows: list[Row], heading: str, out: Path) -> None:
    """Writes throughput.svg and throughput.png: real-time factor against requests in flight."""
    rows = [row for row in rows if (row.route, row.encoding) == ("chat", "wav")]
    colours = {}
    for released, palette in ((True, GREYS), (False, COLOURS)):
        names = dict.fromkeys(row.candidate for row in rows if row.released == released)
        colours |= dict(zip(names, itertools.cycle(palette), strict=False))
    figure, panels = plt.subplots(1, 2, figsize=SIZE_IN, facecolor="white")
    for axes, (lengths, title) in zip(panels, PANELS.items(), strict=True):
        shown = [row for row in rows if row.lengths == lengths]
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("requests in flight", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.tick_params(labelsize=8.5)
        axes.set_xscale("log", base=2)
        ticks = sorted({row.in_flight for row in shown})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        for name, colour in colours.items():
            if points := sorted((row.in_flight, row.real_time_factor) for row in shown if row.candidate == name):
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.8)
        axes.set_ylim(bottom=0)
        _label_lines(axes, shown, colours)
    panels[0].set_ylabel("seconds of audio a second", fontsize=9)
    figure.suptitle(heading, fontsize=9, x=0.01, ha="left", color="#444444")
    figure.subplots_adjust(left=0.085, right=0.87, bottom=0.15, top=0.82, wspace=0.68)
    for kind in ("svg", "png"):
        figure.savefig(out / f"throughput.{kind}", dpi=DPI)
    plt.close(figure)


def _label_lines(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    """Writes each line's name to the right of its end, from the lowest up, apart from each other."""
    top, below = axes.get_ylim()[1], 0.0  # where the label below ends
    right = max((row.in_flight for row in rows), default=1)
    ends = {row.candidate: row.real_time_factor / top for row in sorted(rows, key=lambda row: row.in_flight)}
    for name, height in sorted(ends.items(), key=lambda end: end[1]):
        half = LINE / 2 * (1 + name.count(", "))
        middle = max(height, below + half)
        below = middle + half
        axes.annotate(name.replace(", ", ",\n"), (right, middle * top), xytext=(7, 0), textcoords="offset points", fontsize=8.5,
                      color=colours[name], va="center", annotation_clip=False)  # fmt: skip


def write(found: dict, out: Path) -> str:
    """Writes results.json, table.md and the plot; returns the table."""
    rows = [Row(**row) for row in found["rows"]]
    heading = f"{found['hardware']}, vLLM {found['versions']['vllm']}, {found['date']}"
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    text = f"{heading}\n\n{table(rows)}\n"
    (out / "table.md").write_text(text)
    plot(rows, heading, out)
    return text


def merged(runs: list[dict]) -> dict:
    """One run with the rows of all.

    Raises:
        ValueError: they are not of the same machine, versions and sizes
    """
    for run in runs[1:]:
        if differing := [name for name in SAME if run[name] != runs[0][name]]:
            raise ValueError(f"{differing[0]} differs: {runs[0][differing[0]]} and {run[differing[0]]}")
    rows = {(row.candidate, *row.load): asdict(row) for run in runs for row in (Row(**one) for one in run["rows"])}
    return runs[0] | {"date": max(run["date"] for run in runs), "rows": list(rows.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of one run each")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, table.md and the plot of all")
    args = parser.parse_args()
    print(write(merged([json.loads(path.read_text()) for path in args.results]), args.out))


if __name__ == "__main__":
    main()
