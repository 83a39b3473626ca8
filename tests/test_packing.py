"""server/glmasr_packing.py: where windows, positions and tokens lie, and the room that CUDA graphs leave for them."""

import numpy as np
import pytest
import torch
from glmasr_packing import PackedWindows, Packer
from waveform_glmasr import AudioGeometry

GEOMETRY = AudioGeometry(sampling_rate=16000, hop_length=160, window_s=30, merge_factor=4)
HALF = 200  # samples by which a window's ends are reflected
CPU = torch.device("cpu")
PACKERS = {"own lengths": Packer(GEOMETRY, 400), "padded": Packer(GEOMETRY, 400, padded=480_000)}


def noise(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(length).standard_normal(length, np.float32) for length in lengths]


def pack(packer: Packer, windows: list[np.ndarray]) -> PackedWindows:
    return packer.pack(windows, [GEOMETRY.num_window_tokens(window.size) for window in windows], CPU)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_each_window_is_there_with_its_ends_reflected_and_silence_behind_it(packer):
    windows = noise(1600, 16_001, 47_999)
    packed = pack(packer, windows)
    for i, window in enumerate(windows):
        begin = 160 * int((packed.window == i + 1).nonzero()[0])
        filled = np.concatenate([window, np.zeros((packer.padded or window.size) - window.size, np.float32)])
        expected = np.pad(filled, HALF, mode="reflect")
        assert np.array_equal(packed.samples[begin : begin + expected.size], expected)
        assert begin % 320 == 0
    assert not packed.samples[begin + expected.size :].any()


def test_windows_positions_and_tokens_are_each_counted_from_their_own_first():
    lengths = (1600, 4800, 5119, 16_000)
    packed = pack(PACKERS["own lengths"], noise(*lengths))
    frames = [length // 160 for length in lengths]
    positions = [(count + 1) // 2 for count in frames]
    assert torch.bincount(packed.window)[1:].tolist() == frames
    assert packed.bounds.tolist() == np.cumsum([0, *positions]).tolist()
    assert packed.place.tolist() == [place for count in positions for place in range(count)]
    bounds = packed.bounds.tolist()
    assert packed.token.tolist() == [first + 4 * i for first, count in zip(bounds, positions, strict=False) for i in range(count // 4)]
    for i, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        own = (packed.window[2 * packed.slot[first:last]] == i + 1).tolist()  # the first of the two frames under a position
        assert all(own)


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_whatever_takes_up_no_more_places_than_a_blank_has_fits_into_it(packer):
    rng = np.random.default_rng(0)
    for _ in range(20):
        windows = noise(*rng.integers(1600, 480_001, size=rng.integers(1, 9)).tolist())
        packed = pack(packer, windows)
        places = sum(packer.token_places(window.size) for window in windows)
        blank = packer.blank(places, len(windows), CPU)
        for name, room in vars(blank).items():
            taken = getattr(packed, name)
            assert taken.dtype == room.dtype and taken.numel() <= room.numel(), name
