"""What may be shown of a text that is decoded again and again while somebody speaks: only what will most likely stay.

LocalAgreement-2 (Liu et al. 2020, doi.org/10.21437/Interspeech.2020-2897; Macháček et al. 2023, arxiv.org/abs/2307.14743)
on text alone: a word is shown when two decodings in a row agree on it and on all before it. What was shown stays.
"""

import re
from dataclasses import dataclass
from itertools import takewhile

if __package__:
    from .glmasr_guard import CJK, NO_SPACE
else:
    from glmasr_guard import CJK, NO_SPACE

UNIT = re.compile(rf"[{CJK}]|[^\W{CJK}](?:[^\s{CJK}]*[^\W{CJK}])?")


@dataclass(frozen=True)
class Unit:
    """A word, or a single CJK character, and what stands between it and the one before: spaces and punctuation."""

    before: str
    text: str

    @property
    def key(self) -> str:
        return self.text.casefold()


def units(text: str) -> tuple[list[Unit], str]:
    """The units of a text and what follows the last one. Joined, they are the text."""
    found, at = [], 0
    for match in UNIT.finditer(text):
        found.append(Unit(text[at : match.start()], match[0]))
        at = match.end()
    return found, text[at:]


def joint(before: str, text: str) -> str:
    """`text` as it follows `before`: behind a space, unless one side is CJK or nothing."""
    text = text.lstrip()
    if not before or not text or before[-1].isspace() or NO_SPACE.match(before[-1]) or NO_SPACE.match(text):
        return text
    return f" {text}"


def aligned(said: list[str], heard: list[str]) -> int:
    """How many units of `heard` stand for all of `said`: the beginning of it with the least edit distance."""
    if heard[: len(said)] == said:
        return len(said)
    distances = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        last, distances[0] = distances[0], i
        for j, other in enumerate(heard, 1):
            last, distances[j] = distances[j], min(last + (word != other), distances[j] + 1, distances[j - 1] + 1)
    return min(range(len(heard) + 1), key=lambda j: (distances[j], abs(j - len(said))))


class Agreement:
    """The text of one item as it grows. Each method takes a text and gives what is to be added to what was shown.

    An item's audio is decoded in windows that follow one another; `partial` is about the present one.
    """

    def __init__(self):
        self.text = ""  # all that was shown
        self._said: list[str] = []  # its units' keys
        self._window = 0  # how many of them come before this window
        self._previous: list[Unit] | None = None  # what the last decoding of the window has beyond those shown

    def partial(self, text: str) -> str:
        """A decoding of the window so far."""
        heard, _ = units(text)
        rest = heard[aligned(self._said[self._window :], [unit.key for unit in heard]) :]
        agreed = [unit for unit, _ in takewhile(lambda pair: pair[0].key == pair[1].key, zip(rest, self._previous or [], strict=False))]
        self._previous = rest[len(agreed) :]
        return self._show(agreed)

    def close_window(self, text: str) -> str:
        """The decoding of the whole window; the next one begins."""
        shown = self._finish(text, self._window)
        self._window, self._previous = len(self._said), None
        return shown

    def finish(self, text: str) -> str:
        """The decoding of the whole item."""
        return self._finish(text, 0)

    def _finish(self, text: str, first: int) -> str:
        heard, tail = units(text.rstrip())
        rest = heard[aligned(self._said[first:], [unit.key for unit in heard]) :]
        return self._show(rest, tail, first)

    def _show(self, new: list[Unit], tail: str = "", first: int | None = None) -> str:
        begins = len(self._said) == (self._window if first is None else first)
        added = "".join(unit.before + unit.text for unit in new) + tail
        if begins:
            added = joint(self.text, added) if new else ""  # no words, no punctuation
        elif not new and self.text.endswith(tail):
            added = ""
        self._said += [unit.key for unit in new]
        self.text += added
        return added
