"""Live transcription's limits, its key, its end, and the router alone in front of a server that comes and goes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import psutil
import pytest
from conftest import ROOT, Server, free_port, run_server
from demo import is_healthy
from live import TRANSCRIPTION, Session, figures, pcm, session
from test_live import TEXT, assert_nothing_left, speech
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

KEY = "a-key"
LIMITS = {"MAX_SESSIONS": "2", "MAX_SESSION_MINUTES": "0.2", "MAX_IDLE_S": "3", "MAX_MESSAGE_MB": "0.5", "MAX_TURN_S": "5"}


@pytest.fixture(scope="module")
def strict(tmp_path_factory) -> Iterator[Server]:
    """A server with a key and small limits; the last test here ends it."""
    with run_server(tmp_path_factory.mktemp("strict") / "server.log", API_KEY=KEY, MAX_MODEL_LEN="768", **LIMITS) as running:
        yield running


def client(server: Server, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def address(server: Server) -> str:
    return server.url.replace("http", "ws") + "/v1/realtime"


def test_a_wrong_key_is_refused_before_the_upgrade(strict):
    for headers, subprotocols in (({}, None), ({"Authorization": "Bearer no"}, None), ({}, ["realtime", "openai-insecure-api-key.no"])):
        with pytest.raises(InvalidStatus) as refused:
            connect(address(strict), additional_headers=headers, subprotocols=subprotocols)
        assert refused.value.response.status_code == 401


def test_a_browsers_key_in_the_subprotocol_is_taken(strict):
    with connect(address(strict), subprotocols=["realtime", f"openai-insecure-api-key.{KEY}"]) as connection:
        assert connection.subprotocol == "realtime" and '"session.created"' in connection.recv(10)


def test_more_sessions_than_there_are_places_are_refused_before_the_upgrade(strict):
    with session(strict, client(strict)), session(strict, client(strict)):
        with pytest.raises(InvalidStatus) as refused:
            connect(address(strict), additional_headers={"Authorization": f"Bearer {KEY}"})
        assert refused.value.response.status_code == 503 and refused.value.response.headers["Retry-After"]
        assert b"MAX_SESSIONS" in refused.value.response.body
    assert_nothing_left(strict, 2)
    with session(strict, client(strict)):
        pass


def test_an_idle_session_is_closed(strict):
    with session(strict, client(strict)) as one:
        closed = one.wait_closed(10)
        assert isinstance(closed, ConnectionClosed) and (closed.rcvd.code, closed.rcvd.reason) == (1000, "idle")


def test_a_session_that_has_lasted_its_time_ends_with_its_last_text(strict):
    with session(strict, client(strict)) as one:
        began = time.monotonic()
        while time.monotonic() - began < 11:  # of 12
            one.append(bytes(4800))
            time.sleep(0.1)
        one.append(pcm(speech(0)))
        closed = one.wait_closed(20)
        assert closed.rcvd.code == 1001
        assert one.of("error")[-1].error.code == "session_expired" and one.of(f"{TRANSCRIPTION}.completed")[0].transcript == TEXT


def test_too_large_a_message_and_too_long_a_turn_are_refused_and_the_session_lives(strict):
    with session(strict, client(strict), turn_detection=None) as one:
        one.append(bytes(500_000))
        assert one.wait("error").error.code == "message_too_large"
        for _ in range(3):
            one.append(bytes(5 * 24000))
        one.append(bytes(4800))
        assert one.wait("error", 2).error.code == "input_audio_buffer_full"
        one.send("input_audio_buffer.clear")
        one.append(pcm(speech(0)))
        one.send("input_audio_buffer.commit")
        assert one.wait(f"{TRANSCRIPTION}.completed").transcript == TEXT


def test_a_turn_that_the_engine_refuses_fails_and_the_next_one_does_not(strict):
    with session(strict, client(strict), turn_detection=None, transcription={"prompt": "word " * 790}) as one:
        one.append(pcm(speech(0)))
        one.send("input_audio_buffer.commit")
        failed = one.wait(f"{TRANSCRIPTION}.failed")
        assert failed.item_id == one.of("input_audio_buffer.committed")[0].item_id and failed.error.message
        one.update(transcription={"prompt": None})
        one.append(pcm(speech(0)))
        one.send("input_audio_buffer.commit")
        assert one.wait(f"{TRANSCRIPTION}.completed").transcript == TEXT


# --- the router alone ---------------------------------------------------------------------------------


class Switch(threading.Thread):
    """A port that leads to the server while it is on, and closes every connection while it is off."""

    def __init__(self, to: int):
        super().__init__(daemon=True)
        self.to, self.on, self.listener = to, True, socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        while True:
            came, _ = self.listener.accept()
            if not self.on:
                came.close()
                continue
            there = socket.create_connection(("127.0.0.1", self.to))
            for one, other in ((came, there), (there, came)):
                threading.Thread(target=self.carry, args=(one, other), daemon=True).start()

    def carry(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while self.on and (data := one.recv(65536)):
                other.sendall(data)
        except OSError:
            pass
        for end in (one, other):
            end.close()


@contextmanager
def router(*arguments: str) -> Iterator[Server]:
    port = free_port()
    process = subprocess.Popen([sys.executable, *arguments, "--port", str(port), "--host", "127.0.0.1"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not is_healthy(port):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield Server(f"http://127.0.0.1:{port}", 0, ROOT, process.pid)
    finally:
        process.terminate()
        assert process.wait(20) in (0, -signal.SIGTERM)


def test_the_router_alone_fails_a_turn_while_its_server_is_away_and_goes_on_when_it_is_back(strict):
    switch = Switch(int(strict.url.rpartition(":")[2]))
    with router("-m", "server.server_ws", "--upstream", f"http://127.0.0.1:{switch.port}") as alone:
        with session(alone, client(alone), turn_detection=None) as one:
            for on in (True, False, True):
                switch.on = on
                one.append(pcm(speech(0)))
                one.send("input_audio_buffer.commit")
                one.wait(f"{TRANSCRIPTION}.completed" if on else f"{TRANSCRIPTION}.failed", 1 + (on and len(one.of(f"{TRANSCRIPTION}.failed"))))
            assert [event.transcript for event in one.of(f"{TRANSCRIPTION}.completed")] == [TEXT, TEXT]
            assert one.of(f"{TRANSCRIPTION}.completed")[0].usage.type == "duration"
        assert figures(alone)["glmasr_live_audio_seconds_total"] > 5
        with session(alone, client(alone, "wrong"), turn_detection=None) as one:
            one.append(pcm(speech(0)))
            one.send("input_audio_buffer.commit")
            assert "401" in one.wait(f"{TRANSCRIPTION}.failed").error.message


def end_with_work_in_flight(one: Session, process: psutil.Process) -> None:
    one.append(pcm(speech(0)))
    one.send("input_audio_buffer.commit")
    one.wait("input_audio_buffer.committed")
    process.send_signal(signal.SIGTERM)
    closed = one.wait_closed(30)
    assert closed.rcvd.code == 1012, closed
    answered = [event.item_id for event in one.events if event.type.endswith((".completed", ".failed"))]
    assert answered == [event.item_id for event in one.of("input_audio_buffer.committed")]


def test_sigterm_delivers_what_is_in_flight_and_closes_with_1012(strict):
    port = int(strict.url.rpartition(":")[2])
    first = next(one for one in psutil.Process(os.getpid()).children() if str(port) in one.environ().get("PORT", ""))
    with session(strict, client(strict), turn_detection=None) as one:
        end_with_work_in_flight(one, first)
    first.wait(60)
