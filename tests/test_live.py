"""/v1/realtime over real WebSockets with the official client: every transition, formats, faults, and held-out speech."""

import asyncio
import base64
import json
import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import held_out
import httpx
import jiwer
import numpy as np
import pytest
import soundfile
from clients import MODEL, WAVS, expected_text, wav_bytes
from conftest import Server
from glmasr_wire import TABLES
from live import CHECKED, RATE, TRANSCRIPTION, Session, figures, pcm, session
from openai import AsyncOpenAI
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

SAMPLE = next(wav for wav in WAVS if wav.stem == "en_french")
TEXT = expected_text(SAMPLE)
SILENCE_S = 1.2
SHARE_EQUAL = 0.98  # of turns
CLIPS, PACE, AT_ONCE = 24, 1.5, 3
COMMIT = ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
LEFT = ("glmasr_live_sessions", "glmasr_live_decodings", "glmasr_live_buffered_bytes", "vllm:num_requests_running", "vllm:num_requests_waiting")


def speech(silence_s: float = SILENCE_S) -> np.ndarray:
    samples, rate = soundfile.read(SAMPLE, dtype="float32")
    assert rate == 16000 and samples.ndim == 1
    samples = samples[: np.flatnonzero(np.abs(samples) > 0.02)[-1] + 800]  # without the pause that it ends with
    return np.concatenate([samples, np.zeros(int(silence_s * rate), np.float32)])


def words(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+", text.lower())


def offline(server: Server, samples: np.ndarray, rate: int = RATE) -> str:
    """The text of (samples,) int16 as a file."""
    file = ("clip.wav", wav_bytes(samples.astype(np.float32) / 32768, rate))
    return server.client.audio.transcriptions.create(model=MODEL, file=file).text


def left_over(server: Server) -> dict[str, float]:
    """What is not zero although nobody is connected."""
    found = figures(server)
    assert all(any(name.startswith(one) for name in found) for one in LEFT[:3])
    return {name: value for name, value in found.items() if name.startswith(LEFT) and value}


def assert_nothing_left(server: Server, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := left_over(server):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def turns(one: Session) -> list[tuple[str, str]]:
    """Each completed item's id and text."""
    return [(event.item_id, event.transcript) for event in one.of(f"{TRANSCRIPTION}.completed")]


# --- transitions --------------------------------------------------------------------------------------


def test_a_turn_by_server_vad_goes_through_its_events_in_order(server):
    with session(server) as one:
        one.stream(pcm(speech()), pace=0.6)
        done = one.wait(f"{TRANSCRIPTION}.completed")
        order = [kind for kind in one.kinds() if kind != "delta"]
        assert order == ["session.created", "input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped", *COMMIT, "completed"]
        assert len({event.event_id for event in one.events}) == len(one.events)
        assert len({event.item_id for event in one.events if hasattr(event, "item_id")}) == 1
        assert done.transcript == one.deltas(done.item_id) == TEXT
        assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 40
        loud = np.flatnonzero(np.abs(speech(0)) > 0.02) / 16
        start, stop = one.of("input_audio_buffer.speech_started")[0], one.of("input_audio_buffer.speech_stopped")[0]
        assert loud[0] - 400 <= start.audio_start_ms <= loud[0] and loud[-1] + 350 <= stop.audio_end_ms <= loud[-1] + 750
        assert one.came(one.of(f"{TRANSCRIPTION}.delta")[0]) < one.came(stop), "no text while the person speaks"


def test_turns_follow_one_another(server):
    with session(server) as one:
        one.stream(pcm(np.concatenate([speech(), speech()])), pace=4)
        one.wait(f"{TRANSCRIPTION}.completed", 2)
        first, second = one.of("input_audio_buffer.committed")
        assert first.previous_item_id is None and second.previous_item_id == first.item_id
        assert [text for _, text in turns(one)] == [TEXT, TEXT]
        assert [event.item.id for event in one.of("conversation.item.added")] == [first.item_id, second.item_id]


def test_a_manual_turn_begins_with_the_first_audio_and_ends_with_the_commit(server):
    with session(server, turn_detection=None) as one:
        one.stream(pcm(speech()), pace=4)
        one.send("input_audio_buffer.commit")
        assert one.wait(f"{TRANSCRIPTION}.completed").transcript == TEXT
        order = [kind for kind in one.kinds() if kind != "delta"]
        assert order == ["session.created", "session.updated", *COMMIT, "completed"]
        one.append(pcm(speech(0)))
        one.send("input_audio_buffer.clear")
        one.wait("input_audio_buffer.cleared")
        one.send("input_audio_buffer.commit", event_id="after-clear")
        assert one.wait("error").error.event_id == "after-clear"
        one.append(pcm(speech(0)))
        one.send("input_audio_buffer.commit")
        assert one.wait(f"{TRANSCRIPTION}.completed", 2).transcript == TEXT


def test_a_commit_ends_a_turn_of_server_vad_and_a_clear_drops_it(server):
    with session(server) as one:
        one.stream(pcm(speech(0)), pace=8)
        one.send("input_audio_buffer.commit")
        assert one.wait(f"{TRANSCRIPTION}.completed").transcript == TEXT
        one.stream(pcm(speech(0)), pace=8)
        one.wait("input_audio_buffer.speech_started", 2)
        one.send("input_audio_buffer.clear")
        one.wait("input_audio_buffer.cleared")
        one.stream(pcm(speech()), pace=8)
        assert one.wait(f"{TRANSCRIPTION}.completed", 2).transcript == TEXT
        assert len(one.of("input_audio_buffer.committed")) == 2


@pytest.mark.parametrize(("eagerness", "silence_s"), [("high", 0.5), ("low", 2.0)])
def test_semantic_vad_waits_by_eagerness(server, eagerness, silence_s):
    with session(server, turn_detection={"type": "semantic_vad", "eagerness": eagerness}) as one:
        one.stream(pcm(speech(silence_s + 1)), pace=8)
        stop = one.wait("input_audio_buffer.speech_stopped")
        spoken_ms = np.flatnonzero(np.abs(speech(0)) > 0.02)[-1] / 16
        assert -150 <= stop.audio_end_ms - spoken_ms - 1000 * silence_s <= 250
        assert one.wait(f"{TRANSCRIPTION}.completed").transcript == TEXT


def test_the_async_client_works_as_it_is(server):
    async def talk() -> list:
        client, events = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY"), []
        async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            await connection.session.update(session={"type": "transcription", "audio": {"input": {"transcription": {"model": MODEL, "language": "en"}}}})
            data = pcm(speech())
            for at in range(0, len(data), 9600):
                await connection.input_audio_buffer.append(audio=base64.b64encode(data[at : at + 9600]).decode())
            while not events or not events[-1].type.endswith(".completed"):
                events.append(CHECKED.validate_json(await connection.recv_bytes(), strict=True))
        return events

    events = asyncio.run(asyncio.wait_for(talk(), 60))
    assert events[-1].transcript == TEXT and events[1].type == "session.updated"
    assert events[1].session.audio.input.transcription.language == "en"


@pytest.mark.parametrize("heard", [{"type": "audio/pcm", "rate": 16000}, {"type": "audio/pcm", "rate": 24000}, {"type": "audio/pcm", "rate": 48000},
                                   {"type": "audio/pcmu"}, {"type": "audio/pcma"}], ids=lambda heard: f"{heard['type']} {heard.get('rate', '')}")  # fmt: skip
def test_each_format_gives_the_text_that_the_same_audio_has_as_a_file(server, heard):
    rate, table = heard.get("rate", 8000), TABLES.get(heard["type"])
    samples = np.frombuffer(pcm(speech(), rate), "<i2")
    data = samples.tobytes()
    if table is not None:  # to the nearest code
        order = np.argsort(table, kind="stable")
        codes = order[np.searchsorted(table[order], samples).clip(0, 255)].astype(np.uint8)
        samples, data = table[codes], codes.tobytes()
    with session(server, format=heard) as one:
        one.stream(data, rate=rate, pace=8, width=1 if table is not None else 2)
        done = one.wait(f"{TRANSCRIPTION}.completed")
        start, stop = one.of("input_audio_buffer.speech_started")[0].audio_start_ms, one.of("input_audio_buffer.speech_stopped")[0].audio_end_ms
    assert words(done.transcript) and done.transcript == offline(server, samples[start * rate // 1000 : stop * rate // 1000], rate)
    if heard["type"] == "audio/pcm":
        assert done.transcript == TEXT


# --- faults -------------------------------------------------------------------------------------------


def test_bad_events_get_an_error_with_their_id_and_the_session_lives(server):
    with session(server) as one:
        def update(**heard) -> dict:
            return {"type": "session.update", "session": {"type": "transcription", "audio": {"input": heard}}}

        bad = [
            ({"type": "response.create"}, "invalid_value"), ({"type": "input_audio_buffer.append", "audio": "%%"}, "invalid_value"),
            ({"type": "input_audio_buffer.append", "audio": "YQ=="}, "invalid_value"), ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty"),
            ({"type": "input_audio_buffer.append"}, "missing_required_parameter"), (update(format={"type": "audio/opus"}), "invalid_value"),
            (update(voice="x"), "unknown_parameter"), (update(transcription={"model": "whisper-9"}), "invalid_value"),
            (update(transcription={"language": "xx"}), "invalid_value"), ({"type": "transcription_session.update", "session": {}}, "invalid_value"),
        ]  # fmt: skip
        for i, (event, code) in enumerate(bad):
            one.raw(json.dumps(event | {"event_id": f"bad-{i}"}))
            told = one.wait("error", i + 1).error
            assert (told.event_id, told.code, told.type) == (f"bad-{i}", code, "invalid_request_error"), told
        for message in ("{", "5", "\0"):
            one.raw(message)
        one.wait("error", len(bad) + 3)
        one.stream(pcm(speech()), pace=8)
        assert one.wait(f"{TRANSCRIPTION}.completed").transcript == TEXT


def test_turn_detection_and_format_stay_while_an_item_is_open(server):
    with session(server) as one:
        one.stream(pcm(speech(0)), pace=8)
        one.wait("input_audio_buffer.speech_started")
        one.update(turn_detection=None)
        assert one.wait("error").error.param == "session.audio.input.turn_detection"
        one.update(format={"type": "audio/pcmu"})
        assert one.wait("error", 2).error.param == "session.audio.input.format"
        one.append(pcm(np.zeros(16000, np.float32)))
        assert one.wait(f"{TRANSCRIPTION}.completed").transcript == TEXT
        one.update(turn_detection=None, format={"type": "audio/pcm", "rate": 16000})
        one.wait("session.updated")
        one.append(pcm(speech(), 16000))
        one.send("input_audio_buffer.commit")
        assert one.wait(f"{TRANSCRIPTION}.completed", 2).transcript == TEXT


def test_silence_and_noise_start_no_turn(server):
    rng = np.random.default_rng(0)
    with session(server) as one:
        one.append(pcm((0.01 * rng.standard_normal(16000 * 5)).astype(np.float32)))
        one.append(pcm(np.zeros(16000 * 5, np.float32)))
        one.send("input_audio_buffer.clear")
        one.wait("input_audio_buffer.cleared")
        assert one.kinds() == ["session.created", "input_audio_buffer.cleared"]


def url(server: Server) -> str:
    return server.url.replace("http", "ws") + "/v1/realtime?intent=transcription"


def append(data: bytes) -> str:
    return f'{{"type": "input_audio_buffer.append", "audio": "{base64.b64encode(data).decode()}"}}'


def test_a_client_that_vanishes_leaves_no_work_in_the_engine(server):
    sound = pcm(np.tile(speech(0), 3))
    manual = '{"type": "session.update", "session": {"type": "transcription", "audio": {"input": {"turn_detection": null}}}}'
    connection = connect(url(server), compression=None)
    for message in (manual, append(sound), '{"type": "input_audio_buffer.commit"}'):
        connection.send(message)
    while "committed" not in connection.recv(20):
        pass
    connection.socket.close()  # no closing handshake
    assert_nothing_left(server, 1.5)


def test_a_client_that_does_not_read_is_left(server):
    before = figures(server).get('glmasr_live_drops_total{reason="not_reading"}', 0)
    connection = connect(url(server), compression=None, max_queue=1)
    connection.recv_bufsize = 1
    deadline = time.monotonic() + 60
    with pytest.raises((OSError, ConnectionClosed)):  # which of them depends on the moment
        while time.monotonic() < deadline:
            connection.send('{"type": "' + 80 * "x" + '"}')
    assert time.monotonic() < deadline
    connection.socket.close()
    assert_nothing_left(server, 10)
    assert sum(value for name, value in figures(server).items() if "not_reading" in name) > before


def test_nothing_is_left_of_connections_that_end_at_random(server):
    rng, data = random.Random(5), pcm(speech())

    def come_and_go(seed: int) -> None:
        mine = random.Random(seed)
        connection = connect(url(server), compression=None)
        for at in range(0, mine.randrange(len(data)), 48000):
            connection.send(append(data[at : at + 48000]))
            if mine.random() < 0.2:
                time.sleep(mine.random() / 5)
        if mine.random() < 0.2:
            connection.send('{"type": "input_audio_buffer.commit"}')
        if mine.random() < 0.5:
            connection.socket.shutdown(socket.SHUT_RDWR)  # close() would wait for the thread that is reading
        else:
            connection.close()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(come_and_go, [rng.random() for _ in range(200)]))
    assert_nothing_left(server, 5)


# --- held-out speech ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(server) -> list[tuple[held_out.Clip, np.ndarray, list[tuple[int, int, str, str]]]]:
    """Each clip with its audio as it was sent, and its turns: begin and end in ms, deltas, final text."""
    clips = held_out.speech_clips(CLIPS, seed=11)

    def stream(clip: held_out.Clip):
        data = pcm(np.concatenate([clip.waveform, np.zeros(16000, np.float32)]))
        with session(server) as one:
            one.stream(data, pace=PACE)
            time.sleep(0.3)
            one.wait(f"{TRANSCRIPTION}.completed", len(one.of("input_audio_buffer.committed")))
            begins = {event.item_id: event.audio_start_ms for event in one.of("input_audio_buffer.speech_started")}
            ends = {event.item_id: event.audio_end_ms for event in one.of("input_audio_buffer.speech_stopped")}
            return [(begins[item], ends[item], one.deltas(item), text) for item, text in turns(one)], np.frombuffer(data, "<i2")

    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(stream, clips))
    return [(clip, samples, spoken) for clip, (spoken, samples) in zip(clips, found, strict=True)]


def test_final_text_is_what_the_turn_has_as_a_file(server, streamed):
    pairs = [(text, offline(server, samples[begin * 24 : end * 24])) for _, samples, spoken in streamed for begin, end, _, text in spoken]
    equal = sum(one == other for one, other in pairs) / len(pairs)
    print(f"{equal:.1%} of {len(pairs)} turns have the offline text")
    assert len(pairs) >= CLIPS and equal >= SHARE_EQUAL, [pair for pair in pairs if pair[0] != pair[1]]


def test_deltas_have_the_words_of_the_finals(streamed):
    rates = []
    for part in (2, 3):
        said = [" ".join(words(" ".join(turn[part] for turn in spoken))) for _, _, spoken in streamed]
        rates.append(100 * jiwer.wer([" ".join(words(clip.text)) for clip, _, _ in streamed], said))
    print(f"WER over deltas {rates[0]:.2f} %, over finals {rates[1]:.2f} % (characters for Mandarin)")
    assert rates[0] == pytest.approx(rates[1], abs=0.5) and rates[1] < 3


@pytest.mark.parametrize("detection", [None, {"type": "server_vad", "silence_duration_ms": 5000}], ids=["manual", "server_vad"])
def test_a_long_turn_is_one_item_with_no_word_lost_or_doubled(server, detection):
    clips = [clip for clip in held_out.speech_clips(60, seed=12) if clip.language == "en" and not clip.noisy][:12]
    whole = np.concatenate([clip.waveform for clip in clips])
    with session(server, turn_detection=detection) as one:
        one.stream(pcm(whole), pace=12)
        if detection:
            one.append(pcm(np.zeros(16000 * 6, np.float32)))
        else:
            one.send("input_audio_buffer.commit")
        done = one.wait(f"{TRANSCRIPTION}.completed")
        assert len(turns(one)) == 1 and words(one.deltas(done.item_id)) == words(done.transcript)
    expected = words(" ".join(clip.text for clip in clips))
    wer = 100 * jiwer.wer(" ".join(expected), " ".join(words(done.transcript)))
    print(f"{whole.size / 16000:.0f} s in one item, {len(expected)} words: WER {wer:.1f} %")
    assert whole.size > 40 * 16000 and wer < 5


def test_the_metrics_tell_of_the_sessions(server, streamed):
    found = figures(server)
    assert found["glmasr_live_audio_seconds_total"] > 10
    assert found["glmasr_live_final_seconds_count"] >= CLIPS and found["glmasr_live_partial_seconds_count"] > CLIPS
    assert httpx.get(f"{server.url}/v1/realtime").status_code == 404
