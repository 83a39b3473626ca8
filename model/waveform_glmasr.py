"""From a waveform to windows the encoder can take: checks, cuts at pauses, and the count of audio tokens.

NumPy only. The reference processor and the vLLM server use this same file, so both cut alike.
"""

from dataclasses import dataclass

import numpy as np

MIN_AUDIO_S = 0.1  # below this a clip gives no audio token
MIN_WINDOW_S = 1.0  # what a cut leaves to the last window, at least
PAUSE_S = 0.24  # a cut is placed where the mean energy over this span is lowest


@dataclass(frozen=True)
class AudioGeometry:
    """How samples become mel frames, encoder positions and audio tokens.

    Args:
        sampling_rate: in Hz.
        hop_length: samples from one mel frame to the next.
        window_s: the longest stretch the encoder takes at once, in seconds.
        merge_factor: encoder positions joined into one audio token.
        counts_partial_frames: True where samples short of a whole hop make a frame too, as in layout B's
            reference, whose windows are filled up with silence.
    """

    sampling_rate: int
    hop_length: int
    window_s: int
    merge_factor: int
    counts_partial_frames: bool = False

    @property
    def window_samples(self) -> int:
        return self.window_s * self.sampling_rate

    @property
    def token_samples(self) -> int:
        """Samples under one audio token; the second convolution halves the frame rate."""
        return 2 * self.merge_factor * self.hop_length

    def num_frames(self, num_samples: int) -> int:
        return (num_samples + (self.hop_length - 1) * self.counts_partial_frames) // self.hop_length

    def num_positions(self, num_frames: int) -> int:
        """Encoder positions after the two convolutions (kernel 3, padding 1, strides 1 and 2)."""
        return (num_frames + 1) // 2

    def num_window_tokens(self, num_samples: int) -> int:
        """Audio tokens of one window of `num_samples`."""
        return self.num_positions(self.num_frames(num_samples)) // self.merge_factor

    def num_tokens(self, num_samples: int) -> int:
        """Audio tokens of a clip of any length.

        Cuts lie on multiples of `token_samples`, so every window but the last is whole tokens and
        the sum over the windows does not depend on where the cuts are.
        """
        whole = max(0, num_samples - 1) // self.window_samples * self.window_samples
        return whole // self.token_samples + self.num_window_tokens(num_samples - whole)


def check_waveform(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Returns `waveform` (samples,) as float32, or raises ValueError with what is wrong with it."""
    waveform = np.asarray(waveform)
    if waveform.ndim != 1:
        raise ValueError(f"audio has shape {waveform.shape}; expected one channel, shape (samples,)")
    if waveform.size < MIN_AUDIO_S * sampling_rate:
        raise ValueError(
            f"audio is {waveform.size / sampling_rate:.3f} s long ({waveform.size} samples at {sampling_rate} Hz); "
            f"at least {MIN_AUDIO_S} s is needed"
        )
    if not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(f"audio has samples of type {waveform.dtype}; expected floating point from -1 to 1")
    waveform = np.ascontiguousarray(waveform, dtype=np.float32)
    if not np.isfinite(waveform).all():
        raise ValueError(f"audio has {np.count_nonzero(~np.isfinite(waveform))} NaN or infinite samples")
    return waveform


def window_starts(waveform: np.ndarray, geometry: AudioGeometry) -> list[int]:
    """Cuts a clip into windows of at most `geometry.window_s` at its quietest moments.

    Each cut is looked for in the second half of the longest possible window: the point on the
    token grid around which `PAUSE_S` of audio has the least energy, the latest of equals.

    Args:
        waveform: (samples,)

    Returns:
        The first sample of every window, beginning with 0; a clip that fits gives [0].
    """
    longest, grid = geometry.window_samples, geometry.token_samples
    last = waveform.size - int(MIN_WINDOW_S * geometry.sampling_rate)
    span = int(PAUSE_S * geometry.sampling_rate)
    starts = [0]
    while waveform.size - starts[-1] > longest:
        begin = starts[-1]
        cuts = np.arange(begin + longest // 2 // grid * grid, min(begin + longest, last) + 1, grid)
        first = max(0, cuts[0] - span // 2)
        nearby = waveform[first : cuts[-1] + span // 2].astype(np.float64)
        energy = np.concatenate([[0.0], np.cumsum(nearby**2)])  # (samples + 1,)
        left = np.maximum(cuts - span // 2 - first, 0)
        right = np.minimum(cuts + span // 2 - first, nearby.size)
        loudness = (energy[right] - energy[left]) / (right - left)
        starts.append(int(cuts[len(cuts) - 1 - np.argmin(loudness[::-1])]))
    return starts


def split_windows(waveform: np.ndarray, geometry: AudioGeometry) -> list[np.ndarray]:
    """The windows of a clip, in order: (samples,) each; joined they are the clip again."""
    return np.split(waveform, window_starts(waveform, geometry)[1:])
