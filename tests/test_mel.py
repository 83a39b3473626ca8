"""server/glmasr_mel.py and glmasr_packing.py against transformers' WhisperFeatureExtractor, many sounds packed in one call."""

import numpy as np
import pytest
import torch
from glmasr_mel import LogMelSpectrogram
from glmasr_packing import Packer
from speech import Voice, synthesize
from torch import Tensor
from transformers import WhisperFeatureExtractor
from waveform_glmasr import AudioGeometry

RATE = 16000
MAX_DIFFERENCE = 1e-4
SENTENCE = "she sells sea shells by the sea shore, one two three four five"
LENGTHS = (1600, 1601, 1759, 1760, 1999, 15999, 16000, 16001, 111_111, 240_000, 479_841, 479_999, 480_000)


def spoken(num_samples: int) -> np.ndarray:
    voices = [Voice("en", "en-us", "m1", 160, 50), Voice("en", "en-gb", "f1", 240, 60)]
    return np.resize(np.concatenate([synthesize(SENTENCE, voice) for voice in voices]), num_samples)


def tone(num_samples: int) -> np.ndarray:
    return np.sin(2 * np.pi * 440 * np.arange(num_samples) / RATE).astype(np.float32)


def noise(num_samples: int) -> np.ndarray:
    return np.random.default_rng(num_samples).standard_normal(num_samples).astype(np.float32)


SOUNDS = {
    "speech": spoken,
    "silence": lambda n: np.zeros(n, np.float32),
    "silence, then speech": lambda n: np.concatenate([np.zeros(n // 2, np.float32), spoken(n - n // 2)]),
    "clipping": lambda n: np.clip(20 * spoken(n), -1, 1),
    "loud noise": lambda n: np.clip(noise(n), -1, 1),
    "faint noise": lambda n: 1e-4 * noise(n),
    "tone": tone,
    "click": lambda n: np.eye(1, n, n // 2, dtype=np.float32)[0],
    "constant": lambda n: np.full(n, 0.5, np.float32),
}


@pytest.fixture(scope="module", params=[80, 128], ids=["80 mels", "128 mels"])
def extractor(request: pytest.FixtureRequest) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=request.param)


def device_mel(extractor: WhisperFeatureExtractor) -> LogMelSpectrogram:
    return LogMelSpectrogram(torch.tensor(extractor.mel_filters), extractor.n_fft, extractor.hop_length)


def packed(mel: LogMelSpectrogram, clips: list[np.ndarray]) -> list[Tensor]:
    """The frames (frames, mels) of each of the clips, all computed in one call."""
    geometry = AudioGeometry(RATE, mel.hop_length, window_s=30, merge_factor=4)
    num_tokens = [geometry.num_window_tokens(clip.size) for clip in clips]
    laid_out = Packer(geometry, mel.n_fft).pack(clips, num_tokens, torch.device("cpu"))
    features = mel(laid_out.samples, laid_out.window, len(clips))
    assert not features[laid_out.window == 0].any()
    return [features[laid_out.window == i + 1] for i in range(len(clips))]


def expected(extractor: WhisperFeatureExtractor, clip: np.ndarray) -> Tensor:
    """(frames, mels) of the clip at its own length."""
    batch = extractor(clip, sampling_rate=RATE, padding=False, truncation=False, return_tensors="pt")
    return batch.input_features[0].T


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    return float((torch.cat(ours) - torch.cat(theirs)).abs().max())  # NaN if any is


@pytest.mark.parametrize("sound", SOUNDS)
def test_every_sound_at_every_length_packed_in_one_call_gives_whispers_features(extractor, sound):
    clips = [SOUNDS[sound](length) for length in LENGTHS]
    difference = largest_difference(
        packed(device_mel(extractor), clips), [expected(extractor, clip) for clip in clips]
    )
    print(f"{sound}, {extractor.feature_size} mels, {len(clips)} clips: largest difference {difference:.1e}")
    assert difference < MAX_DIFFERENCE


def test_different_sounds_packed_together_do_not_touch_one_another(extractor):
    clips = [make(length) for make, length in zip(SOUNDS.values(), LENGTHS, strict=False)]
    mel = device_mel(extractor)
    alone = [packed(mel, [clip])[0] for clip in clips]
    difference = largest_difference(packed(mel, clips), alone)
    reversed_difference = largest_difference(packed(mel, clips[::-1])[::-1], alone)
    print(f"packed against one by one: {difference:.1e}, in reverse order: {reversed_difference:.1e}")
    assert max(difference, reversed_difference) <= 1e-6


def test_frames_are_counted_per_window(extractor):
    clips = [noise(length) for length in LENGTHS]
    assert [len(features) for features in packed(device_mel(extractor), clips)] == [n // 160 for n in LENGTHS]


def test_a_model_in_half_precision_has_the_same_features(extractor):
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it makes a model
    try:
        mel = device_mel(extractor)
    finally:
        torch.set_default_dtype(torch.float32)
    clip = spoken(5 * RATE)
    assert largest_difference(packed(mel, [clip]), [expected(extractor, clip)]) < MAX_DIFFERENCE
