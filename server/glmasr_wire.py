"""Audio as clients send it, base64 in JSON, to samples; and the recent audio of one stream, from which clips are cut."""

import base64
import binascii

import numpy as np
import soxr

if __package__:
    from .glmasr_events import G711, Pcm, Refused
    from .glmasr_vad import SAMPLING_RATE
else:
    from glmasr_events import G711, Pcm, Refused
    from glmasr_vad import SAMPLING_RATE


def _mu_law() -> np.ndarray:
    """(256,) int16: ITU-T G.711, table 2a."""
    code = ~np.arange(256, dtype=np.uint8)
    value = (((code & 15).astype(np.int32) << 3) + 132 << ((code >> 4) & 7)) - 132
    return np.where(code & 128, -value, value).astype(np.int16)


def _a_law() -> np.ndarray:
    """(256,) int16: ITU-T G.711, table 1a."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, value = ((code >> 4) & 7).astype(np.int32), ((code & 15).astype(np.int32) << 4) + 8
    value = np.where(exponent > 0, value + 256 << np.maximum(exponent, 1) - 1, value)
    return np.where(code & 128, value, -value).astype(np.int16)


TABLES = {"audio/pcmu": _mu_law(), "audio/pcma": _a_law()}


def decode(audio: object, audio_format: Pcm | G711) -> np.ndarray:
    """Base64 to (samples,) int16 at the format's rate.

    Raises:
        Refused: no base64, or half a sample
    """
    try:
        data = base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise Refused(f"audio is not base64: {error}", "invalid_value", "audio") from error
    if audio_format.type in TABLES:
        return TABLES[audio_format.type][np.frombuffer(data, np.uint8)]
    if len(data) % 2:
        raise Refused(f"audio has {len(data)} bytes; PCM of 16 bits has an even number", "invalid_value", "audio")
    return np.frombuffer(data, "<i2")


class Recording:
    """The recent audio of one stream. Places are samples at 16 kHz from its beginning, whatever its own rate is."""

    def __init__(self, rate: int):
        self.rate = rate
        self._data, self._first = bytearray(), 0  # int16 at `rate`, and the number of its first sample
        # For the detector: a light resampler, which holds back 13 ms and not 37.
        self._light = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="int16", quality="LQ") if rate != SAMPLING_RATE else None

    @property
    def end(self) -> int:
        """So far."""
        return (self._first + len(self._data) // 2) * SAMPLING_RATE // self.rate

    @property
    def bytes(self) -> int:
        """That are held."""
        return len(self._data)

    def add(self, samples: np.ndarray) -> np.ndarray:
        """Keeps (samples,) int16; gives what the detector should hear of it, (samples,) float32 at 16 kHz."""
        self._data += samples.tobytes()
        light = self._light.resample_chunk(samples) if self._light else samples
        return light.astype(np.float32) / 32768

    def clip(self, begin: int, end: int) -> np.ndarray:
        """(samples,) float32 at 16 kHz of what is between; it must not have been forgotten."""
        first, last = (place * self.rate // SAMPLING_RATE - self._first for place in (begin, end))
        assert first >= 0, "the clip's audio was forgotten"
        samples = np.frombuffer(bytes(self._data[2 * first : 2 * last]), np.int16).astype(np.float32) / 32768
        return samples if self.rate == SAMPLING_RATE else soxr.resample(samples, self.rate, SAMPLING_RATE)

    def forget(self, before: int) -> None:
        """Lets go of what was before this place."""
        count = max(0, before * self.rate // SAMPLING_RATE - self._first)
        del self._data[: 2 * count]
        self._first += count
