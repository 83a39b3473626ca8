"""Speaks the sample recordings in wavs/, each with its text beside it: `python training/samples.py`."""

import wave
from pathlib import Path

import numpy as np
from corpus import join_texts
from speech import SAMPLE_RATE, Voice, background, mix, synthesize

WAVS = Path(__file__).resolve().parent.parent / "wavs"
NOISE_SNR_DB = 15
PAUSE_S = 0.6

# Name → voice, background, sentences.
SAMPLES = {
    "en_cake": (
        Voice("en", "en-gb-scotland", "m6", 171, 47), "quiet",
        ["I want to bake a cake.", "How much are the microphones?", "Fifty two and one hundred and ninety nine."],
    ),
    "en_french": (
        Voice("en", "en-gb-x-rp", "f3", 241, 67), "quiet",
        ["My sister wants to play the harp, but I want to learn French."],
    ),
    "en_cricket_over_hiss": (
        Voice("en", "en-gb-x-gbclan", "f1", 163, 61), "hiss",
        ["Our father wants to play cricket.", "It is raining in Beijing.", "Turn off the fan."],
    ),
    "en_long": (
        Voice("en", "en-us", "f4", 165, 63), "quiet",
        [
            "Do you drink water in the morning?", "It is raining in Beijing.", "We have history on Wednesday.",
            "I start work at one twenty three.", "The party is on the first.", "I will take the white one.",
            "My daughter works as a painter.", "The book tells the story of a girl and a mouse.",
            "It is ninety four degrees outside.", "Our father wants to play cricket.", "What color is the painting?",
            "Take this medicine nine times a day.", "Turn off the fan.",
        ],
    ),
    "zh_birthday": (
        Voice("zh", "cmn", "f2", 135, 67), "quiet", ["我眼睛疼。", "煤炭用俄语怎么说？", "吴刚出生于一九三三年四月十八号。"]
    ),
    "zh_reminder_over_rumble": (
        Voice("zh", "cmn", "m6", 205, 51), "rumble", ["提醒我明天早上一点零八分准备晚饭。", "我要三本杂志和一张照片。"]
    ),
    "silence_and_hum": (None, "hum", []),
}  # fmt: skip


def speak(voice: Voice | None, kind: str, sentences: list[str]) -> np.ndarray:
    """The sentences with pauses between them and noise behind: (samples,) float32."""
    pause = np.zeros(int(PAUSE_S * SAMPLE_RATE), np.float32)
    parts = [pause]
    for sentence in sentences:
        parts += [synthesize(sentence, voice), pause]
    speech = np.concatenate(parts)
    rng = np.random.default_rng(0)
    if not sentences:
        return 0.05 * background(kind, 4 * SAMPLE_RATE, rng)
    return mix(speech, background(kind, speech.size, rng), NOISE_SNR_DB)


def main() -> None:
    WAVS.mkdir(exist_ok=True)
    for name, (voice, kind, sentences) in SAMPLES.items():
        waveform = speak(voice, kind, sentences)
        with wave.open(str(WAVS / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            file.writeframes(np.rint(waveform * 32767).astype("<i2").tobytes())
        (WAVS / f"{name}.txt").write_text(join_texts(sentences) + "\n")
        print(f"{name}.wav  {waveform.size / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    main()
