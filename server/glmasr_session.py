"""One live session: audio comes in, turns are found, events go out. Knows neither sockets nor vLLM."""

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Protocol

if __package__:
    from . import glmasr_events as events
    from .glmasr_events import Refused, Settings
    from .glmasr_limits import Limits
    from .glmasr_scribe import Engine, Gate, Item, Meter, Scribe
    from .glmasr_turns import WINDOW, Turns
    from .glmasr_vad import SAMPLING_RATE
    from .glmasr_voices import Voice, Voices
    from .glmasr_wire import Recording, decode
else:
    import glmasr_events as events
    from glmasr_events import Refused, Settings
    from glmasr_limits import Limits
    from glmasr_scribe import Engine, Gate, Item, Meter, Scribe
    from glmasr_turns import WINDOW, Turns
    from glmasr_vad import SAMPLING_RATE
    from glmasr_voices import Voice, Voices
    from glmasr_wire import Recording, decode

SHORTEST_S = 0.1  # of a commit, as OpenAI has it
WHOLE = 30 * SAMPLING_RATE  # up to so much an item is decoded in one piece at its end
TAIL = SAMPLING_RATE  # of the silence that ends a turn, at most, goes to the engine
QUIET = SAMPLING_RATE // 5  # so long after speech there is nothing new to decode
LONG_SILENCE_MS = 1000  # where a turn ends after more than that, its last words are shown before
MOST_EVENTS = 1000  # that wait for a client to read
SEND_S = 5.0  # for a client to take an event
DRAIN_S = 8.0  # for finals in flight, when a session is ended from here


class Socket(Protocol):
    """What a session talks through."""

    async def receive(self) -> str | bytes | None:
        """The next message; None once the client has gone."""

    async def send(self, message: str) -> None:
        """Raises ConnectionError once the client has gone."""

    async def close(self, code: int, reason: str) -> None: ...


@dataclass(frozen=True)
class Shared:
    """What a process's sessions share."""

    engine: Engine
    voices: Voices
    gate: Gate
    meter: Meter
    limits: Limits


@dataclass(frozen=True)
class Ending:
    """Why a session ends, as it is told to the client: with a code of WebSocket's, and as an error if it is one."""

    code: int
    reason: str
    error: str | None = None


GONE = Ending(0, "the client has gone")


class Session:
    """To be run once."""

    def __init__(self, socket: Socket, shared: Shared):
        self.socket, self.shared, self.limits = socket, shared, shared.limits
        self.id = events.new_id("sess")
        self.settings = Settings(type="transcription")
        self.expires_at = int(time.time() + self.limits.session_s)
        self._out: asyncio.Queue[str] = asyncio.Queue(MOST_EVENTS)
        self._ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.scribe = Scribe(shared.engine, shared.gate, shared.meter, self.send, self.limits.pending_finals)
        self._base = 0  # samples at 16 kHz before the present recording
        self._item: Item | None = None
        self._previous: str | None = None  # the last committed item
        self._floor = 0  # audio before it has been used
        self._held = 0  # bytes of audio, as reported
        self._spoken = [0, 0]  # samples of speech before the item, and before its window
        self._listen()

    def _listen(self) -> None:
        """Begins a new recording, for the format and turn detection of the settings."""
        chosen = self.settings.audio.input
        self.recording, self.voice, self._floor = Recording(chosen.format.rate), Voice(), 0
        vad = chosen.turn_detection
        self.turns = Turns(vad.threshold if vad else 0.5, vad.silence_ms if vad else None)

    # --- life ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the client leaves, time is up, or `end` is called; leaves no task behind."""
        self.shared.voices.streams += 1
        self.send(events.event("session.created", session=self.settings.shown(self.id, self.expires_at)))
        reader, writer, scribe = tasks = [asyncio.create_task(one) for one in (self._read(), self._write(), self.scribe.run())]
        try:
            async with asyncio.timeout(self.limits.session_s):
                await asyncio.wait([*tasks, self._ending], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            minutes = self.limits.session_s / 60
            self.end(Ending(1001, "session expired", f"the session has lasted its {minutes:g} minutes (MAX_SESSION_MINUTES)"))
        try:
            for task in tasks:
                if task.done():
                    task.result()  # raises what was not expected
            if not reader.done() and not writer.done() and self._ending.done():
                await self._say_goodbye(reader, writer, self._ending.result())
        finally:
            self.shared.voices.streams -= 1
            self.shared.meter.held(-self._held)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self, ending: Ending) -> None:
        """Asks the session to end: what is pending is answered first."""
        if not self._ending.done():
            self._ending.set_result(ending)

    async def _say_goodbye(self, reader: asyncio.Task, writer: asyncio.Task, ending: Ending) -> None:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        self.shared.meter.dropped(ending.reason.replace(" ", "_"))
        if ending.code != 1008:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    if self._item and self.turns.place - self._item.begin >= SHORTEST_S * SAMPLING_RATE:
                        await self._commit()
                    await self.scribe.drained()
            self.scribe.fail_rest(f"{ending.reason} before the text was there")
            if ending.error:
                self.send(events.error(ending.error, "session_expired", kind="session_error"))
            written = asyncio.create_task(self._out.join())
            await asyncio.wait([written, writer], timeout=SEND_S, return_when=asyncio.FIRST_COMPLETED)
            written.cancel()
        await self.socket.close(ending.code, ending.reason)

    def send(self, message: str) -> None:
        """Puts an event into the queue; a client that lets it fill up is left."""
        try:
            self._out.put_nowait(message)
        except asyncio.QueueFull:
            self.end(Ending(1008, "not reading"))

    async def _write(self) -> None:
        while True:
            message = await self._out.get()
            try:
                async with asyncio.timeout(SEND_S):
                    await self.socket.send(message)
                self._out.task_done()
            except TimeoutError:
                return self.end(Ending(1008, "not reading"))
            except ConnectionError:
                return self.end(GONE)

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self.limits.idle_s):
                    message = await self.socket.receive()
            except TimeoutError:
                self.end(Ending(1000, "idle"))
                return await asyncio.Event().wait()  # until cancelled
            if message is None:
                return
            await self._take(message)

    # --- events -------------------------------------------------------------------------------------------

    async def _take(self, message: str | bytes) -> None:
        event: dict = {}
        try:
            if len(message) > self.limits.message_bytes:
                most = self.limits.message_bytes
                raise Refused(f"the message has {len(message)} bytes; at most {most} are taken (MAX_MESSAGE_MB)", "message_too_large")
            event = events.parse(message)
            match events.check(event):
                case "session.update":
                    self._update(event["session"])
                case "input_audio_buffer.append":
                    await self._append(event["audio"])
                case "input_audio_buffer.commit":
                    await self._commit_asked()
                case "input_audio_buffer.clear":
                    self._clear()
        except Refused as refused:
            self.shared.meter.dropped(refused.code)
            self.send(events.error(str(refused), refused.code, refused.param, event.get("event_id")))

    def _update(self, changes: object) -> None:
        settings = self.settings.updated(changes)
        old, new = self.settings.audio.input, settings.audio.input
        if new.format != old.format or new.turn_detection != old.turn_detection:
            if self._item:
                name = "format" if new.format != old.format else "turn_detection"
                raise Refused(f"{name} cannot change while there is audio in the buffer; commit or clear it first",
                              "invalid_value", f"session.audio.input.{name}")  # fmt: skip
        try:
            self.shared.engine.check(new.transcription)
        except ValueError as error:
            raise Refused(str(error), "invalid_value", "session.audio.input.transcription") from error
        self.settings = settings
        if new.format != old.format:
            self._base += self.recording.end
            self._listen()
        elif new.turn_detection != old.turn_detection:
            vad = new.turn_detection
            self.turns.configure(vad.threshold if vad else 0.5, vad.silence_ms if vad else None)
            self._floor = self.recording.end
        self.send(events.event("session.updated", session=settings.shown(self.id, self.expires_at)))

    async def _append(self, audio: object) -> None:
        samples = decode(audio, self.settings.audio.input.format)
        if not samples.size:
            return
        manual = self.settings.audio.input.turn_detection is None
        longest = self.limits.turn_s * SAMPLING_RATE
        if manual and self._item and self.recording.end - self._item.begin > longest:
            raise Refused(f"the buffer holds {self.limits.turn_s:g} s of audio, its most (MAX_TURN_S); commit or clear it",
                          "input_audio_buffer_full", "audio")  # fmt: skip
        if manual and self._item is None:
            self._open(self.recording.end)
        light = self.recording.add(samples)
        self.shared.meter.heard(samples.size / self.recording.rate)
        for probability in await self.shared.voices.hear(self.voice, light):
            match self.turns.step(probability):
                case "start":
                    self._start()
                case "stop":
                    await self._stop()
            if self._item:
                await self._go_on(self._item)
                if not manual and self.turns.place - self._item.begin > longest:
                    await self._stop()
        self._forget()

    def _start(self) -> None:
        prefix = self.settings.audio.input.turn_detection.prefix_padding_ms * SAMPLING_RATE // 1000
        self._open(max(self._floor, self.turns.start - prefix))
        self.send(events.event("input_audio_buffer.speech_started", audio_start_ms=self._ms(self._item.begin), item_id=self._item.id))

    async def _stop(self) -> None:
        self.send(events.event("input_audio_buffer.speech_stopped", audio_end_ms=self._ms(self.turns.place), item_id=self._item.id))
        await self._commit()

    def _open(self, begin: int) -> None:
        self._item = Item(begin, self.settings.audio.input.transcription)
        self._spoken = [self.turns.spoken - (self.turns.place - self.turns.start if self.turns.speaking else 0)] * 2

    def _ms(self, place: int) -> int:
        return (self._base + place) * 1000 // SAMPLING_RATE

    async def _go_on(self, item: Item) -> None:
        """The item's audio has grown by a chunk."""
        place, turns = self.turns.place, self.turns
        if place - item.window > WINDOW:
            cut = max(turns.cut(), item.window + WINDOW // 2)
            samples, speech_s = self.recording.clip(item.window, cut), self._speech_s(1)
            item.window, item.partial_end, self._spoken[1] = cut, cut, turns.spoken
            return await self.scribe.close_window(item, samples, speech_s)
        if turns.last <= item.window or not self.scribe.is_due(item, place):
            return
        if place - turns.last > QUIET:
            vad = self.settings.audio.input.turn_detection
            if (vad and vad.silence_ms < LONG_SILENCE_MS) or item.quiet_partials == 2:
                return
            item.quiet_partials += 1
        else:
            item.quiet_partials = 0
        self.scribe.partial(item, self.recording.clip(item.window, place), place)

    def _speech_s(self, since: int) -> float:
        """Of the item, or of its window."""
        return (self.turns.spoken - self._spoken[since]) / SAMPLING_RATE

    async def _commit_asked(self) -> None:
        end, least = self.recording.end, SHORTEST_S * SAMPLING_RATE
        has = (end - self._item.begin) if self._item else 0
        if has < least:
            raise Refused(f"the buffer holds {1000 * has // SAMPLING_RATE} ms of audio; a commit needs at least {1000 * SHORTEST_S:g} ms",
                          "input_audio_buffer_commit_empty")  # fmt: skip
        if self.turns.speaking:
            self.send(events.event("input_audio_buffer.speech_stopped", audio_end_ms=self._ms(end), item_id=self._item.id))
        await self._commit(end)

    async def _commit(self, end: int | None = None) -> None:
        """Ends the item at `end`, else at the last chunk."""
        item, self._item = self._item, None
        end = self.turns.place if end is None else end
        heard = max(item.window, min(end, self.turns.last + TAIL)) if self.settings.audio.input.turn_detection else end
        self.turns.end()
        previous, self._previous, self._floor = self._previous, item.id, end
        self.send(events.event("input_audio_buffer.committed", item_id=item.id, previous_item_id=previous))
        for name in ("added", "done"):
            self.send(events.event(f"conversation.item.{name}", item=events.item(item.id), previous_item_id=previous))
        whole = heard - item.begin <= WHOLE
        samples = self.recording.clip(item.begin if whole else item.window, heard)
        await self.scribe.finish(item, samples, self._speech_s(0 if whole else 1), whole, (end - item.begin) / SAMPLING_RATE, min(end, self.turns.last))

    def _clear(self) -> None:
        self.scribe.drop_partial()
        if self._item:
            self._item.failed = True  # windows of it that are pending tell nobody
            self._item = None
        self.turns.end()
        self._floor = self.recording.end
        self.send(events.event("input_audio_buffer.cleared"))

    def _forget(self) -> None:
        """Lets go of the audio that nothing will need."""
        if self._item is None:
            self.recording.forget(max(self._floor, self.turns.place - 2 * SAMPLING_RATE))
        elif self.turns.place - self._item.begin > WHOLE + SAMPLING_RATE:
            self.recording.forget(self._item.window)
        self.shared.meter.held(self.recording.bytes - self._held)
        self._held = self.recording.bytes
