"""Recordings of any length whose sentences and times are known, written as they are spoken, and what a transcript has of them.

Held-out sentences (training/held_out.py) with pauses between them, in which there is nothing, noise, or music.
"""

import random
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
from rapidfuzz.distance import Levenshtein

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
from held_out import normalize  # noqa: E402
from sentences import LANGUAGES, held_out_sentence  # noqa: E402
from speech import SAMPLE_RATE, non_speech, sample_voice, synthesize  # noqa: E402

SHORT_PAUSES_S, PAUSES_S = (0.2, 0.4), (0.7, 3.0)  # before one sentence in GO_ON_ONE_IN the pause is short: the speaker goes on
GO_ON_ONE_IN = 5
SOUND_EDGE_S = 0.3  # without sound before and after noise or music
LOUD = 0.02  # of a sentence's peak: where its sound begins and ends
NOTES_HZ = 220.0 * 2 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16]) / 12)  # pentatonic, from A3
NEAR_S = 0.3
PRESENT, TWICE = 0.5, 0.5  # share of a sentence that is found, or found once more
UNIT = re.compile(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+")


@dataclass(frozen=True)
class Sentence:
    """What is said and in which samples of the recording; `begin` to `end` is the clip, the sound lies within it."""

    text: str
    language: str
    begin: int
    end: int
    sound_begin_s: float
    sound_end_s: float


def music(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """(samples,) float32: chords of three notes with overtones, each struck anew and fading, over a slow beat."""
    time_s = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    beat_s, sound = rng.uniform(0.25, 0.6), np.zeros(time_s.size)
    for begin_s in np.arange(0, seconds, beat_s):
        here = (time_s >= begin_s) & (time_s < begin_s + beat_s)
        since_s = time_s[here] - begin_s
        for note_hz in rng.choice(NOTES_HZ, 3, replace=False):
            overtones = sum(np.sin(2 * np.pi * k * note_hz * since_s) / k**2 for k in (1, 2, 3))
            sound[here] += overtones * np.exp(-3 * since_s) * np.minimum(1, since_s / 0.01)
    return (rng.uniform(0.01, 0.1) * sound).astype(np.float32)


def between(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """(samples,) float32 of a pause: nothing, or music or one of training's noises with silence around it."""
    pause, edge = np.zeros(round(seconds * SAMPLE_RATE), np.float32), round(SOUND_EDGE_S * SAMPLE_RATE)
    kind, inner = rng.choice(3), pause.size - 2 * edge
    if kind and inner > 0:
        made = (music if kind == 1 else non_speech)(rng, inner / SAMPLE_RATE)
        pause[edge : edge + made.size] = made
    return pause


def write(path: Path, seconds: float, seed: int) -> list[Sentence]:
    """Writes a 16-bit file of about so many seconds, one sentence held at a time; its kind is by the path's ending."""
    rng, np_rng, sentences, place, voice = random.Random(seed), np.random.default_rng(seed), [], 0, None
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, "PCM_16" if path.suffix in (".wav", ".flac") else None) as out:
        while place < seconds * SAMPLE_RATE:
            goes_on = voice is not None and rng.randrange(GO_ON_ONE_IN) == 0
            pause = between(np_rng, rng.uniform(*(SHORT_PAUSES_S if goes_on else PAUSES_S)))
            voice = voice if goes_on else sample_voice(rng.choice(LANGUAGES), rng, held_out=True)
            text = held_out_sentence(voice.language, rng)
            speech = synthesize(text, voice)
            loud = np.flatnonzero(np.abs(speech) > LOUD * np.abs(speech).max())
            begin = place + pause.size
            place = begin + speech.size
            edges = ((begin + loud[0]) / SAMPLE_RATE, (begin + loud[-1] + 1) / SAMPLE_RATE)
            sentences.append(Sentence(text, voice.language, begin, place, *edges))
            out.write(pause)
            out.write(speech)
        out.write(between(np_rng, PAUSES_S[1]))
    return sentences


def clip(path: Path, sentence: Sentence) -> np.ndarray:
    """(samples,) float32: the sentence alone, read from the recording."""
    return soundfile.read(path, start=sentence.begin, stop=sentence.end, dtype="float32")[0]


def cut(path: Path, sentence: Sentence, file: BinaryIO) -> None:
    """Writes the sentence alone into `file`, as a WAV that keeps every bit, and goes back to its beginning."""
    soundfile.write(file, clip(path, sentence), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    file.seek(0)


def units(text: str) -> list[str]:
    """Words, and single Chinese characters, without case and punctuation."""
    return UNIT.findall(normalize(text))


@dataclass(frozen=True)
class Score:
    """A transcript beside the sentences.

    Attributes:
        wer: wrong, missing and added words and Chinese characters, in percent of those spoken
        missing: sentences of which less than half was found
        twice: places where half a sentence or more was added
        wrong: the sentences that are not as spoken
    """

    wer: float
    missing: list[str]
    twice: list[str]
    wrong: list[str]


def score(sentences: Iterable[Sentence], text: str) -> Score:
    """Lays the transcript of all sentences beside them, unit by unit."""
    sentences = list(sentences)
    spoken = [units(sentence.text) for sentence in sentences]
    owner = [number for number, some in enumerate(spoken) for _ in some]
    reference, found = [unit for some in spoken for unit in some], units(text)
    hits, errors, added, changed = np.array([len(some) for some in spoken]), 0, {}, set()
    for step in Levenshtein.editops(reference, found):
        errors += 1
        number = owner[min(step.src_pos, len(owner) - 1)]
        if step.tag == "insert":
            added.setdefault(step.src_pos, []).append(found[step.dest_pos])
        else:
            hits[number] -= 1
        changed.add(number)
    missing = [sentence.text for sentence, some, left in zip(sentences, spoken, hits, strict=True) if left < PRESENT * len(some)]
    least = {place: TWICE * len(spoken[owner[min(place, len(owner) - 1)]]) for place in added}
    twice = [" ".join(some) for place, some in added.items() if len(some) > 1 and len(some) >= least[place]]
    return Score(100 * errors / len(reference), missing, twice, [sentences[number].text for number in sorted(changed)])


def time_errors(sentences: list[Sentence], segments: list[tuple[float, float]]) -> np.ndarray:
    """(segments, 2) seconds between each segment's start and the nearest sentence's, and the same for the ends."""
    found = np.array(segments)  # (segments, 2)
    truth = np.array([(one.sound_begin_s, one.sound_end_s) for one in sentences])  # (sentences, 2)
    return np.stack([np.abs(found[:, None, edge] - truth[None, :, edge]).min(axis=1) for edge in (0, 1)], axis=1)
