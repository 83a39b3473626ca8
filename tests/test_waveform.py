"""model/waveform_glmasr.py: token counts against transformers' native processor, cuts at pauses, refused waveforms."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT
from transformers import AutoTokenizer, GlmAsrProcessor, WhisperFeatureExtractor

from model.waveform_glmasr import AudioGeometry, check_waveform, split_windows, window_starts

RATE = 16000
GEOMETRY = AudioGeometry(sampling_rate=RATE, hop_length=160, window_s=30, merge_factor=4)
SMALL = AudioGeometry(sampling_rate=8000, hop_length=80, window_s=10, merge_factor=2)
STEP = RATE // 100  # 10 ms


@pytest.fixture(scope="module")
def native() -> GlmAsrProcessor:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    return GlmAsrProcessor(WhisperFeatureExtractor(feature_size=128), tokenizer, audio_token="<|audio|>")


def native_count(native: GlmAsrProcessor, num_samples: int) -> int:
    """As GlmAsrProcessor._process_audio counts: the frames of all 30 s windows, together."""
    windows = [min(30 * RATE, num_samples - begin) for begin in range(0, num_samples, 30 * RATE)]
    return int(native._get_audio_token_length(torch.tensor(sum(window // 160 for window in windows))))


def noise(num_samples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, num_samples).astype(np.float32)


def bursts(seed: int, pause_s: float) -> tuple[np.ndarray, np.ndarray]:
    """About 100 s of noise in bursts of 2 to 6 s with silences between, and where it is silent."""
    rng = np.random.default_rng(seed)
    parts = []
    while sum(len(part) for part in parts) < 100 * RATE:
        parts += [np.full(int(rng.uniform(2, 6) * RATE), rng.uniform(0.02, 0.5)), np.zeros(int(pause_s * RATE))]
    level = np.concatenate(parts)
    return (level * rng.standard_normal(level.size)).astype(np.float32), level == 0


def test_every_length_from_a_tenth_of_a_second_to_a_minute_gives_as_many_tokens_as_the_native_processor(native):
    lengths = range(RATE // 10, 60 * RATE + 1, STEP)
    differing = [n / RATE for n in lengths if GEOMETRY.num_tokens(n) != native_count(native, n)]
    print(f"{len(lengths)} lengths, {len(differing)} with another number of tokens")
    assert not differing


@pytest.mark.parametrize("seconds", [0.1, 0.55, 1, 29.99, 30, 30.01, 59.99, 60])
def test_the_native_processor_itself_expands_to_as_many_placeholders(native, seconds):
    clip = noise(round(seconds * RATE), 0)
    ids = native(text=["<|audio|>"], audio=[clip])["input_ids"]
    assert int((ids == native.audio_token_id).sum()) == GEOMETRY.num_tokens(clip.size)


def test_layout_b_counts_a_partial_frame_as_the_native_processor_does(native):
    geometry = dataclasses.replace(GEOMETRY, counts_partial_frames=True)
    for num_samples in np.random.default_rng(0).integers(RATE // 10, 60 * RATE, 40):
        ids = native(text=["<|audio|>"], audio=[noise(num_samples, 0)])["input_ids"]
        assert int((ids == native.audio_token_id).sum()) == geometry.num_tokens(num_samples)


@pytest.mark.parametrize("geometry", [GEOMETRY, SMALL], ids=["model", "another geometry"])
def test_a_long_clip_falls_into_windows_that_fit_and_join_to_the_clip(geometry):
    rng = np.random.default_rng(1)
    for seed in range(20):
        seconds = rng.uniform(1, 6) * geometry.window_s if seed else geometry.window_s + 0.001
        clip = noise(int(seconds * geometry.sampling_rate), seed)
        starts, windows = window_starts(clip, geometry), split_windows(clip, geometry)
        assert np.array_equal(np.concatenate(windows), clip)
        assert starts == [0, *np.cumsum([window.size for window in windows])[:-1]]
        assert all(start % geometry.token_samples == 0 for start in starts)
        assert max(window.size for window in windows) <= geometry.window_samples
        assert len(windows) > 1 and min(window.size for window in windows) >= geometry.sampling_rate
        tokens = sum(geometry.num_window_tokens(window.size) for window in windows)
        assert tokens == geometry.num_tokens(clip.size)


@pytest.mark.parametrize("num_samples", [RATE // 10, RATE, 30 * RATE - 1, 30 * RATE])
def test_a_clip_of_at_most_one_window_is_not_cut(num_samples):
    assert window_starts(noise(num_samples, 0), GEOMETRY) == [0]


@pytest.mark.parametrize("pause_s", [0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_every_cut_falls_into_a_pause_and_never_into_a_burst(seed, pause_s):
    clip, silent = bursts(seed, pause_s)
    cuts = window_starts(clip, GEOMETRY)[1:]
    assert len(cuts) >= 3
    assert [cut / RATE for cut in cuts if not silent[cut]] == []


def test_of_two_equal_pauses_the_later_one_is_cut():
    clip = noise(40 * RATE, 0)
    for begin in (17, 26):
        clip[begin * RATE : (begin + 1) * RATE] = 0
    (cut,) = window_starts(clip, GEOMETRY)[1:]
    assert 26 * RATE < cut < 27 * RATE


def test_silence_is_cut_as_late_as_a_window_allows():
    clip = np.zeros(100 * RATE, np.float32)
    assert window_starts(clip, GEOMETRY) == [0, 30 * RATE, 60 * RATE, 90 * RATE]


def test_a_waveform_comes_back_as_contiguous_float32():
    checked = check_waveform(np.zeros(2 * RATE)[::2], RATE)
    assert checked.dtype == np.float32 and checked.flags.c_contiguous and checked.shape == (RATE,)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros((2, RATE)), "audio has shape (2, 16000); expected one channel, shape (samples,)"),
        (np.float32(0), "audio has shape (); expected one channel, shape (samples,)"),
        (np.zeros(0), "audio is 0.000 s long (0 samples at 16000 Hz); at least 0.1 s is needed"),
        (np.zeros(1599), "audio is 0.100 s long (1599 samples at 16000 Hz); at least 0.1 s is needed"),
        (np.zeros(RATE, np.int16), "audio has samples of type int16; expected floating point from -1 to 1"),
        (np.full(RATE, np.nan), "audio has 16000 NaN or infinite samples"),
        (np.append(np.zeros(RATE), [np.inf, -np.inf]), "audio has 2 NaN or infinite samples"),
    ],
    ids=["two channels", "a number", "nothing", "too short", "integers", "NaN", "infinite"],
)
def test_a_waveform_that_cannot_be_used_is_refused_with_what_is_wrong(waveform, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_waveform(waveform, RATE)


def test_a_clip_of_exactly_a_tenth_of_a_second_is_accepted_and_gives_a_token():
    assert GEOMETRY.num_tokens(check_waveform(np.zeros(1600), RATE).size) == 1
