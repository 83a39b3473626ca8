"""A live session as the official client has it, for tests: every event is checked against the client's own types."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soxr
from conftest import Server
from openai import OpenAI
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed

RATE = 24000
CHECKED = TypeAdapter(RealtimeServerEvent)
TRANSCRIPTION = "conversation.item.input_audio_transcription"
WAIT_S = 60


def pcm(waveform: np.ndarray, rate: int = RATE) -> bytes:
    """(samples,) float32 at 16 kHz to 16 bits at `rate`."""
    samples = waveform if rate == 16000 else soxr.resample(waveform, 16000, rate)
    return (samples * 32767).round().clip(-32768, 32767).astype("<i2").tobytes()


class Session:
    """One connection of the openai client's; a thread takes every event and checks it."""

    def __init__(self, connection):
        self.connection = connection
        self.events: list = []
        self.at: list[float] = []  # when each came
        self.faults: list[Exception] = []
        self.closed: Exception | None = None
        self._news = threading.Condition()
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                raw = self.connection.recv_bytes()
            except (ConnectionClosed, OSError) as error:  # the end of the connection, which the tests look at
                with self._news:
                    self.closed = error
                    self._news.notify_all()
                return
            with self._news:
                try:
                    self.events.append(CHECKED.validate_json(raw, strict=True))
                except ValueError as error:
                    self.faults.append(error)
                self.at.append(time.monotonic())
                self._news.notify_all()

    def send(self, kind: str, **fields) -> None:
        self.connection.send({"type": kind, **fields})

    def raw(self, message: str) -> None:
        self.connection._connection.send(message)  # what the client's own types would not let through

    def update(self, **heard) -> None:
        self.send("session.update", session={"type": "transcription", "audio": {"input": heard}})

    def append(self, data: bytes) -> None:
        self.send("input_audio_buffer.append", audio=base64.b64encode(data).decode())

    def stream(self, data: bytes, rate: int = RATE, piece_s: float = 0.1, pace: float | None = None, width: int = 2) -> None:
        """Sends audio in pieces, at `pace` times real time, or as fast as it is taken."""
        size, began = int(piece_s * rate) * width, time.monotonic()
        for i, at in enumerate(range(0, len(data), size)):
            if pace:
                time.sleep(max(0.0, began + (i + 1) * piece_s / pace - time.monotonic()))
            self.append(data[at : at + size])

    def wait(self, kind: str, count: int = 1, timeout: float = WAIT_S):
        """The `count`th event of this type."""
        with self._news:
            there = self._news.wait_for(lambda: len(self.of(kind)) >= count or self.closed, timeout)
            found = self.of(kind)
        assert len(found) >= count, f"{len(found)} of {count} {kind}; {there=} {self.closed=}; got {self.kinds()}"
        return found[count - 1]

    def wait_closed(self, timeout: float = WAIT_S) -> Exception:
        with self._news:
            assert self._news.wait_for(lambda: self.closed is not None, timeout), "still open"
        return self.closed

    def of(self, kind: str) -> list:
        return [event for event in self.events if event.type == kind]

    def kinds(self) -> list[str]:
        return [event.type.removeprefix(TRANSCRIPTION + ".") for event in self.events]

    def deltas(self, item_id: str) -> str:
        return "".join(event.delta for event in self.of(f"{TRANSCRIPTION}.delta") if event.item_id == item_id)

    def came(self, event) -> float:
        return self.at[self.events.index(event)]


@contextmanager
def session(server: Server, client: OpenAI | None = None, **heard) -> Iterator[Session]:
    """A session with these fields of audio.input; in the end every event must have been valid."""
    client = client or server.client
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        one = Session(connection)
        one.wait("session.created")
        if heard:
            one.update(**heard)
            one.wait("session.updated")
        yield one
    assert not one.faults, one.faults[0]


def figures(server: Server) -> dict[str, float]:
    """The server's own at /metrics, by name with labels."""
    import httpx

    lines = httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


__all__ = ["RATE", "TRANSCRIPTION", "Session", "figures", "pcm", "session"]
