"""A guard for one decoded segment of speech: what is doubtful about its text, and decoding it again where something is.

Needs the standard library alone. Repetition is judged against the audio's length, for people do say "no no no no".
"""

import re
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

Samples = TypeVar("Samples")

FASTEST = (9.0, 12.0)  # words/s, CJK characters/s: more than this nobody says
BRISK = (7.0, 9.0)  # the same: what repeats itself and is faster than this is a loop
SLOWEST = (0.9, 1.1)  # the same: where there is a text, more is said than this; slow speech has 1.7 and 2
JUDGED_S = 1.5  # of speech; in less, one slow word may be all
SLACK_S = 0.5  # speech that a voice activity detector may have missed
MIN_SPEECH_S = 0.1  # less is no speech
MAX_COMPRESSION = 2.4  # Whisper's bound; text above it repeats itself
MIN_REPEATS = 3  # times that a looping tail says the same
UNSURE_LOGPROB = -1.0  # Whisper's bound; text without speech is dropped below it
TEMPERATURES = (0.2, 0.4, 0.6)
MAX_TRIES = 2 + len(TEMPERATURES)  # greedy, in shorter windows, sampled
TOKENS_AT_LEAST, TOKENS_PER_S = 16, 12

CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
UNIT = re.compile(rf"[{CJK}]|[^\W_{CJK}](?:[^\W_{CJK}]|['’](?=\w)){{,19}}")  # longer words count more than once
NO_SPACE = re.compile(rf"[{CJK}\u3000-\u303f\uff00-\uffef]")


@dataclass(frozen=True)
class Decoded:
    """What the model answered for some audio.

    Attributes:
        avg_logprob: mean natural logarithm of the tokens' probabilities, at most 0
        finish_reason: "stop", or "length" where the answer ran into its bound
    """

    text: str
    token_ids: list[int]
    avg_logprob: float
    finish_reason: str


@dataclass(frozen=True)
class Guarded:
    """A segment's text and how far to trust it.

    Attributes:
        compression_ratio: of `text`
        no_speech_prob: share of the segment without speech, 0 to 1, by the caller's detector; no model's probability
        temperature: at which the text was sampled, 0 if not
        warnings: the doubts that remain, as `doubts` names them
    """

    text: str
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    temperature: float
    warnings: list[str]


def max_tokens(seconds: float) -> int:
    """A bound for the answer to `seconds` of audio, so that a loop ends; speech takes 2 to 10 tokens a second.

    Raises:
        ValueError: `seconds` is not above 0
    """
    _check(seconds, 0)
    return TOKENS_AT_LEAST + round(TOKENS_PER_S * seconds)


def compression_ratio(text: str) -> float:
    """UTF-8 bytes over zlib-compressed bytes, as in openai/whisper's utils.py; 0 for no text."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def doubts(decoded: Decoded, seconds: float, speech_s: float) -> list[str]:
    """What is wrong with an answer, of these; nothing, as a rule.

        looping        it repeats itself, and faster than one speaks, or until it ran into its bound
        too_much_text  more than can be said in the time
        no_speech      text, although there is no speech
        cut_off        it ran into its bound
        too_little     the text has not even a slow speaker's words: a sentence is missing

    Args:
        seconds: length of the audio
        speech_s: seconds of speech in it

    Raises:
        ValueError: `seconds` is not above 0, or `speech_s` is below 0
    """
    _check(seconds, speech_s)
    units, room_s = _units(decoded.text), min(seconds, speech_s + SLACK_S)
    cut_off = decoded.finish_reason == "length"
    repeats, too_fast = _loop(units) is not None, _spoken_s(units, BRISK) > room_s
    found = []
    if (repeats and cut_off) or (too_fast and (repeats or compression_ratio(decoded.text) > MAX_COMPRESSION)):
        found.append("looping")
    if speech_s < MIN_SPEECH_S:
        found += ["no_speech"] if decoded.text.strip() else []
    elif _spoken_s(units, FASTEST) > room_s:
        found.append("too_much_text")
    elif units and not cut_off and speech_s > max(JUDGED_S, _spoken_s(units, SLOWEST)):
        found.append("too_little")
    return found + ["cut_off"] if cut_off else found


async def transcribe(
    samples: Samples,
    seconds: float,
    speech_s: float,
    decode: Callable[[Samples, float], Awaitable[Decoded]],
    split: Callable[[Samples], list[Samples]],
    max_tries: int = MAX_TRIES,
) -> Guarded:
    """Decodes a segment; as long as the answer is in doubt, again: in shorter windows, then sampled ever more freely.

    The answer with the fewest doubts is kept, then the likeliest, then the one that repeats itself least. A looping
    tail is shortened to what the audio has time for. Text that is left although there is no speech is dropped if the
    model was unsure of it too. Nothing else is taken away. What `decode` raises, and cancellation, passes through.

    Args:
        samples: the segment, passed on as it is
        seconds: its length
        speech_s: seconds of speech in it
        decode: samples and temperature (0: greedy) to an answer, which it bounds by `max_tokens`
        split: samples to shorter ones in order, cut where it is quietest; to one alone if they are too short to cut
        max_tries: of the whole segment, at least 1

    Raises:
        ValueError: `seconds` is not above 0, `speech_s` is below 0, or `max_tries` below 1
    """
    _check(seconds, speech_s)
    if max_tries < 1:
        raise ValueError(f"expected at least 1 try, got {max_tries}")
    tries: list[tuple[Decoded, list[str], float]] = []
    for temperature, in_windows in ((0.0, False), (0.0, True), *((t, False) for t in TEMPERATURES)):
        if temperature and set(tries[-1][1]) <= {"too_little"}:
            break  # sampling finds no sentence that windows have not found, but may invent one
        windows = split(samples) if in_windows else [samples]
        if in_windows and len(windows) < 2:
            continue
        decoded = _joined([await decode(window, temperature) for window in windows])
        tries.append((decoded, doubts(decoded, seconds, speech_s), temperature))
        if not tries[-1][1] or len(tries) == max_tries:
            break
    decoded, warnings, temperature = min(tries, key=_rank)
    text = decoded.text
    if "looping" in warnings:
        text = _shortened(text, min(seconds, speech_s + SLACK_S))
    if "no_speech" in warnings and decoded.avg_logprob < UNSURE_LOGPROB:
        text = ""
    no_speech_prob = 1 - min(speech_s / seconds, 1.0)
    return Guarded(text, decoded.avg_logprob, compression_ratio(text), no_speech_prob, temperature, warnings)


def _check(seconds: float, speech_s: float) -> None:
    if not (seconds > 0 and speech_s >= 0):
        raise ValueError(f"expected more than 0 s of audio and no less than 0 s of speech, got {seconds} s and {speech_s} s")


def _rank(tried: tuple[Decoded, list[str], float]) -> tuple[int, float, float]:
    """The lowest is the best."""
    decoded, found, _ = tried
    return len(found), -decoded.avg_logprob, compression_ratio(decoded.text)


def _joined(parts: list[Decoded]) -> Decoded:
    """The answers to windows that follow one another as one, with a space between words but not between CJK characters."""
    if len(parts) == 1:
        return parts[0]
    text = ""
    for part in filter(None, (part.text.strip() for part in parts)):
        tight = not text or NO_SPACE.match(text[-1]) or NO_SPACE.match(part)
        text += part if tight else f" {part}"
    token_ids = [token for part in parts for token in part.token_ids]
    logprob = sum(part.avg_logprob * len(part.token_ids) for part in parts) / max(len(token_ids), 1)
    cut_off = any(part.finish_reason == "length" for part in parts)
    return Decoded(text, token_ids, logprob, "length" if cut_off else "stop")


def _units(text: str) -> list[str]:
    """Words in lower case, of at most 20 letters or digits, and single CJK characters; no punctuation."""
    return UNIT.findall(text.lower())


def _spoken_s(units: list[str], rates: tuple[float, float]) -> float:
    """Seconds that it takes to say them at `rates` of words and of CJK characters."""
    characters = sum(NO_SPACE.match(unit) is not None for unit in units)
    return (len(units) - characters) / rates[0] + characters / rates[1]


def _loop(units: list[str]) -> tuple[int, int] | None:
    """Where the longest tail that says the same at least `MIN_REPEATS` times begins, and its period, both in units.

    The last unit may be broken off. None if there is no such tail.
    """
    best = None
    for end in (len(units), len(units) - 1):
        for period in range(1, end // MIN_REPEATS + 1):
            if best and period <= end - best[0] and period % best[1] == 0:
                continue  # the same repeats, counted by twos or threes
            if end < len(units) and not units[end - period].startswith(units[end]):
                continue
            begin = end - period
            while begin > 0 and units[begin - 1] == units[begin - 1 + period]:
                begin -= 1
            if end - begin >= MIN_REPEATS * period and (best is None or begin < best[0]):
                best = begin, period
    return best


def _shortened(text: str, room_s: float) -> str:
    """`text`, its looping tail with as many repeats as can be said in `room_s` and at least one; unchanged if it has none."""
    units = _units(text)
    loop = _loop(units)
    if loop is None:
        return text
    begin, period = loop
    end = begin + period
    while end < len(units) and _spoken_s(units[: end + period], BRISK) <= room_s:
        end += period
    if end >= len(units):
        return text
    return text[: list(UNIT.finditer(text))[end].start()].rstrip(" ,，、")
