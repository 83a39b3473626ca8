"""Has the engine transcribe one session's items: in part while they are spoken, whole when they have ended, in order."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

if __package__:
    from .glmasr_agreement import Agreement, joint
    from .glmasr_events import TRANSCRIPTION, Transcription, event, new_id
    from .glmasr_vad import SAMPLING_RATE
else:
    from glmasr_agreement import Agreement, joint
    from glmasr_events import TRANSCRIPTION, Transcription, event, new_id
    from glmasr_vad import SAMPLING_RATE

DECODE_S = 30  # for one decoding
TRIES = 2  # of a final
STEP = SAMPLING_RATE // 10  # of audio whose way to text is timed
PARTIAL_S, PARTIAL_SHARE = 0.5, 0.1  # a partial every so many seconds, and seldomer the longer the window is
log = logging.getLogger("vllm.glmasr.live")


class EngineFailed(Exception):
    """An engine could not answer; the message is for the client."""


@dataclass(frozen=True)
class Text:
    """What an engine answers; tokens where it tells them."""

    text: str
    input_tokens: int | None = None
    output_tokens: int = 0


class Engine(Protocol):
    """What transcribes. A call that is cancelled is aborted in the engine.

    `samples` are (samples,) float32 at 16 kHz, `speech_s` the seconds of speech in them. Both may raise EngineFailed.
    """

    def check(self, asked: Transcription) -> None:
        """Raises ValueError for a model or language that it does not know."""

    async def final(self, samples: np.ndarray, speech_s: float, asked: Transcription) -> Text: ...

    async def partial(self, samples: np.ndarray, asked: Transcription) -> str: ...


class Meter(Protocol):
    """Where figures go: see glmasr_live_metrics.py."""

    def heard(self, seconds: float) -> None: ...

    def held(self, more_bytes: int) -> None: ...

    def word(self, seconds: float) -> None: ...

    def partial(self, seconds: float) -> None: ...

    def final(self, seconds: float) -> None: ...

    def dropped(self, reason: str) -> None: ...


class Gate:
    """So many partials at a time, of all sessions of the process."""

    def __init__(self, places: int):
        self.free = places


@dataclass
class Item:
    """A turn. Places are samples at 16 kHz; `window` is where the audio begins that is being decoded in part."""

    begin: int
    asked: Transcription
    id: str = field(default_factory=lambda: new_id("item"))
    window: int = -1
    agreement: Agreement = field(default_factory=Agreement)
    closed: str = ""  # text of the windows that have ended
    waiting: int = 0  # windows that have ended and have no text yet
    partial_end: int = 0  # place up to which the last partial heard
    quiet_partials: int = 0  # since the last speech
    once: int = 0  # places up to which an answer has heard the item's audio, and a second one
    twice: int = 0
    input_tokens: int | None = None
    output_tokens: int = 0
    failed: bool = False
    done: bool = False

    def __post_init__(self) -> None:
        self.window = self.once = self.twice = self.begin

    def count(self, answer: Text) -> str:
        if answer.input_tokens is not None:
            self.input_tokens = (self.input_tokens or 0) + answer.input_tokens
        self.output_tokens += answer.output_tokens
        return answer.text

    def usage(self, seconds: float) -> dict:
        if self.input_tokens is None:
            return {"type": "duration", "seconds": round(seconds, 3)}
        total = self.input_tokens + self.output_tokens
        return {"type": "tokens", "input_tokens": self.input_tokens, "output_tokens": self.output_tokens, "total_tokens": total}


class Scribe:
    """One session's decodings: at most one partial in flight, finals one after another."""

    def __init__(self, engine: Engine, gate: Gate, meter: Meter, send: Callable[[str], None], pending: int):
        self.engine, self.gate, self.meter, self.send = engine, gate, meter, send
        self._jobs: asyncio.Queue[tuple[Item, Callable[[], Awaitable[None]]]] = asyncio.Queue(pending)
        self._partial: asyncio.Task | None = None
        self._items: dict[str, Item] = {}  # committed, without an answer

    async def run(self) -> None:
        """Works off windows and finals, until cancelled."""
        try:
            while True:
                item, work = await self._jobs.get()
                try:
                    if not item.failed:
                        await work()
                except EngineFailed as error:
                    log.warning("%s: %s", item.id, error)
                    self._fail(item, str(error))
                finally:
                    self._jobs.task_done()
        finally:
            self.drop_partial()

    async def drained(self) -> None:
        """Waits until all that was asked for is answered."""
        await self._jobs.join()

    def fail_rest(self, message: str) -> None:
        """Tells the client of each committed item that will not be answered."""
        for item in list(self._items.values()):
            self._fail(item, message)

    # --- partials -----------------------------------------------------------------------------------------

    def is_due(self, item: Item, end: int) -> bool:
        """Whether the window up to `end` should be decoded in part now."""
        if (self._partial and not self._partial.done()) or item.waiting or item.done or item.failed:
            return False
        seconds = (end - item.window) / SAMPLING_RATE
        if (end - max(item.partial_end, item.window)) / SAMPLING_RATE < max(PARTIAL_S, PARTIAL_SHARE * seconds):
            return False
        if self.gate.free < 1:
            item.partial_end = end - int(PARTIAL_S * SAMPLING_RATE / 2)  # look again in a while
            self.meter.dropped("partial_busy")
            return False
        return True

    def partial(self, item: Item, samples: np.ndarray, end: int) -> None:
        """Decodes the window's samples (samples,) float32 in part, in a task of its own."""
        item.partial_end = end
        self.gate.free -= 1
        self._partial = asyncio.create_task(self._decode_partial(item, samples, end))
        self._partial.add_done_callback(self._partial_done)

    def drop_partial(self) -> None:
        if self._partial:
            self._partial.cancel()

    def _partial_done(self, task: asyncio.Task) -> None:
        self.gate.free += 1
        if not task.cancelled() and (error := task.exception()):
            log.error("a partial failed", exc_info=error)

    async def _decode_partial(self, item: Item, samples: np.ndarray, end: int) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(DECODE_S):
                text = await self.engine.partial(samples, item.asked)
        except (EngineFailed, TimeoutError) as error:  # the final will tell
            log.warning("a partial of %s failed: %s", item.id, error)
            self.meter.dropped("partial_failed")
            return
        self.meter.partial(time.monotonic() - began)
        if not item.done and not item.waiting and not item.failed:
            self._delta(item, item.agreement.partial(text))
            self._told(item, item.once, end, began)
            item.once = end

    def _told(self, item: Item, upto: int, end: int, arrived: float) -> None:
        """Notes how long ago the audio up to `upto` came, which enough answers have now heard; `end` came at `arrived`."""
        now = time.monotonic()
        for place in range(item.twice, upto, STEP):
            self.meter.word(now - arrived + (end - place) / SAMPLING_RATE)
        item.twice = max(item.twice, upto)

    # --- finals -------------------------------------------------------------------------------------------

    async def close_window(self, item: Item, samples: np.ndarray, speech_s: float) -> None:
        """The window has ended with these samples, (samples,) float32; waits where too much is pending."""
        self.drop_partial()
        item.waiting += 1

        async def work() -> None:
            answer = await self._decode_final(item, samples, speech_s)
            if item.failed:  # it was cleared meanwhile
                return
            item.closed += joint(item.closed, item.count(answer))
            self._delta(item, item.agreement.close_window(answer.text))
            item.waiting -= 1

        await self._jobs.put((item, work))

    async def finish(self, item: Item, samples: np.ndarray, speech_s: float, whole: bool, seconds: float, spoken: int) -> None:
        """The item has ended. `samples` are all its audio where `whole`, else those of its last window; `spoken` is where its speech ended."""
        self.drop_partial()
        item.done = True
        self._items[item.id] = item
        began = time.monotonic()

        async def work() -> None:
            answer = await self._decode_final(item, samples, speech_s) if samples.size else Text("")
            text = item.count(answer)
            if whole:
                self._delta(item, item.agreement.finish(text))
            else:
                self._delta(item, item.agreement.close_window(text))
                text = item.closed + joint(item.closed, text)
            self.meter.final(time.monotonic() - began)
            self._told(item, spoken, item.begin + round(seconds * SAMPLING_RATE), began)
            del self._items[item.id]
            self.send(event(f"{TRANSCRIPTION}.completed", item_id=item.id, content_index=0,
                            transcript=text, usage=item.usage(seconds)))  # fmt: skip

        await self._jobs.put((item, work))

    async def _decode_final(self, item: Item, samples: np.ndarray, speech_s: float) -> Text:
        """Raises EngineFailed: each try did."""
        for attempt in range(TRIES):
            try:
                async with asyncio.timeout(DECODE_S):
                    return await self.engine.final(samples, speech_s, item.asked)
            except TimeoutError:
                reason: Any = f"no answer in {DECODE_S} s"
            except EngineFailed as error:
                reason = error
            log.warning("decoding %s failed (%d of %d): %s", item.id, attempt + 1, TRIES, reason)
        raise EngineFailed(str(reason))

    def _fail(self, item: Item, message: str) -> None:
        item.failed = True
        self._items.pop(item.id, None)
        self.meter.dropped("final_failed")
        error = {"type": "server_error", "code": "transcription_failed", "message": message}
        self.send(event(f"{TRANSCRIPTION}.failed", item_id=item.id, content_index=0, error=error))

    def _delta(self, item: Item, text: str) -> None:
        if text:
            self.send(event(f"{TRANSCRIPTION}.delta", item_id=item.id, content_index=0, delta=text))
