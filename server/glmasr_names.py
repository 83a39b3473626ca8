"""Hotwords in a transcript: what a biased answer offers, and what sounds alike, is taken where the model was not sure.

Needs the standard library alone. A bias strong enough to bring rare names out also harms what follows, and words elsewhere.
So the text stays that of the answer without a bias, and only whole hotwords are put in the place of words of low probability.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

UNSURE_LOGPROB = -0.5  # sum over the tokens of the words in question; higher ones stay. This and ALIKE: bench/hotwords.py
ALIKE = 0.7  # of two sounds, 0 to 1, from which on one is taken for the other
SURE_LOGPROB = -0.05  # of one word: at the edges of such words, those above stay
MOST_WORDS = 4  # that a name may have been heard as
WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+(?:['’-]\w+)*")
# Letters to what they sound like, roughly, as English speakers and listeners mix them up; in this order.
SOUNDS = (
    ("sch", "s"), ("sh", "s"), ("sz", "s"), ("cz", "s"), ("ch", "s"), ("ph", "f"), ("ck", "k"), ("th", "t"), ("tz", "s"),
    ("x", "ks"), ("c", "k"), ("q", "k"), ("z", "s"), ("j", "y"), ("v", "f"), ("w", "f"), ("b", "p"), ("d", "t"), ("g", "k"),
    ("h", ""),
)  # fmt: skip

Token = tuple[int, int, float]  # begin and end in the text, natural logarithm of its probability


def with_hotwords(text: str, tokens: Sequence[Token], biased: str, hotwords: Sequence[str]) -> str:
    """A text with hotwords in it, where they belong; the text itself where none does.

    Args:
        text: the answer without a bias
        tokens: its tokens, in order
        biased: the answer with one
    """
    listed = re.compile("|".join(_pattern(word) for word in sorted(hotwords, key=len, reverse=True)), re.IGNORECASE)
    found = _offered(text, tokens, biased, listed)
    if not found and not listed.search(text):
        found = _sounding(text, tokens, hotwords)
    for begin, end, word in reversed(found):
        text = text[:begin] + word + text[end:]
    return text


def _pattern(word: str) -> str:
    escaped = re.escape(word)
    return rf"(?<!\w){escaped}(?!\w)" if word.isascii() else escaped


def _logprob(tokens: Sequence[Token], begin: int, end: int) -> float:
    return sum(logprob for first, last, logprob in tokens if first < end and last > begin)


def _offered(text: str, tokens: Sequence[Token], biased: str, listed: re.Pattern) -> list[tuple[int, int, str]]:
    """Where the answers differ, in one hotword and what follows from it: begin, end, the hotword."""
    ours, theirs = list(WORD.finditer(text)), list(WORD.finditer(biased))
    matcher = SequenceMatcher(None, [one[0].lower() for one in ours], [one[0].lower() for one in theirs], autojunk=False)
    found = []
    for tag, first, last, their_first, their_last in matcher.get_opcodes():
        if tag != "replace":
            continue
        unsure = [one for one in ours[first:last] if _logprob(tokens, *one.span()) <= SURE_LOGPROB]
        names = listed.findall(biased[theirs[their_first].start() : theirs[their_last - 1].end()])
        if len(names) == 1 and unsure:
            begin, end = unsure[0].start(), unsure[-1].end()
            if _logprob(tokens, begin, end) <= UNSURE_LOGPROB:
                found.append((begin, end, names[0]))
    return found


def _sounding(text: str, tokens: Sequence[Token], hotwords: Sequence[str]) -> list[tuple[int, int, str]]:
    """The words that sound most like a hotword in Latin letters, if anything does: begin, end, the hotword."""
    words, best, found = list(WORD.finditer(text)), ALIKE, []
    sounds = {word: sound for word in hotwords if (sound := _sound(word))}
    for first in range(len(words)):
        for last in range(first, min(len(words), first + MOST_WORDS)):
            begin, end = words[first].start(), words[last].end()
            heard = _sound(text[begin:end])
            if not heard or _logprob(tokens, begin, end) > UNSURE_LOGPROB:
                continue
            for word, sound in sounds.items():
                alike = 1 - _distance(heard, sound) / max(len(heard), len(sound))
                if alike >= best and (alike > best or not found):
                    best, found = alike, [(begin, end, word)]
    return found


def _sound(text: str) -> str:
    """Classes of consonants, with one letter for any vowels between them; nothing for other scripts."""
    sound = re.sub("[^a-z]", "", text.lower())
    for letters, like in SOUNDS:
        sound = sound.replace(letters, like)
    return re.sub(r"(.)\1+", r"\1", re.sub("[aeiouy]+", "a", sound))


def _distance(one: str, other: str) -> int:
    """Levenshtein's: letters to be put in, taken out or replaced."""
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row = row, [i]
        for j, right in enumerate(other, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (left != right)))
    return row[-1]
