"""Subtitles: a segment's text cut into cues that can be read, and cues as SubRip or WebVTT.

Needs the standard library alone. Lengths are in columns: a CJK character or full-width sign takes two, all else one.
"""

import html
import math
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

LINES = 2  # in a cue
MAX_CHARS = 84  # columns in a cue: 42 a line, 21 CJK characters
SENTENCE_END, CLAUSE_END = "。！？!?.…", "，、；：,;:—"
QUOTES = "\"'”’」』）)】》"  # may stand behind the end of a sentence
GLUED_BEFORE = {"Pe", "Pf", "Po", "Pd", "Mn", "Mc", "Me", "Cf", "Sk", "Lm"}  # Unicode categories that no line begins with
GLUED_AFTER = {"Ps", "Pi", "Cf"}  # and that none ends with
BREAK_COSTS = {"sentence": 0.0, "clause": 0.7, "word": 2.0, "character": 2.2}  # between cues, beside 1 for a wholly empty one


@dataclass(frozen=True)
class Cue:
    """Text to be shown from `start_s` to `end_s` seconds, its lines apart by newlines."""

    start_s: float
    end_s: float
    text: str


def srt(cues: Iterable[Cue]) -> str:
    """SubRip; cues without text are left out, and "-->" in a text becomes "→", as the format cannot quote it.

    Raises:
        ValueError: a cue begins before 0 or before the one ahead of it, or ends before it begins
    """
    blocks = [
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text.replace('-->', '→')}\n"
        for number, (start, end, text) in enumerate(_timed(cues), 1)
    ]
    return "\n".join(blocks)


def vtt(cues: Iterable[Cue]) -> str:
    """WebVTT; cues without text are left out.

    Raises:
        ValueError: a cue begins before 0 or before the one ahead of it, or ends before it begins
    """
    blocks = [
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{html.escape(text, quote=False)}\n" for start, end, text in _timed(cues)
    ]
    return "\n".join(["WEBVTT\n", *blocks])


def cues(start_s: float, end_s: float, text: str, max_chars: int = MAX_CHARS) -> list[Cue]:
    """A segment's text in cues of at most two lines, cut at the ends of sentences or clauses where there are any.

    Nothing is lost but extra white space. A word is never broken: one longer than a line has a longer line. Each cue
    is shown as long as its share of the text's columns. No text, no cues.

    Args:
        max_chars: columns in a cue, half of them in each line

    Raises:
        ValueError: `end_s` is before `start_s`, or `max_chars` is below 4
    """
    if not start_s <= end_s:
        raise ValueError(f"expected a segment that ends after it begins, got {start_s} s to {end_s} s")
    if max_chars < 2 * LINES:
        raise ValueError(f"expected at least {2 * LINES} columns, got {max_chars}")
    parts = [_lines(part, max_chars // LINES) for part in _parts(_atoms(text), max_chars // LINES)]
    total, before = sum(map(_width, parts)), 0
    found = []
    for i, part in enumerate(parts):
        begin = start_s + (end_s - start_s) * before / total
        before += _width(part)
        end = end_s if i == len(parts) - 1 else start_s + (end_s - start_s) * before / total
        found.append(Cue(begin, end, part))
    return found


def _timed(cues: Iterable[Cue]) -> Iterator[tuple[int, int, str]]:
    """Milliseconds and text of each cue that has any: none overlaps the one ahead of it, and each lasts 1 ms at least."""
    previous_start_s, previous_end = 0.0, 0
    for cue in cues:
        if not previous_start_s <= cue.start_s <= cue.end_s < math.inf:
            raise ValueError(f"expected a cue from {previous_start_s} s on that ends after it begins, got {cue}")
        previous_start_s = cue.start_s
        text = "\n".join(filter(None, map(str.strip, cue.text.splitlines())))
        if text:
            start = max(round(cue.start_s * 1000), previous_end)
            previous_end = max(round(cue.end_s * 1000), start + 1)
            yield start, previous_end, text


def _clock(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"


def _width(text: str) -> int:
    """Columns; white space counts as one, so lines may be counted together."""
    return sum(1 + _is_wide(character) for character in text)


def _is_wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _atoms(text: str) -> list[str]:
    """What a line break must not part: words, and CJK characters with the signs that belong to them.

    A space ahead of an atom is a part of it: put together they are the text.
    """
    text = " ".join(text.split())
    atoms = [text[:1]]
    for previous, character in zip(text, text[1:], strict=False):
        if character == " " or previous != " " and _may_part(previous, character):
            atoms.append(character)
        else:
            atoms[-1] += character
    return atoms if text else []


def _may_part(previous: str, character: str) -> bool:
    glued = unicodedata.category(previous) in GLUED_AFTER or unicodedata.category(character) in GLUED_BEFORE
    return not glued and (_is_wide(previous) or _is_wide(character))


def _kind_of_break(atom: str, following: str) -> str:
    """A key of `BREAK_COSTS`: what ends where `atom` ends."""
    last = atom.rstrip(QUOTES)[-1:] or atom[-1]
    if last in SENTENCE_END:
        return "sentence"
    if last in CLAUSE_END:
        return "clause"
    return "word" if following.startswith(" ") else "character"


def _parts(atoms: list[str], line: int) -> list[list[str]]:
    """The atoms in as many groups as make the cheapest cues: each fits into its lines, few are short, few break a clause."""
    widths = [_width(atom) for atom in atoms]
    costs = [BREAK_COSTS[_kind_of_break(atom, following)] for atom, following in zip(atoms, atoms[1:], strict=False)] + [0.0]
    best: list[tuple[float, int]] = [(0.0, 0)] + [(math.inf, 0)] * len(atoms)  # cost of the atoms up to here, last begin
    for begin in range(len(atoms)):
        for end, used in _fitting(atoms, widths, begin, line):
            cost = best[begin][0] + 0.1 + (1 - min(used / (LINES * line), 1)) ** 2 + costs[end - 1]
            best[end] = min(best[end], (cost, begin))
    parts: list[list[str]] = []
    end = len(atoms)
    while end:
        begin = best[end][1]
        parts.insert(0, [atoms[begin].strip(), *atoms[begin + 1 : end]])
        end = begin
    return parts


def _fitting(atoms: list[str], widths: list[int], begin: int, line: int) -> Iterator[tuple[int, int]]:
    """Every end such that atoms[begin:end] fit into the lines of a cue, and their columns; the first atom always does."""
    lines, filled, used = 1, 0, 0
    for end in range(begin, len(atoms)):
        bare = widths[end] - atoms[end].startswith(" ")
        if filled and filled + widths[end] > line:
            lines, filled = lines + 1, 0
        if lines > LINES:
            return
        added = widths[end] if filled else bare
        filled += added
        used += added
        yield end + 1, used


def _lines(atoms: list[str], line: int) -> str:
    """The atoms in one line, or in two: as even as possible, rather cut at the end of a clause."""
    widths = [_width(atom) for atom in atoms]
    total = sum(widths)
    if total <= line or len(atoms) == 1:
        return "".join(atoms).strip()

    def cost(i: int) -> tuple[int, float]:
        first = sum(widths[:i])
        second = total - first - atoms[i].startswith(" ")
        longer, shorter = max(first, second), min(first, second)
        return max(longer - line, 0), (longer - shorter) / line + BREAK_COSTS[_kind_of_break(atoms[i - 1], atoms[i])] / 2

    i = min(range(1, len(atoms)), key=cost)
    return f"{''.join(atoms[:i]).strip()}\n{''.join(atoms[i:]).strip()}"
