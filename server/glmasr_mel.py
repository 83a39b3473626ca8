"""Log-mel spectrogram on the device, equal to transformers' WhisperFeatureExtractor, for packed windows.

Needs torch alone, so that it can be tested and trained with where vLLM is not.
"""

import torch
from torch import Tensor, nn

LOWEST_POWER = 1e-10
DYNAMIC_RANGE = 8.0  # decades below each window's own maximum


class LogMelSpectrogram(nn.Module):
    """Mel frames of a waveform in which windows lie one behind the other, each with its ends reflected.

    Shapes: S slots, which are hops of the waveform, and M mel bins.

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
    def forward(self, samples: Tensor, window: Tensor, num_windows: int) -> Tensor:
        """Computes the frame that begins in each slot.

        Args:
            samples: (S * hop_length + n_fft - hop_length,) float32
            window: (S,) int64, the window of which each frame is, from 1 to num_windows, 0 for frames of none
            num_windows: how many there are, at most

        Returns:
            (S, M) float32, zero for frames of no window
        """
        spectrum = torch.fft.rfft(samples.unfold(0, self.n_fft, self.hop_length) * self.taper)  # (S, n_fft / 2 + 1)
        power = spectrum.real.square() + spectrum.imag.square()
        log_mel = (power @ self.filters).clamp_min(LOWEST_POWER).log10()  # (S, M)
        peak = log_mel.new_full((num_windows + 1,), -torch.inf)
        peak.scatter_reduce_(0, window, log_mel.amax(dim=1), "amax")
        log_mel = torch.maximum(log_mel, (peak - DYNAMIC_RANGE)[window, None])
        return ((log_mel + 4.0) / 4.0).masked_fill((window == 0)[:, None], 0.0)
