"""How much invented text does the guard remove, and does it cost true words? The bundled checkpoint in float32.

Crafted sounds at which a speech model loops or invents are sent twice: in chat, which has no guard (greedy, a bound on the
answer), and as transcriptions, which have it. Invented are the characters that an alignment with what was said adds.
Then clean held-out clips, of which no word may be lost that chat has right.
"""

import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from question import Answer, parser
from rapidfuzz.distance import Levenshtein  # jiwer brings it
from recordings import music, units
from servers import BUNDLED, Server, running
from transcripts import held_out, transcribed, transcripts

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
from sentences import LANGUAGES, held_out_sentence  # noqa: E402
from speech import SAMPLE_RATE, background, mix, non_speech, sample_voice, synthesize  # noqa: E402

IN_FLIGHT = 16
LONGEST_S = 29  # so that either way the clip is heard in one piece


@dataclass(frozen=True)
class Crafted:
    """A sound and what is said in it: (samples,) float32 at 16 kHz."""

    kind: str
    waveform: np.ndarray
    text: str


class Craft:
    """Makes sounds of each kind, one after another, by a seed."""

    def __init__(self, seed: int):
        self.rng, self.np_rng = random.Random(seed), np.random.default_rng(seed)

    def spoken(self) -> tuple[np.ndarray, str]:
        voice = sample_voice(self.rng.choice(LANGUAGES), self.rng, held_out=True)
        text = held_out_sentence(voice.language, self.rng)
        return synthesize(text, voice), text

    def silence(self) -> tuple[np.ndarray, str]:
        """A sentence lost in silence."""
        speech, text = self.spoken()
        lead, tail = (np.zeros(round(self.rng.uniform(3, 10) * SAMPLE_RATE), np.float32) for _ in range(2))
        return np.concatenate([lead, speech, tail]), text

    def only_silence(self) -> tuple[np.ndarray, str]:
        level = self.rng.choice((0, 1e-5, 1e-4, 1e-3))
        return (level * self.np_rng.standard_normal(round(self.rng.uniform(0.5, 25) * SAMPLE_RATE))).astype(np.float32), ""

    def tones(self) -> tuple[np.ndarray, str]:
        """Chords with a melody, or syllable-like beeps: pitch and rhythm of speech."""
        seconds = self.rng.uniform(1, 20)
        if self.rng.random() < 0.5:
            return music(self.np_rng, seconds), ""
        time_s = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        pitch_hz = self.rng.uniform(90, 250) * (1 + 0.2 * np.sin(2 * np.pi * self.rng.uniform(0.3, 2) * time_s))
        phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE
        voice = sum(np.sin(k * phase) / k for k in range(1, 12))
        syllables = np.clip(np.sin(2 * np.pi * self.rng.uniform(2, 6) * time_s), 0, 1)
        return (0.1 * voice * syllables).astype(np.float32), ""

    def noise(self) -> tuple[np.ndarray, str]:
        seconds = self.rng.uniform(1, 20)
        return (non_speech if self.rng.random() < 0.5 else _gusts)(self.np_rng, seconds), ""

    def drowned(self) -> tuple[np.ndarray, str]:
        """A sentence in noise louder than itself."""
        speech, text = self.spoken()
        speech = np.pad(speech, SAMPLE_RATE)
        return mix(speech, background(self.rng.choice(("hiss", "rumble", "hum")), speech.size, self.np_rng), self.rng.uniform(-10, 0)), text

    def repetition(self) -> tuple[np.ndarray, str]:
        """A sentence said over and over."""
        speech, text = self.spoken()
        times = self.rng.randint(3, max(3, int(LONGEST_S * SAMPLE_RATE / speech.size) - 1))
        times = min(times, int(LONGEST_S * SAMPLE_RATE / speech.size))
        return np.tile(speech, times), " ".join([text] * times)

    def stutter(self) -> tuple[np.ndarray, str]:
        """A quarter of a second over and over, as a broken stream has it, behind a sentence."""
        speech, text = self.spoken()
        begin = self.rng.randrange(max(1, speech.size - SAMPLE_RATE // 2))
        stuck = np.tile(speech[begin : begin + SAMPLE_RATE // 4], self.rng.randint(10, 60))
        return np.concatenate([speech, stuck])[: LONGEST_S * SAMPLE_RATE], text

    def cut_off(self) -> tuple[np.ndarray, str]:
        """The beginning of a sentence, which ends in the midst of a word."""
        speech, text = self.spoken()
        return speech[: round(self.rng.uniform(0.05, 0.8) * speech.size)], text

    def backwards(self) -> tuple[np.ndarray, str]:
        return self.spoken()[0][::-1].copy(), ""


KINDS: dict[str, Callable[[Craft], tuple[np.ndarray, str]]] = {
    name: getattr(Craft, name)
    for name in ("silence", "only_silence", "tones", "noise", "drowned", "repetition", "stutter", "cut_off", "backwards")
}


def _gusts(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """(samples,) float32: noise in bursts as long as syllables."""
    sound = background("hiss", round(seconds * SAMPLE_RATE), rng)
    time_s = np.arange(sound.size) / SAMPLE_RATE
    return (0.1 * sound * np.clip(np.sin(2 * np.pi * rng.uniform(1, 6) * time_s), 0, 1)).astype(np.float32)


def crafted(count: int, seed: int) -> list[Crafted]:
    """So many sounds of each kind."""
    craft = Craft(seed)
    return [Crafted(kind, *make(craft)) for kind, make in KINDS.items() for _ in range(count)]


def letters(text: str) -> str:
    return re.sub(r"\W", "", text.lower())


def invented(said: str, text: str) -> int:
    """Characters that are in `text` in addition to what was said."""
    return sum(step.tag == "insert" for step in Levenshtein.editops(letters(said), letters(text)))


def heard(said: str, text: str) -> int:
    """Words and Chinese characters of what was said that `text` has, in their order."""
    return sum(block.size for block in Levenshtein.editops(units(said), units(text)).as_matching_blocks())


def lost(said: str, plain: str, guarded: str) -> int:
    """Words that `plain` has right and `guarded` has not."""
    return max(0, heard(said, plain) - heard(said, guarded))


def both(server: Server, waveforms: list[np.ndarray]) -> tuple[list[str], list[str]]:
    """Texts without and with the guard."""
    return transcripts(server.url, waveforms, IN_FLIGHT), transcribed(server.url, waveforms, IN_FLIGHT)


def main() -> int:
    options = parser(__doc__, sized=False)
    options.add_argument("--each", type=int, default=40, help="sounds of each kind")
    options.add_argument("--clips", type=int, default=400, help="clean ones")
    options.add_argument("--seed", type=int, default=1)
    args = options.parse_args()
    answer, sounds = Answer("guard", args), crafted(args.each, args.seed)
    clean = [clip for clip in held_out.speech_clips(2 * args.clips) if not clip.noisy][: args.clips]
    candidate = replace(BUNDLED, options=("--dtype", "float32", *args.options))
    with answer.attempt(), running(candidate, args.out, args.out) as server:
        texts = list(zip(sounds, *both(server, [sound.waveform for sound in sounds]), strict=True))
        for kind in (*KINDS, "all"):
            some = [(sound.text, *pair) for sound, *pair in texts if kind in (sound.kind, "all")]
            before, after = (sum(invented(said, pair[way]) for said, *pair in some) for way in (0, 1))
            answer.add(
                {"sounds": kind, "number": len(some), "invented": before, "with the guard": after,
                 "removed %": 100 * (1 - after / before) if before else None, "words lost": sum(lost(*one) for one in some)},
                texts=[one for one in some if invented(one[0], one[1]) or invented(one[0], one[2])],
            )  # fmt: skip
        plain, guarded = both(server, [clip.waveform for clip in clean])
        losses = [(clip.text, *pair) for clip, *pair in zip(clean, plain, guarded, strict=True) if lost(clip.text, *pair)]
        before, after = (sum(invented(clip.text, text) for clip, text in zip(clean, some, strict=True)) for some in (plain, guarded))
        answer.add(
            {"sounds": "clean speech", "number": len(clean), "invented": before, "with the guard": after, "removed %": None,
             "words lost": sum(lost(*one) for one in losses)},
            texts=losses,
        )  # fmt: skip
    return int(answer.failed)


if __name__ == "__main__":
    sys.exit(main())
