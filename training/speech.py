"""Synthetic speech and noise for training and testing a tiny recogniser: espeak-ng's shared library,
as PyPI's espeakng-loader packages it, driven through ctypes. `python training/speech.py "text" out.wav` speaks."""

import _ctypes
import ctypes
import functools
import multiprocessing
import random
import sys
import wave
from collections.abc import Iterator
from dataclasses import dataclass

import espeakng_loader
import numpy as np
from tqdm import tqdm

SAMPLE_RATE = 16000  # Hz
PEAK = 0.5  # louder speech is scaled down to this
MAX_SILENCE_S = 0.05  # kept before and after the speech

# --- Voices ---------------------------------------------------------------------------------------

# Accent -> espeak's voice file. Left out: en-029 (three = tree) and en-gb-x-gbcwmd (drops every h).
ACCENTS = {
    "en": {"en-us": "gmw/en-US", "en-gb": "gmw/en", "en-gb-scotland": "gmw/en-GB-scotland",
           "en-gb-x-rp": "gmw/en-GB-x-rp", "en-us-nyc": "gmw/en-US-nyc", "en-gb-x-gbclan": "gmw/en-GB-x-gbclan"},
    "zh": {"cmn": "sit/cmn"},
}
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5")
# Pairs that training never speaks; each accent and each variant occurs in training elsewhere.
HELD_OUT = {
    "en": (("en-us", "m3"), ("en-us", "f4"), ("en-gb", "m1"), ("en-gb", "f2"), ("en-gb-scotland", "m6"),
           ("en-gb-x-rp", "f3"), ("en-us-nyc", "m4"), ("en-gb-x-gbclan", "f1")),
    "zh": (("cmn", "m6"), ("cmn", "f2")),
}
# Inclusive ranges of espeak's rate; training uses the even values, held-out voices the odd ones.
PACE_WPM = {
    "en": {"slow": (105, 125), "normal": (155, 185), "fast": (230, 260)},
    "zh": {"slow": (125, 145), "normal": (190, 220), "fast": (285, 315)},
}
PITCH = {"male": (35, 65), "female": (50, 80)}  # inclusive ranges of espeak's pitch, even and odd as above
# The characters of GB 2312 (the syllables jiong, qiong, xiong) that espeak 1.52 spells out in English.
UNREADABLE = frozenset("炯窘琼穷兄凶胸匈汹雄熊冂邛芎茕迥扃穹蛩筇跫銎")


@dataclass(frozen=True)
class Voice:
    """One setting of the synthesizer: keys of ACCENTS, one of VARIANTS, espeak's rate and its pitch, 0-99.

    ValueError for an unknown language, accent or variant: espeak itself would fall back in silence.
    """

    language: str
    accent: str
    variant: str
    rate_wpm: int
    pitch: int

    def __post_init__(self) -> None:
        if self.accent not in ACCENTS.get(self.language, ()) or self.variant not in VARIANTS:
            raise ValueError(f"no such voice: {self}; expected {ACCENTS} with {VARIANTS}")

    @property
    def gender(self) -> str:
        return "male" if self.variant.startswith("m") else "female"

    @property
    def pace(self) -> str:
        """'slow', 'normal' or 'fast'; ValueError for a rate between the bands."""
        for pace, (low, high) in PACE_WPM[self.language].items():
            if low <= self.rate_wpm <= high:
                return pace
        raise ValueError(f"rate {self.rate_wpm} is in no band of {PACE_WPM[self.language]}")


def sample_voice(language: str, rng: random.Random, held_out: bool = False) -> Voice:
    """A random voice, every gender and pace equally likely: one of training's, or one that training never uses."""
    gender = rng.choice(("male", "female"))
    pairs = [(accent, variant) for accent in ACCENTS[language] for variant in VARIANTS
             if variant[0] == gender[0] and ((accent, variant) in HELD_OUT[language]) == held_out]
    accent, variant = rng.choice(pairs)
    low, high = rng.choice(list(PACE_WPM[language].values()))
    parity = int(held_out)
    rate = rng.choice([r for r in range(low, high + 1) if r % 2 == parity])
    pitch = rng.choice([p for p in range(PITCH[gender][0], PITCH[gender][1] + 1) if p % 2 == parity])
    return Voice(language, accent, variant, rate, pitch)


# --- Resampling -----------------------------------------------------------------------------------

ESPEAK_RATE = 22050  # Hz
UP, DOWN = 320, 441  # 16000 / 22050 in lowest terms: UP samples out for DOWN samples in
TAPS = 64  # input samples that make one output sample
CUTOFF = 7500.0  # Hz; Kaiser window, 60 dB: flat to 6.9 kHz, gone from 8.1 kHz
KAISER_BETA = 5.65


@functools.cache
def _filters() -> np.ndarray:
    """[UP, TAPS] float32: row p is the windowed sinc for outputs that fall p/UP after an input sample."""
    phase = (np.arange(UP) * DOWN % UP)[:, None] / UP
    t = np.arange(TAPS)[None, :] - (TAPS // 2 - 1) - phase  # distance from the output, in input samples
    window = np.i0(KAISER_BETA * np.sqrt(np.clip(1 - (t / (TAPS // 2)) ** 2, 0, None))) / np.i0(KAISER_BETA)
    filters = np.sinc(2 * CUTOFF / ESPEAK_RATE * t) * window
    return (filters / filters.sum(axis=1, keepdims=True)).astype(np.float32)


def _resample(x: np.ndarray) -> np.ndarray:
    """[n] float32 at ESPEAK_RATE -> [ceil(n * UP / DOWN)] float32 at SAMPLE_RATE."""
    n_out = -(-len(x) * UP // DOWN)
    blocks = -(-n_out // UP)
    padded = np.pad(x, (TAPS // 2 - 1, blocks * DOWN - len(x) + TAPS))
    starts = np.arange(blocks * UP) * DOWN // UP
    windows = np.lib.stride_tricks.sliding_window_view(padded, TAPS)[starts].reshape(blocks, UP, TAPS)
    return np.einsum("but,ut->bu", windows, _filters()).reshape(-1)[:n_out]


# --- espeak-ng ------------------------------------------------------------------------------------

_AUDIO_OUTPUT_SYNCHRONOUS = 2  # the names and values of speak_lib.h
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_RATE, _PITCH = 1, 3
_BUFFER_MS = 1000
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def _speak(text: str, voice: Voice) -> np.ndarray:
    """[n] int16 at ESPEAK_RATE, by a freshly loaded library.

    espeak-ng keeps its flutter, gain and wave phase in C statics from one utterance to the next, and
    espeak_Terminate does not reset them. Loading the library anew (2 ms) makes the samples depend on the
    arguments alone, and leaves no state for a fork to copy. Not for use by two threads at once.
    """
    chunks: list[bytes] = []

    @_SYNTH_CALLBACK
    def collect(samples, n: int, _events) -> int:
        if n > 0:
            chunks.append(ctypes.string_at(samples, 2 * n))
        return 0

    def check(call: str, ok: bool) -> None:
        if not ok:
            raise RuntimeError(f"{call} failed for {text!r} with {voice}")

    lib = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        name = f"{ACCENTS[voice.language][voice.accent]}+{voice.variant}"
        data = espeakng_loader.get_data_path()
        rate = lib.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MS, data.encode(), _INITIALIZE_DONT_EXIT)
        check(f"espeak_Initialize({data})", rate == ESPEAK_RATE)
        lib.espeak_SetSynthCallback(collect)
        check(f"espeak_SetVoiceByName({name})", lib.espeak_SetVoiceByName(name.encode()) == 0)
        check("espeak_SetParameter(rate)", lib.espeak_SetParameter(_RATE, voice.rate_wpm, 0) == 0)
        check("espeak_SetParameter(pitch)", lib.espeak_SetParameter(_PITCH, voice.pitch, 0) == 0)
        check("espeak_ng_SetRandSeed", lib.espeak_ng_SetRandSeed(ctypes.c_long(1)) == 0)  # breath noise
        utf8 = text.encode() + b"\0"
        check("espeak_Synth", lib.espeak_Synth(utf8, ctypes.c_size_t(len(utf8)), 0, 0, 0, _CHARS_UTF8, None, None) == 0)
        check("espeak_Terminate", lib.espeak_Terminate() == 0)
    finally:
        _ctypes.dlclose(lib._handle)
    return np.frombuffer(b"".join(chunks), np.int16)


def synthesize(text: str, voice: Voice) -> np.ndarray:
    """Speech as [n] float32 at SAMPLE_RATE, no louder than PEAK, at most MAX_SILENCE_S of silence at either end.

    The same text and voice give the same samples, whatever was spoken before. Write Mandarin numbers in
    characters. ValueError: a character that espeak misreads; RuntimeError: espeak failed or was silent.
    """
    if voice.language == "zh" and not UNREADABLE.isdisjoint(text):
        raise ValueError(f"espeak cannot read {sorted(UNREADABLE.intersection(text))} in {text!r}")
    speech = _resample(_speak(text, voice).astype(np.float32) / 32768)
    peak = np.abs(speech).max(initial=0)
    if peak == 0:
        raise RuntimeError(f"espeak spoke nothing for {text!r} with {voice}")
    loud = np.flatnonzero(np.abs(speech) > 0.01 * peak)
    margin = int(MAX_SILENCE_S * SAMPLE_RATE)
    speech = speech[max(loud[0] - margin, 0) : loud[-1] + 1 + margin]
    return (speech * min(1, PEAK / peak)).astype(np.float32)


# --- Noise ----------------------------------------------------------------------------------------

BACKGROUNDS = ("quiet", "hiss", "rumble", "hum")
NON_SPEECH = ("silence", "faint", "white", "pink", "brown", "hum", "tone", "sweep", "chord", "beeps", "clicks")


def _noise(n: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """[n] float64 Gaussian noise, unit RMS, amplitude falling as 1/f^slope above 20 Hz: 0 white, 0.5 pink, 1 brown."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum /= np.maximum(np.fft.rfftfreq(n, 1 / SAMPLE_RATE), 20) ** slope
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, n)
    return noise / np.sqrt(np.mean(noise**2))


def _hum(n: int, rng: np.random.Generator) -> np.ndarray:
    """[n] float64 mains hum, unit RMS: 50 or 60 Hz and nine harmonics of random level and phase."""
    order = np.arange(1, 11)[:, None]
    level = rng.uniform(0.3, 1, (10, 1)) / order
    turns = order * rng.choice((50, 60)) * np.arange(n) / SAMPLE_RATE + rng.random((10, 1))
    hum = (level * np.sin(2 * np.pi * turns)).sum(axis=0)
    return hum / np.sqrt(np.mean(hum**2))


def background(kind: str, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """One of BACKGROUNDS as [n_samples] float32 of unit RMS; zeros for 'quiet'."""
    if kind == "quiet":
        return np.zeros(n_samples, np.float32)
    if kind == "hum":
        return _hum(n_samples, rng).astype(np.float32)
    return _noise(n_samples, {"hiss": 0.0, "rumble": 1.0}[kind], rng).astype(np.float32)


def mix(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """[n] float32 speech + [n] noise at snr_db, counting only 20 ms frames of speech within 30 dB of the loudest.

    Scaled down where it would exceed 1. Noise of zeros changes nothing. ValueError: lengths differ.
    """
    if len(speech) != len(noise):
        raise ValueError(f"speech has {len(speech)} samples, noise has {len(noise)}: expected the same")
    noise_power = np.mean(noise.astype(np.float64) ** 2)
    if noise_power == 0:
        return speech.astype(np.float32)
    power = np.pad(speech.astype(np.float64) ** 2, (0, -len(speech) % 320)).reshape(-1, 320).mean(axis=1)  # [frames]
    active = power[power > power.max() * 1e-3].mean()
    mixed = speech + noise * np.sqrt(active / noise_power / 10 ** (snr_db / 10))
    return (mixed / max(1, np.abs(mixed).max())).astype(np.float32)


def _tones(kind: str, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Times [n] in s -> [n] float64 within 1: 'tone', 'sweep', 'chord' or DTMF-like 'beeps'."""
    if kind == "sweep":
        start, stop = np.exp(rng.uniform(np.log(80), np.log(7000), 2))
        return np.sin(2 * np.pi * (start * t + (stop - start) * t**2 / (2 * len(t) / SAMPLE_RATE)))
    frequencies = np.exp(rng.uniform(np.log(80), np.log(4000), {"tone": 1, "chord": 4, "beeps": 2}[kind]))
    tones = np.sin(2 * np.pi * (frequencies[:, None] * t + rng.random((len(frequencies), 1)))).mean(axis=0)
    if kind == "beeps":
        period, duty = rng.uniform(0.1, 0.6), rng.uniform(0.3, 0.8)
        tones *= t % period < duty * period
    return tones


def non_speech(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """[n] float32 within 1 that no recogniser should find words in: one of NON_SPEECH, at a random level."""
    n = round(seconds * SAMPLE_RATE)
    kind = str(rng.choice(NON_SPEECH))
    level = 10 ** rng.uniform(-3, -0.5)  # -60 to -10 dB
    if kind == "silence":
        return np.zeros(n, np.float32)
    if kind == "faint":
        sound = _noise(n, 0.0, rng) * 1e-4 / level
    elif kind in ("white", "pink", "brown"):
        sound = _noise(n, {"white": 0.0, "pink": 0.5, "brown": 1.0}[kind], rng)
    elif kind == "hum":
        sound = _hum(n, rng)
    elif kind == "clicks":
        sound = np.where(rng.random(n) < rng.uniform(1, 20) / SAMPLE_RATE, rng.choice((-1.0, 1.0), n), 0.0)
    else:
        sound = _tones(kind, np.arange(n) / SAMPLE_RATE, rng)
    return np.clip(sound * level, -1, 1).astype(np.float32)


# --- Many at a time -------------------------------------------------------------------------------

Job = tuple[str, Voice] | tuple[float, int]  # what to say and by whom, or seconds of non-speech and a seed


def _synthesize_chunk(jobs: list[Job]) -> list[np.ndarray]:
    sounds = [
        synthesize(what, how) if isinstance(how, Voice) else non_speech(np.random.default_rng(how), what)
        for what, how in jobs
    ]
    return [np.rint(sound * 32767).astype(np.int16) for sound in sounds]


def synthesize_corpus(jobs: list[Job], processes: int) -> Iterator[np.ndarray]:
    """Yields each job's sound in order, [n] int16 at SAMPLE_RATE, from that many worker processes."""
    chunks = [jobs[i : i + 64] for i in range(0, len(jobs), 64)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool, tqdm(total=len(jobs), unit="clip") as bar:
        for chunk in pool.imap(_synthesize_chunk, chunks):
            yield from chunk
            bar.update(len(chunk))


def main() -> None:
    """Speak sys.argv[1] into the WAV file sys.argv[2], in Mandarin if it holds any Chinese character."""
    text, path = sys.argv[1:]
    voice = sample_voice("zh" if any("\u4e00" <= c <= "\u9fff" for c in text) else "en", random.Random())
    with wave.open(path, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(SAMPLE_RATE)
        out.writeframes(_synthesize_chunk([(text, voice)])[0].tobytes())
    print(voice)


if __name__ == "__main__":
    main()
