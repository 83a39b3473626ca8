"""The speech probabilities of many live streams: their chunks share runs of silero-vad's model, on the event loop."""

import asyncio
import time

import numpy as np

if __package__:
    from .glmasr_vad import CHUNK, CONTEXT, loaded
else:
    from glmasr_vad import CHUNK, CONTEXT, loaded

MODEL = "silero_vad/data/silero_vad.onnx"
STATE = (2, 128)  # of one stream
MOST_AT_ONCE = 64  # streams in one run: 2 ms
GATHER_S = 0.01  # that chunks wait for others, where there are more streams than `FEW`
FEW = 4
ROUND_S = 0.005  # after so long other tasks have their turn


class Voice:
    """One stream's place in the model."""

    def __init__(self):
        self.state = np.zeros(STATE, np.float32)
        self.pending = np.zeros(CONTEXT, np.float32)  # the context of the next chunk, and what there is of the chunk


class Voices:
    """All streams of a process."""

    def __init__(self):
        self.streams = 0  # open, by those who open them
        self._model = loaded(MODEL)
        self._waiting: list[tuple[Voice, np.ndarray, asyncio.Future]] = []
        self._runner: asyncio.Task | None = None

    async def hear(self, voice: Voice, samples: np.ndarray) -> list[float]:
        """Any number of samples (samples,) float32 at 16 kHz to one probability for each chunk they complete.

        One call at a time for each stream.
        """
        joined = np.concatenate([voice.pending, samples])
        chunks = (joined.size - CONTEXT) // CHUNK
        voice.pending = joined[chunks * CHUNK :].copy()
        if chunks == 0:
            return []
        seen = np.lib.stride_tricks.sliding_window_view(joined, CONTEXT + CHUNK)[: chunks * CHUNK : CHUNK]
        found = asyncio.get_running_loop().create_future()
        self._waiting.append((voice, seen, found))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return await found

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_S if self.streams > FEW else 0)
            taken, self._waiting = self._waiting, []
            for first in range(0, len(taken), MOST_AT_ONCE):
                await self._together(taken[first : first + MOST_AT_ONCE])

    async def _together(self, streams: list[tuple[Voice, np.ndarray, asyncio.Future]]) -> None:
        streams = sorted(streams, key=lambda one: -len(one[1]))  # those with more chunks go on alone
        found: list[list[float]] = [[] for _ in streams]
        state = np.stack([voice.state for voice, _, _ in streams], axis=1)  # (2, streams, 128)
        began = time.monotonic()
        for i in range(len(streams[0][1])):
            going = sum(i < len(seen) for _, seen, _ in streams)
            chunk = np.stack([seen[i] for _, seen, _ in streams[:going]])
            inputs = {"input": chunk, "state": state[:, :going], "sr": np.array(16000)}
            output, state[:, :going] = self._model.run(["output", "stateN"], inputs)
            for one, probability in zip(found, output[:, 0].tolist(), strict=False):
                one.append(probability)
            if time.monotonic() - began > ROUND_S:
                await asyncio.sleep(0)
                began = time.monotonic()
        for i, (voice, _, future) in enumerate(streams):
            voice.state = state[:, i].copy()
            if not future.cancelled():
                future.set_result(found[i])
