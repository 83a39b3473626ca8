"""Where everything lies when windows of speech are packed one behind the other: worked out on the host, sent in two copies.

Needs NumPy and torch alone. Nothing that follows on the device has to ask the host, or the host the device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .waveform_glmasr import AudioGeometry


@dataclass(frozen=True)
class PackedWindows:
    """W windows on the device, and where their frames, positions and audio tokens are.

    A slot is a hop of the packed waveform. Each window begins on an even slot, as the strided convolution
    needs, and leaves silent slots behind it: what the convolutions' own padding is at the end of a clip.

    Attributes:
        samples: (S * hop_length + n_fft - hop_length,) float32, each window with its ends reflected
        window: (S,) int64, the window whose frame begins in the slot, from 1; 0 for silence
        slot: (P,) int64, which output of the strided convolution each position is
        place: (P,) int64, each position's place within its window
        bounds: (W + 1,) int32, the first position of each window, and the end of the last
        token: (N,) int64, the first of the positions joined to each audio token
    """

    samples: Tensor
    window: Tensor
    slot: Tensor
    place: Tensor
    bounds: Tensor
    token: Tensor


@dataclass(frozen=True)
class Packer:
    """Packs windows for a model's frames, positions and tokens.

    Args:
        n_fft: samples under one mel frame
        padded: samples up to which each window is filled with silence; None where it keeps its own length
    """

    geometry: "AudioGeometry"
    n_fft: int
    padded: int | None = None

    @property
    def _margin(self) -> int:
        """Slots that a window needs, beyond two for each position, at most: its reflected ends and an even start."""
        return (1 + -(-self.n_fft // self.geometry.hop_length) + 1) // 2 * 2

    def pack(self, windows: list[np.ndarray], num_tokens: list[int], device: torch.device) -> PackedWindows:
        """Windows, each (samples,) float32 and more than n_fft / 2 long, that give so many audio tokens."""
        hop, merge = self.geometry.hop_length, self.geometry.merge_factor
        lengths = [self.padded or window.size for window in windows]
        num_frames = np.array([self.geometry.num_frames(length) for length in lengths])
        num_positions = self.geometry.num_positions(num_frames)
        num_slots = 2 * num_positions + self._margin
        first_slots, first_positions = _starts(num_slots), _starts(num_positions)
        tokens = np.array(num_tokens)

        frame = _counted(num_frames)
        window = np.zeros(num_slots.sum(), np.int64)
        window[np.repeat(first_slots, num_frames) + frame] = np.repeat(np.arange(len(windows)) + 1, num_frames)
        place = _counted(num_positions)
        slot = np.repeat(first_slots // 2, num_positions) + place
        token = np.repeat(first_positions, tokens) + _counted(tokens) * merge
        bounds = np.append(first_positions, num_positions.sum())
        indices = (window, slot, place, bounds, token)

        pinned = device.type == "cuda"  # so that copies need not be waited for
        samples = torch.empty(window.size * hop + self.n_fft - hop, pin_memory=pinned)
        self._write(windows, lengths, first_slots * hop, samples.numpy())
        joined = torch.empty(sum(index.size for index in indices), dtype=torch.int64, pin_memory=pinned)
        np.concatenate(indices, out=joined.numpy())
        on_device = joined.to(device, non_blocking=True).split([index.size for index in indices])
        window, slot, place, bounds, token = on_device
        return PackedWindows(samples.to(device, non_blocking=True), window, slot, place, bounds.int(), token)

    def _write(self, windows: list[np.ndarray], lengths: list[int], begins: np.ndarray, samples: np.ndarray) -> None:
        """Writes each window from its place on, filled up to its length, its ends reflected; silence between them."""
        half = self.n_fft // 2
        ends = np.append(begins[1:], samples.size)
        for window, length, begin, end in zip(windows, lengths, begins.tolist(), ends.tolist(), strict=True):
            filled = samples[begin + half : begin + half + length]
            filled[: window.size] = window
            filled[window.size :] = 0
            samples[begin : begin + half] = filled[half:0:-1]
            samples[begin + half + length : begin + 2 * half + length] = filled[-2 : -half - 2 : -1]
            samples[begin + 2 * half + length : end] = 0

    def token_places(self, num_samples: int) -> int:
        """Audio tokens for which a window of `num_samples` takes up room, positions that fill none counted as one."""
        num_positions = self.geometry.num_positions(self.geometry.num_frames(self.padded or num_samples))
        return -(-num_positions // self.geometry.merge_factor)

    def blank(self, token_places: int, num_windows: int, device: torch.device) -> PackedWindows:
        """Zeros with room for so many windows that take up so many places; silence where nothing is copied in."""
        num_positions = token_places * self.geometry.merge_factor
        num_slots = 2 * num_positions + self._margin * num_windows
        hop = self.geometry.hop_length
        index = {"dtype": torch.int64, "device": device}
        return PackedWindows(
            samples=torch.zeros(num_slots * hop + self.n_fft - hop, device=device, dtype=torch.float32),
            window=torch.zeros(num_slots, **index),
            slot=torch.zeros(num_positions, **index),
            place=torch.zeros(num_positions, **index),
            bounds=torch.zeros(num_windows + 1, dtype=torch.int32, device=device),
            token=torch.zeros(token_places, **index),
        )


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(W,) lengths to each one's first index."""
    return np.cumsum(lengths) - lengths


def _counted(lengths: np.ndarray) -> np.ndarray:
    """(W,) lengths to (their sum,): 0, 1, 2, … for each of them anew."""
    return np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)
