"""Where somebody speaks: silero-vad's model through onnxruntime, as a stream, on one thread.

Mirrors silero-vad 6.2.3's `SileroVADSequence`. The package itself is not imported: it would bring torch in and set
its threads. Its `sequence` file gives the probabilities of silero_vad.onnx to the last bit, in less than half the time.
"""

import importlib.metadata
from functools import cache

import numpy as np
import onnxruntime

SAMPLING_RATE = 16000  # Hz, of all audio here
CHUNK = 512  # samples that get one probability: 32 ms
CONTEXT = 64  # samples before a chunk that the model sees too
MAX_CHUNKS = 64  # in one run of the model, which bounds its memory
STATE_SHAPE = (1, 1, 128)
DISTRIBUTION, MODEL = "silero-vad", "silero_vad/data/silero_vad_16k_sequence.onnx"


@cache
def loaded(model: str) -> onnxruntime.InferenceSession:
    """A model of the distribution, shared by all streams of the process, which keep their states themselves.

    Raises:
        FileNotFoundError: the distribution is not installed, or not as expected
    """
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"{DISTRIBUTION} is not installed: pip install --no-deps {DISTRIBUTION}") from error
    path = next((file.locate() for file in files if file.as_posix() == model), None)
    if path is None:
        raise FileNotFoundError(f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)} has no {model}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; the file has initializers that onnxruntime warns of
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class VoiceActivity:
    """The speech probabilities of one stream, the same ones however it is divided."""

    def __init__(self):
        self._session = loaded(MODEL)
        self._pending = np.zeros(CONTEXT, np.float32)  # the context of the next chunk, and what there is of the chunk
        self._h = self._c = np.zeros(STATE_SHAPE, np.float32)

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """Any number of samples (samples,) float32 at 16 kHz to (chunks,) float32, one for each chunk they complete."""
        self._pending = np.concatenate([self._pending, samples])
        chunks = (self._pending.size - CONTEXT) // CHUNK
        if chunks == 0:
            return np.zeros(0, np.float32)
        seen = np.lib.stride_tricks.sliding_window_view(self._pending, CONTEXT + CHUNK)[: chunks * CHUNK : CHUNK]
        probabilities = np.empty(chunks, np.float32)
        for begin in range(0, chunks, MAX_CHUNKS):
            some = {"input": np.ascontiguousarray(seen[begin : begin + MAX_CHUNKS]), "h": self._h, "c": self._c}
            found, self._h, self._c = self._session.run(["speech_probs", "hn", "cn"], some)
            probabilities[begin : begin + MAX_CHUNKS] = found
        self._pending = self._pending[chunks * CHUNK :].copy()
        return probabilities
