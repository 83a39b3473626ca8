"""transcribe.py against a small made-up server: outputs, names, resuming, refusals; at the end against the real one."""

import base64
import email
import email.policy
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fractions import Fraction
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from conftest import ROOT, Server, free_port

import demo
import transcribe
import transcribe_files

RATE = 16000
MODEL = "made-up"
SENTENCE, CHINESE = "Tom & <b>Jerry</b> said: {{media}} \"no\".", "今天天气很好。"


def verbose(duration_s: float, first: str = SENTENCE) -> dict:
    """An answer as the server's: two segments."""
    half = duration_s / 2
    parts = [(0.0, half, first), (half, duration_s, CHINESE)]
    segments = [
        {"id": i, "start": start, "end": end, "text": text, "avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.0}
        for i, (start, end, text) in enumerate(parts)
    ]
    known = {"task": "transcribe", "language": "english", "duration": duration_s, "usage": {"type": "duration", "seconds": 1}}
    return known | {"text": f"{first} {CHINESE}", "segments": segments, "warnings": []}


@dataclass
class Fake:
    """A server that notes what it is asked; `answer` makes (status, headers, body) from a request's number and fields."""

    answer: Callable[[int, dict], tuple[int, dict, dict]]
    asked: list[dict] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, fields: dict) -> tuple[int, dict, dict]:
        with self._lock:
            self.asked.append(fields)
            self._now += 1
            self.most_at_once, number = max(self.most_at_once, self._now), len(self.asked)
        try:
            return self.answer(number, fields)
        finally:
            with self._lock:
                self._now -= 1
                self.answered.append(fields["sha"])


def handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, headers: dict, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if self.headers["Authorization"] == "Bearer wrong":
                return self.reply(401, {}, {"error": {"message": "Unauthorized"}})
            self.reply(200, {}, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "us"}]})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            parts = email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts()
            fields = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts}
            data = fields.pop("file")
            texts = {name: value.decode() for name, value in fields.items()}
            try:
                self.reply(*fake.take(texts | {"sha": hashlib.sha256(data).hexdigest(), "data": data}))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client has left, as a killed one does; or is to be left

    return Handler


def answer_well(_: int, fields: dict) -> tuple[int, dict, dict]:
    return 200, {}, verbose(soundfile.info(io.BytesIO(fields["data"])).duration)


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake(answer_well)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(made)) as server:
        server.daemon_threads = True
        made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield made
        server.shutdown()


def tone(path: Path, seed: int = 0, seconds: float = 0.5) -> Path:
    """A short recording unlike any of another seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).uniform(-0.1, 0.1, int(seconds * RATE)).astype(np.float32)
    soundfile.write(path, noise, RATE)
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(*options: object, **pipes: int) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    return subprocess.Popen([sys.executable, str(ROOT / "transcribe.py"), *map(str, options)], text=True, **pipes)


def run(*options: object) -> tuple[int, str, str]:
    """The command in this process, which is quicker: exit status, stdout, stderr."""
    output, errors = io.StringIO(), io.StringIO()
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["transcribe.py", *map(str, options)]
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            status = transcribe.main()
    except SystemExit as end:
        status = end.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return status, output.getvalue(), errors.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "waited 30 s in vain"
        time.sleep(0.01)


def test_all_formats_of_one_recording(fake: Fake, tmp_path: Path):
    wav = tone(tmp_path / "a.wav", seconds=4)
    formats = "txt,srt,vtt,json,html"
    options = ("--language", "en", "--prompt", "So.", "--hotwords", "Müller,宋江", "--concurrency", 2)
    status, output, _ = run(wav, "--url", fake.url, "--formats", formats, *options)
    assert status == 0
    assert "1 of 1 transcribed" in output
    assert re.search(r"\d\.\d times real time", output)
    assert names(tmp_path) == ["a.html", "a.json", "a.srt", "a.txt", "a.vtt", "a.wav"]
    (asked,) = fake.asked
    assert asked["data"] == wav.read_bytes()
    assert {name: asked[name] for name in asked if name not in ("sha", "data")} == {
        "model": MODEL, "response_format": "verbose_json", "timestamp_granularities[]": "segment",
        "language": "en", "prompt": "So.", "hotwords": "Müller,宋江",
    }  # fmt: skip
    assert (tmp_path / "a.txt").read_text() == f"{SENTENCE} {CHINESE}\n"
    assert json.loads((tmp_path / "a.json").read_text()) == {"file": "a.wav", **verbose(4.0)}
    srt = (tmp_path / "a.srt").read_text()
    assert srt.startswith("1\n00:00:00,000 --> 00:00:02,000\nTom") and f"00:00:02,000 --> 00:00:04,000\n{CHINESE}\n" in srt
    assert (tmp_path / "a.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n")


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text of its segments."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.in_span = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.in_span = tag == "span"

    def handle_endtag(self, tag: str) -> None:
        self.in_span = False

    def handle_data(self, data: str) -> None:
        if self.in_span:
            self.texts.append(data)

    def attributes(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_is_escaped_and_finds_its_audio(fake: Fake, tmp_path: Path):
    wav = tone(tmp_path / "in" / 'a "b"<i>#100% 录音.wav')
    status, *_ = run(wav, "--url", fake.url, "--formats", "html", "--out", tmp_path / "out")
    assert status == 0
    text = next((tmp_path / "out").iterdir()).read_text()
    page = Page(text)
    assert page.texts == [SENTENCE, CHINESE]
    assert not page.attributes("i") and not page.attributes("b")
    (audio,) = page.attributes("audio")
    assert audio["src"] == "../in/a%20%22b%22%3Ci%3E%23100%25%20%E5%BD%95%E9%9F%B3.wav"
    assert [(row["data-start"], row["data-end"]) for row in page.attributes("li")] == [("0.000", "0.250"), ("0.250", "0.500")]
    assert page.attributes("html") == [{"lang": "en"}]
    assert "http" not in text and page.attributes("meta")[1]["name"] == "viewport"


def test_an_embedded_page_holds_the_audio(fake: Fake, tmp_path: Path):
    wav = tone(tmp_path / "a.wav")
    assert run(wav, "--url", fake.url, "--formats", "html", "--embed")[0] == 0
    (audio,) = Page((tmp_path / "a.html").read_text()).attributes("audio")
    kind, _, data = audio["src"].partition(";base64,")
    assert kind == "data:audio/wav" and base64.b64decode(data) == wav.read_bytes()


def test_folders_and_names(fake: Fake, tmp_path: Path):
    source, out = tmp_path / "in", tmp_path / "out"
    for i, name in enumerate(("a.wav", "a.flac", "b.WAV", "deep/er/a.ogg", ".hidden.wav", "deep/._a.ogg")):
        tone(source / name, i)
    (source / "notes.txt").write_text("mine")
    assert run(source, "--url", fake.url, "--formats", "txt", "--out", out)[0] == 0
    assert names(out) == ["a.flac.txt", "a.wav.txt", "b.txt", "deep/er/a.txt"]
    assert run(source, source / "b.WAV", "--url", fake.url, "--formats", "txt")[0] == 0
    assert [name for name in names(source) if name.endswith("txt")] == [*names(out), "notes.txt"]
    assert len(fake.asked) == 8
    two = ("--url", fake.url, "--formats", "txt", "--out", tmp_path / "two")
    assert run(source / "a.wav", source / "deep" / "er" / "a.ogg", *two)[0] == 0
    assert names(tmp_path / "two") == ["a.wav.txt", "deep/er/a.txt"]


def test_a_name_that_is_not_utf8(fake: Fake, tmp_path: Path):
    wav = tone(tmp_path / "a.wav")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.wav"))
    wav.rename(odd)
    assert run(tmp_path, "--url", fake.url, "--formats", "txt,json,html")[0] == 0
    assert len(list(tmp_path.iterdir())) == 4
    assert "%FF%0A.wav" in odd.with_suffix(".html").read_text()


def video(path: Path, audio_from_s: float = 1.0, seconds: float = 2.0, with_audio: bool = True) -> Path:
    """A small film whose sound, a tone, begins later than its pictures."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg4", rate=10)
        pictures.width = pictures.height = 64
        sound = container.add_stream("aac", rate=44100, layout="stereo") if with_audio else None
        for i in range(int((audio_from_s + seconds) * 10)):
            picture = av.VideoFrame(64, 64, "yuv420p")
            picture.pts, picture.time_base = i, Fraction(1, 10)
            container.mux(pictures.encode(picture))
        container.mux(pictures.encode(None))
        if sound:
            samples = (8000 * np.sin(np.arange(int(seconds * 44100)) * 0.1)).astype(np.int16)
            for first in range(0, samples.size, 1024):
                part = np.repeat(samples[first : first + 1024], 2)[None]
                frame = av.AudioFrame.from_ndarray(part, "s16", "stereo")
                frame.sample_rate, frame.time_base = 44100, Fraction(1, 44100)
                frame.pts = int(audio_from_s * 44100) + first
                container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def test_a_video_is_sent_as_flac_in_step_with_its_pictures(fake: Fake, tmp_path: Path):
    film = video(tmp_path / "film.mp4")
    status, *_ = run(film, "--url", fake.url, "--formats", "srt,html")
    assert status == 0
    waveform, rate = soundfile.read(io.BytesIO(fake.asked[0]["data"]))
    assert rate == RATE and waveform.ndim == 1
    assert waveform.size / RATE == pytest.approx(3.0, abs=0.1)
    assert np.argmax(np.abs(waveform) > 0.1) / RATE == pytest.approx(1.0, abs=0.05)
    assert Page((tmp_path / "film.html").read_text()).attributes("video")[0]["src"] == "film.mp4"


def test_a_large_recording_is_sent_as_flac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wav = tmp_path / "a.wav"
    soundfile.write(wav, np.zeros((48000, 2)), 48000)
    assert transcribe_files.probe(wav) == ("WAV", 1.0)
    monkeypatch.setattr(transcribe_files, "MOST_AS_IS", 1000)
    assert transcribe_files.probe(wav) == (None, 1.0)
    waveform, rate = soundfile.read(transcribe_files.as_flac(wav, threading.Event()))
    assert (waveform.size, rate) == (RATE, RATE)


def test_failures_have_a_line_each_and_status_1(fake: Fake, tmp_path: Path):
    good, bad = tone(tmp_path / "good.wav", 1), tone(tmp_path / "bad.wav", 2)
    (tmp_path / "broken.mp3").write_bytes(b"no audio at all" * 100)
    (tmp_path / "empty.wav").touch()
    video(tmp_path / "silent.mp4", with_audio=False)

    def answer(number: int, fields: dict) -> tuple[int, dict, dict]:
        if fields["sha"] == sha(bad):
            return 400, {}, {"error": {"message": "audio is 0.050 s long;\nat least 0.1 s is needed", "code": 400}}
        status, headers, body = answer_well(number, fields)
        return status, headers, body | {"warnings": ["it repeats itself"]}

    fake.answer = answer
    status, output, errors = run(tmp_path, "--url", fake.url)
    assert status == 1
    lines = [line for line in errors.splitlines() if line.startswith("FAILED")]
    assert [re.search(r"(\w+\.\w+): (.*)", line)[1] for line in lines] == ["bad.wav", "broken.mp3", "empty.wav", "silent.mp4"]
    assert "audio is 0.050 s long; at least 0.1 s is needed" in lines[0]
    assert "Invalid data" in lines[1] and "no audio track" in lines[3]
    assert f"warning  {good}: it repeats itself" in output
    assert "1 of 5 transcribed" in output
    assert [name for name in names(tmp_path) if name.endswith((".txt", ".srt", ".part"))] == ["good.srt", "good.txt"]


def test_a_full_server_is_asked_again_when_it_says(fake: Fake, tmp_path: Path):
    wavs = [tone(tmp_path / f"{i}.wav", i) for i in range(6)]

    def answer(number: int, fields: dict) -> tuple[int, dict, dict]:
        if number <= 4:
            return 503, {"Retry-After": "0.3"}, {"error": {"message": "the server is full"}}
        return answer_well(number, fields)

    fake.answer = answer
    began = time.monotonic()
    assert run(tmp_path, "--url", fake.url, "--concurrency", 3)[0] == 0
    assert time.monotonic() - began > 0.3
    assert len(fake.asked) == 10
    assert {asked["sha"] for asked in fake.asked[4:]} == set(map(sha, wavs))  # sent again whole
    assert fake.most_at_once <= 3


def test_a_slow_file_fails_after_the_timeout_and_the_others_do_not(fake: Fake, tmp_path: Path):
    slow = tone(tmp_path / "slow.wav", 1)
    tone(tmp_path / "fast.wav", 2)

    def answer(number: int, fields: dict) -> tuple[int, dict, dict]:
        if fields["sha"] == sha(slow):
            time.sleep(3)
        return answer_well(number, fields)

    fake.answer = answer
    status, output, errors = run(tmp_path, "--url", fake.url, "--timeout", 1)
    assert status == 1 and "1 of 2 transcribed" in output
    assert f"FAILED   {slow}: not done after 1 s; --timeout gives it longer" in errors


def test_an_answer_without_segments_is_a_failure(fake: Fake, tmp_path: Path):
    fake.answer = lambda *_: (200, {}, {"text": "hello", "usage": {"type": "duration", "seconds": 1}})
    status, _, errors = run(tone(tmp_path / "a.wav"), "--url", fake.url)
    assert status == 1 and "answered without duration, language, segments" in errors


def test_only_what_is_missing_or_older_is_done(fake: Fake, tmp_path: Path):
    a, b = tone(tmp_path / "a.wav", 1), tone(tmp_path / "b.wav", 2)
    os.utime(b, (time.time() + 1000,) * 2)  # recorded by a camera whose clock is ahead
    assert run(tmp_path, "--url", fake.url)[0] == 0
    assert run(tmp_path, "--url", fake.url) == (0, "2 done already; --overwrite transcribes them again\n", "")
    assert len(fake.asked) == 2
    (tmp_path / "a.txt").write_text("corrected by hand")
    (tmp_path / "a.srt").unlink()
    assert run(tmp_path, "--url", fake.url)[0] == 0
    assert len(fake.asked) == 3 and (tmp_path / "a.srt").exists()
    assert (tmp_path / "a.txt").read_text() == "corrected by hand"
    tone(a, 3)
    os.utime(a, (time.time() + 1,) * 2)
    assert run(tmp_path, "--url", fake.url)[0] == 0
    assert fake.asked[3]["sha"] == sha(a) and (tmp_path / "a.txt").read_text().startswith("Tom")
    assert run(tmp_path, "--url", fake.url, "--overwrite")[0] == 0
    assert len(fake.asked) == 6


def test_a_recording_that_changes_meanwhile_is_not_done(fake: Fake, tmp_path: Path):
    wav = tone(tmp_path / "a.wav")

    def answer(number: int, fields: dict) -> tuple[int, dict, dict]:
        os.utime(wav)
        return answer_well(number, fields)

    fake.answer = answer
    status, _, errors = run(wav, "--url", fake.url)
    assert status == 1 and "it has changed while it was transcribed" in errors
    assert names(tmp_path) == ["a.wav"]


def test_killed_midway_and_run_again_each_file_is_done_once(fake: Fake, tmp_path: Path):
    wavs = [tone(tmp_path / "in" / f"{i % 7}" / f"{i:03}.wav", i, 0.2) for i in range(200)]

    def answer(number: int, fields: dict) -> tuple[int, dict, dict]:
        time.sleep(0.02)
        return answer_well(number, fields)

    fake.answer = answer
    options = (tmp_path / "in", "--url", fake.url, "--out", tmp_path / "out")
    first = start(*options)
    until(lambda: len(fake.answered) >= 80)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    time.sleep(0.3)  # for requests that were on their way
    until(lambda: fake._now == 0)
    before = Counter(asked["sha"] for asked in fake.asked)
    assert set(before.values()) == {1} and 80 <= len(before) < 200

    def finished(wav: Path) -> bool:
        stem = (tmp_path / "out" / wav.relative_to(tmp_path / "in")).with_suffix("")
        whole = {".txt": f"{SENTENCE} {CHINESE}\n", ".srt": None}
        for suffix, text in whole.items():
            if (output := stem.with_suffix(suffix)).exists():  # what is there is whole
                assert output.read_text() == text if text else output.read_text().endswith(f"{CHINESE}\n")
        return all(stem.with_suffix(suffix).exists() for suffix in whole)

    rest = [wav for wav in wavs if not finished(wav)]
    assert 0 < len(rest) <= 200 - len(before) + 8  # at most what was in flight is asked for twice
    count = len(fake.asked)
    status, output, _ = run(*options)
    assert status == 0
    assert sorted(asked["sha"] for asked in fake.asked[count:]) == sorted(map(sha, rest))
    assert f"{200 - len(rest)} done already" in output and f"{len(rest)} of {len(rest)} transcribed" in output
    assert all(map(finished, wavs))
    assert len(names(tmp_path / "out")) == 400 and not [name for name in names(tmp_path) if name.endswith(".part")]
    assert run(*options)[0] == 0 and len(fake.asked) == count + len(rest)


def test_what_a_kill_left_of_an_unfinished_output_is_replaced(fake: Fake, tmp_path: Path):
    tone(tmp_path / "a.wav")
    (tmp_path / ".a.txt.part").write_text("half a sen")
    assert run(tmp_path, "--url", fake.url, "--formats", "txt")[0] == 0
    assert names(tmp_path) == ["a.txt", "a.wav"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_cleanly(fake: Fake, tmp_path: Path, number: signal.Signals):
    for i in range(40):
        tone(tmp_path / f"{i}.wav", i)

    def answer(number: int, fields: dict) -> tuple[int, dict, dict]:
        time.sleep(0.1 if number < 10 else 10)
        return answer_well(number, fields)

    fake.answer = answer
    process = start(tmp_path, "--url", fake.url)
    until(lambda: len(fake.asked) >= 15)
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 130
    assert errors == "interrupted; the same command goes on from here\n"
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


def test_a_server_that_goes_away_ends_the_run(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(20):
        tone(tmp_path / f"{i}.wav", i)

    def answer(number: int, fields: dict) -> tuple[int, dict, dict]:
        if number > 4:
            raise BrokenPipeError  # closes the connection
        return answer_well(number, fields)

    fake.answer = answer
    monkeypatch.setattr(transcribe, "RETRIES", 0)
    status, output, errors = run(tmp_path, "--url", fake.url, "--concurrency", 1)
    assert status == 1
    assert errors.count("has stopped answering") == 1
    assert "15 more not tried; start the server and run the same command again" in errors
    assert "4 of 20 transcribed" in output


def test_the_bar_counts_hours_and_files(fake: Fake, tmp_path: Path):
    for i in range(4):
        tone(tmp_path / f"{i}.wav", i, 36)
    seen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (25, 120))
    process = start(tmp_path, "--url", fake.url, stderr=terminal)
    process.communicate(timeout=30)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(seen, 65536):
            shown += part
    except OSError:  # the terminal's end
        pass
    os.close(seen)
    assert process.returncode == 0
    assert "0.04 of 0.04 h" in shown.decode() and "4/4 files, 0 failed" in shown.decode()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--formats", "txt,doc"], "--formats: doc; expected some of txt,srt,vtt,json,html"),
        (["--formats", ""], "--formats needs a format"),
        (["--concurrency", "0"], "--concurrency a number from 1 on"),
        (["--embed"], "add html to --formats"),
        (["--url", "localhost:8300"], "expected a URL such as http://localhost:8300/v1"),
        (["missing.wav"], "missing.wav: no such file or folder"),
        (["empty"], "empty: no recordings in this folder"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_to_do(tmp_path: Path, options: list[str], message: str):
    tone(tmp_path / "a.wav")
    (tmp_path / "empty").mkdir()
    options = [str(tmp_path / option) if option in ("missing.wav", "empty") else option for option in options]
    status, _, errors = run(tmp_path / "a.wav", *options)
    assert status == 2
    assert message in errors


def test_two_recordings_never_share_an_output(tmp_path: Path):
    for i, name in enumerate(("a.wav", "a.mp3", "a.wav.flac")):
        shutil.copy(tone(tmp_path / "tone.wav", i), tmp_path / name)
    (tmp_path / "tone.wav").unlink()
    with pytest.raises(ValueError, match=r"would both be written to .*a\.wav\.txt; rename one"):
        transcribe_files.plan([tmp_path], None, ["txt"], False)


def test_a_wrong_key_or_no_server_elsewhere_is_status_1(fake: Fake, tmp_path: Path):
    wav = tone(tmp_path / "a.wav")
    status, _, errors = run(wav, "--url", fake.url, "--api-key", "wrong")
    assert status == 1 and "Unauthorized" in errors
    status, _, errors = run(wav, "--url", f"http://127.0.0.2:{free_port()}/v1")
    assert status == 1 and "no server answers at" in errors


def test_a_server_that_cannot_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (demo, transcribe):
        monkeypatch.setattr(module, "LOG", tmp_path / "server.log")
    with socket.socket() as held:  # bound, but nobody answers
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        status, output, errors = run(tone(tmp_path / "a.wav"), "--url", url)
    assert status == 1
    assert f"no server answers at {url}: starting one" in output
    assert "the server did not start" in errors and "serve: " in errors


def test_a_folder_through_the_real_server(server: Server, tmp_path: Path):
    status, output, errors = run(ROOT / "wavs", "--url", f"{server.url}/v1", "--out", tmp_path)
    print(output)
    assert status == 0, errors
    for expected in sorted((ROOT / "wavs").glob("*.txt")):
        assert (tmp_path / expected.name).read_text() == expected.read_text(), expected.name
        assert (tmp_path / expected.name).with_suffix(".srt").exists()
