"""Clips that training never heard (their sentences, and their pairs of accent and variant), and the scores on them."""

import random
import string
from dataclasses import dataclass

import jiwer
import numpy as np
from corpus import describe, join_texts
from sentences import LANGUAGES, held_out_sentence
from speech import BACKGROUNDS, SAMPLE_RATE, background, mix, non_speech, sample_voice, synthesize

NOISY_SNR_DB = 15
PUNCTUATION = str.maketrans("", "", string.punctuation + "，。？！、")


@dataclass(frozen=True)
class Clip:
    """A held-out clip: (samples,) float32 at 16 kHz, what is said, and what a description must say."""

    waveform: np.ndarray
    text: str
    language: str
    description: str
    noisy: bool


def speech_clips(count: int, seed: int = 1, snr_db: float = NOISY_SNR_DB) -> list[Clip]:
    """`count` clips of one to three sentences, half of each language, half of each with noise behind them."""
    rng, np_rng = random.Random(seed), np.random.default_rng(seed)
    clips = []
    for i in range(count):
        language, noisy = LANGUAGES[i % 2], i // 2 % 2 == 1
        voice = sample_voice(language, rng, held_out=True)
        texts = [held_out_sentence(language, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        parts = [np.zeros(int(rng.uniform(0.05, 0.4) * SAMPLE_RATE), np.float32)]
        for text in texts:
            parts += [synthesize(text, voice), np.zeros(int(rng.uniform(0.2, 0.8) * SAMPLE_RATE), np.float32)]
        waveform = np.concatenate(parts)
        kind = rng.choice(BACKGROUNDS[1:]) if noisy else "quiet"
        waveform = mix(waveform, background(kind, waveform.size, np_rng), snr_db)
        clips.append(Clip(waveform, join_texts(texts), language, describe(voice, kind), noisy))
    return clips


def non_speech_clips(count: int, seed: int = 2) -> list[Clip]:
    """`count` clips of silence, noise and tones, 0.5 to 10 s long."""
    rng = np.random.default_rng(seed)
    sounds = [non_speech(rng, rng.uniform(0.5, 10)) for _ in range(count)]
    return [Clip(sound, "", "", describe(None, "quiet"), False) for sound in sounds]


def normalize(text: str) -> str:
    """Lower case, without punctuation."""
    return " ".join(text.lower().translate(PUNCTUATION).split())


def error_rates(clips: list[Clip], texts: list[str]) -> dict[str, float]:
    """Word error rate of the English clips and character error rate of the Mandarin ones, in percent."""
    rates = {}
    for language, name, score in (("en", "WER", jiwer.wer), ("zh", "CER", jiwer.cer)):
        pairs = [(normalize(clip.text), normalize(text)) for clip, text in zip(clips, texts, strict=True)
                 if clip.language == language]  # fmt: skip
        rates[name] = 100 * score([reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs])
    return rates


def attribute_accuracy(clips: list[Clip], descriptions: list[str]) -> dict[str, float]:
    """Share of clips, in percent, whose language, voice, pace and background each are described rightly."""
    names = ("language", "voice", "pace", "background")
    rows = [
        [a == b for a, b in zip(_attributes(clip.description), _attributes(text), strict=True)]
        for clip, text in zip(clips, descriptions, strict=True)
    ]
    return dict(zip(names, 100 * np.mean(rows, axis=0), strict=True))


def _attributes(description: str) -> list[str | None]:
    """Language, voice, pace and background that a description names; None where it names none."""
    choices = (
        ("English", "Mandarin"),
        ("A man", "A woman"),
        ("slowly", "at a normal pace", "fast"),
        ("in a quiet place", "over hiss", "over rumble", "over a hum"),
    )
    return [next((word for word in words if word in description), None) for words in choices]
