"""What the scripts that answer one question each share: their options, and a table that is printed and kept."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from servers import CPU_LAYERS, HAS_GPU, RESULTS, Candidate, about

MOST_S = 30.0 if HAS_GPU else 60.0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def parser(description: str, candidates: list[Candidate] | None = None, sized: bool = True) -> argparse.ArgumentParser:
    """With the options that all have, a choice of `candidates` where there are some, and of size and time where `sized`."""
    made = argparse.ArgumentParser(description=description, formatter_class=_Formatter)
    if candidates:
        names = [candidate.name for candidate in candidates]
        made.add_argument("--candidates", nargs="+", choices=names, default=names, help="servers to measure")
    if sized:
        made.add_argument("--layers", type=int, default=None if HAS_GPU else CPU_LAYERS, help="of encoder and decoder; None: all")
        made.add_argument("--seconds", type=float, default=MOST_S, help="that a run sends at most")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for results and the servers' logs")
    made.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="everything behind: for this project's server")
    return made


def chosen(candidates: list[Candidate], args: argparse.Namespace) -> list[Candidate]:
    """Those asked for, this project's server with the options given for it."""
    named = [candidate for candidate in candidates if candidate.name in args.candidates]
    return [one if one.released else replace(one, options=(*one.options, *args.options)) for one in named]


class Answer:
    """A table in the making: each row is printed as it comes, and all are written to `name`.json."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.path = args.out / f"{name}.json"
        self.found = about() | {"arguments": {key: value for key, value in vars(args).items() if key != "out"}, "rows": []}
        self.failed = False
        args.out.mkdir(parents=True, exist_ok=True)
        print(f"{self.found['hardware']}, vLLM {self.found['versions']['vllm']}, {self.found['date']}\n")

    def add(self, row: dict, **kept) -> None:
        """Prints the row's cells under the headings that are its keys; `kept` goes to the file alone."""
        if not self.found["rows"]:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}", flush=True)
        print(f"| {' | '.join(map(_cell, row.values()))} |", flush=True)
        self.found["rows"].append(row | kept)
        self.path.write_text(json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """What a server that fails brings to an end; the rows of the others are still measured."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            self.failed = True
            print(error, file=sys.stderr, flush=True)


def _cell(value: float | int | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else " ".join(str(value).split()).replace("|", "/")
