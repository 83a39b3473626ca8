"""Log-mel spectrogram on the device, equal to transformers' WhisperFeatureExtractor, for packed windows.

Needs torch alone, so that it can be tested and trained with where vLLM is not.
"""

import torch
from torch import Tensor, nn

LOWEST_POWER = 1e-10
DYNAMIC_RANGE = 8.0  # decades below each window's own maximum


class LogMelSpectrogram(nn.Module):
    """Turns windows of waveform, one behind the other, into their mel frames, one behind the other.

    Nothing is padded to the longest: each window is framed over its own length, its ends reflected.

    Shapes: S samples and T frames of all windows, W windows, M mel bins.

    Args:
        mel_filters: (n_fft / 2 + 1, M) as in WhisperFeatureExtractor.mel_filters
        n_fft: samples under one frame
        hop_length: samples from one frame to the next
    """

    def __init__(self, mel_filters: Tensor, n_fft: int, hop_length: int):
        super().__init__()
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.register_buffer("filters", mel_filters.float(), persistent=False)
        self.register_buffer("taper", torch.hann_window(n_fft, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def forward(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the frames of all windows.

        Args:
            samples: (S,) float32, the windows joined
            lengths: (W,) int64, each window's own number of samples, more than n_fft / 2

        Returns:
            features (T, M) float32 and num_frames (W,): `lengths // hop_length`
        """
        num_frames = lengths // self.hop_length
        window_of_frame = torch.repeat_interleave(num_frames)  # (T,)
        frames, first_slot = self._frames(samples, lengths)  # (slots, n_fft)
        slot = torch.arange(window_of_frame.numel(), device=samples.device)
        slot = slot + (first_slot - num_frames.cumsum(0) + num_frames)[window_of_frame]
        spectrum = torch.fft.rfft(frames[slot] * self.taper)  # (T, n_fft / 2 + 1)
        power = spectrum.real.square() + spectrum.imag.square()
        log_mel = (power @ self.filters).clamp_min(LOWEST_POWER).log10()  # (T, M)

        peak = log_mel.new_full(lengths.shape, -torch.inf)  # (W,)
        peak.scatter_reduce_(0, window_of_frame, log_mel.amax(dim=1), "amax")
        log_mel = torch.maximum(log_mel, (peak - DYNAMIC_RANGE)[window_of_frame, None])
        return (log_mel + 4.0) / 4.0, num_frames

    def _frames(self, samples: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Every hop's frame as a view (slots, n_fft), and each window's first slot (W,).

        Each window is written with both ends reflected and rounded up to whole hops, so that all
        frames start on a multiple of the hop; slots that reach over a window's end go unused.
        """
        half = self.n_fft // 2
        hops = (lengths + self.n_fft + self.hop_length - 1) // self.hop_length  # (W,)
        first_slot = hops.cumsum(0) - hops
        window = torch.repeat_interleave(hops * self.hop_length)  # (padded samples,)
        begin = (lengths.cumsum(0) - lengths)[window]
        index = torch.arange(window.numel(), device=samples.device) - (first_slot * self.hop_length)[window] - half
        last = (lengths - 1)[window]
        index = (last - (last - index.abs()).abs()).clamp_min(0)  # reflected at 0 and at the last sample
        padded = samples[begin + index]
        padded = torch.cat([padded, padded.new_zeros(self.n_fft)])  # so that the last hops have frames too
        return padded.unfold(0, self.n_fft, self.hop_length), first_slot
