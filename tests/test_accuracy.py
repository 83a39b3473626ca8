"""The bundled checkpoint on held-out clips: the same text from server and reference, alone or in a crowd, and the error rates.

The bounds stand a little above what this checkpoint reaches, so that a fault in the path shows; the
figures are printed.
"""

import held_out
import numpy as np
import pytest
from clients import DESCRIBE, WAVS, Reference, ask, ask_all, expected_text
from conftest import Server

SPEECH_CLIPS, SILENT_CLIPS, CROWD = 400, 100, 64
MAX_WER, MAX_CER = 2.0, 2.0  # percent
MIN_DESCRIBED = 95.0  # percent of clips, each attribute
MIN_SILENT = 98.0  # percent


@pytest.fixture(scope="module")
def clips() -> list[held_out.Clip]:
    return held_out.speech_clips(SPEECH_CLIPS)


@pytest.fixture(scope="module")
def waveforms(clips) -> list[np.ndarray]:
    return [clip.waveform for clip in clips]


@pytest.fixture(scope="module")
def texts(server: Server, waveforms) -> list[str]:
    return ask_all(server, waveforms)


def test_the_reference_gives_the_same_text_on_all_clips(texts, waveforms):
    reference = Reference().ask_all(waveforms)
    different = [(ours, theirs) for ours, theirs in zip(texts, reference, strict=True) if ours != theirs]
    print(f"same text in {len(texts) - len(different)} of {len(texts)} clips")
    assert not different


def test_the_reference_gives_the_samples_their_text():
    assert Reference().ask_all([str(wav) for wav in WAVS]) == [expected_text(wav) for wav in WAVS]


def test_a_clip_has_the_same_text_alone_and_in_a_crowd(server: Server, texts, waveforms):
    """64 clips, the shortest and the longest among them, one by one; `texts` came 64 at a time."""
    order = sorted(range(len(waveforms)), key=lambda i: waveforms[i].size)
    chosen = order[:: len(order) // CROWD][:CROWD]
    alone = [ask(server, waveforms[i]) for i in chosen]
    same = sum(text == texts[i] for text, i in zip(alone, chosen, strict=True))
    print(f"same text alone and in a crowd: {same} of {CROWD}")
    assert same == CROWD


def test_speech_is_transcribed(clips, texts):
    rates = held_out.error_rates(clips, texts)
    for noisy in (False, True):
        chosen = [i for i, clip in enumerate(clips) if clip.noisy == noisy]
        some = held_out.error_rates([clips[i] for i in chosen], [texts[i] for i in chosen])
        print("noisy" if noisy else "clean", {name: f"{rate:.2f} %" for name, rate in some.items()})
    print("all", {name: f"{rate:.2f} %" for name, rate in rates.items()})
    assert rates["WER"] <= MAX_WER and rates["CER"] <= MAX_CER


def test_speech_is_described(server: Server, clips, waveforms):
    shares = held_out.attribute_accuracy(clips, ask_all(server, waveforms, DESCRIBE))
    print({name: f"{share:.1f} %" for name, share in shares.items()})
    assert {name: share for name, share in shares.items() if share < MIN_DESCRIBED} == {}


def test_silence_noise_and_tones_have_no_text(server: Server):
    answers = ask_all(server, [clip.waveform for clip in held_out.non_speech_clips(SILENT_CLIPS)])
    silent = 100 * sum(not text.strip() for text in answers) / SILENT_CLIPS
    print(f"no text for {silent:.0f} % of {SILENT_CLIPS} sounds without speech")
    assert silent >= MIN_SILENT
