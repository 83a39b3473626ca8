"""What the benches compute: clips, bodies, the window that counts, ratios; and their clients against a small HTTP server."""

import base64
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import load  # noqa: E402
import report  # noqa: E402
from load import Answered, Load, Until, Workload  # noqa: E402
from report import Row  # noqa: E402

ANSWER_S = 0.05


class Handler(BaseHTTPRequestHandler):
    """Answers after ANSWER_S, and to every request after the server's `most` with 503."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.bodies.append(body)
            refused = len(self.server.bodies) > self.server.most
        time.sleep(ANSWER_S)
        self.send_response(503 if refused else 200)
        if refused:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_) -> None:
        """Nothing."""


@pytest.fixture
def http_server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.lock, server.bodies, server.most = threading.Lock(), [], 10**6
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def row(candidate: str, factor: float, released: bool = False, in_flight: int = 8) -> Row:
    return Row(candidate, released, "30 s", "chat", "wav", in_flight, factor, 1.0, 10, 0.1, 0.2, 0.3, 0.1, 1.0, None, None, None)


def test_clients_import_neither_torch_nor_vllm() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import load, sys; print(*{'torch', 'vllm'} & set(sys.modules))"],
        cwd=ROOT / "bench", capture_output=True, check=True, text=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == ""


def test_utterances_last_seven_seconds_on_average() -> None:
    rng = np.random.default_rng(0)
    lengths = load.seconds(Workload("utterances"), 20_000, rng)
    assert lengths.mean() == pytest.approx(load.UTTERANCE_MEAN_S, rel=0.05)
    assert lengths.min() >= load.SHORTEST_S and lengths.max() <= load.LONGEST_S
    assert load.seconds(Workload("30 s"), 2, rng).tolist() == [30.0, 30.0]


def test_every_clip_is_new_and_as_long_as_asked_for() -> None:
    lengths = [1.5, 0.5, 1.5, 100.0, 1.5]
    clip = load.speech(lengths, np.random.default_rng(0))
    clips = [clip(i) for i in range(len(lengths))]
    assert [one.size for one in clips] == [round(length * load.RATE) for length in lengths]
    assert len({one.tobytes() for one in clips}) == len(clips)


@pytest.mark.parametrize("encoding", load.MEDIA_TYPES)
@pytest.mark.parametrize("route", load.ROUTES)
def test_a_body_holds_the_clip(route: str, encoding: str) -> None:
    samples = load.speech([2.0], np.random.default_rng(0))(0)
    workload = Workload("2 s", route, encoding)
    body = load.body(workload, samples)
    if route == "chat":
        request = json.loads(body)
        part = request["messages"][0]["content"][0]["input_audio"]
        assert part["format"] == encoding and request["max_tokens"] == 8
        audio = base64.b64decode(part["data"])
    else:
        form = message_from_bytes(f"Content-Type: {load.content_type(workload)}\r\n\r\n".encode() + body)
        parts = {part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True) for part in form.walk()}
        assert parts["temperature"] == b"0" and parts["max_completion_tokens"] == b"8"
        audio = parts["file"]
    decoded, rate = soundfile.read(io.BytesIO(audio), dtype="int16")
    assert rate == load.RATE
    if encoding == "mp3":
        assert decoded.size >= samples.size
    else:
        np.testing.assert_array_equal(decoded, samples)


def test_neither_ramp_up_nor_drain_counts() -> None:
    answered = [Answered(10.0, sent=0.0, done=float(done), status=200, retry_after=None) for done in range(1, 9)]
    part = Load(answered, begin=2.0, end=6.0)
    assert [one.done for one in part.counted] == [3.0, 4.0, 5.0, 6.0]
    assert part.requests_a_second == 1.0 and part.real_time_factor == 10.0
    assert part.percentiles(50) == [4.5]


def test_clients_send_every_clip_once(http_server) -> None:
    done = load.send(url(http_server), Workload("1 s"), count=20, in_flight=4, processes=2, seed=0).check()
    assert len(done.answered) == 20
    assert len(set(http_server.bodies)) == 20
    assert done.begin == done.answered[3].done


def test_a_busy_servers_throughput_is_measured_and_the_run_ends(http_server, monkeypatch) -> None:
    monkeypatch.setattr(load, "LEAST_S", 1.0)
    part = load.steady(url(http_server), Workload("1 s"), in_flight=4, processes=1, seed=0, most_s=20)
    assert 0.9 < part.took < 3
    assert 0.1 < part.requests_a_second * ANSWER_S / 4 <= 1.05
    assert min(one.latency for one in part.counted) >= ANSWER_S


def test_a_run_ends_when_its_time_is_over(http_server) -> None:
    until = Until(rounds=10**6, least_s=0, most_s=0.5)
    part = load.send(url(http_server), Workload("0.5 s"), count=1000, in_flight=2, processes=1, seed=0, until=until)
    assert 2 <= len(part.answered) <= 2 * (1 + 0.5 / ANSWER_S)


def test_refusals_are_seen(http_server) -> None:
    http_server.most = 3
    part = load.send(url(http_server), Workload("0.5 s"), count=8, in_flight=8, processes=1, seed=0)
    assert sorted((one.status, one.retry_after) for one in part.answered) == [(200, None)] * 3 + [(503, "1")] * 5
    with pytest.raises(RuntimeError, match=r"5 of 8 requests were not answered with 200: \[503\]"):
        part.check()


def test_ratios_are_to_upstreams_best_under_the_same_load() -> None:
    rows = [
        row("upstream", 4.0, released=True),
        row("upstream, 8", 5.0, released=True),
        row("this", 20.0),
        row("this", 30.0, False, 1),
    ]
    assert [report.ratio(one, rows) for one in rows] == [0.8, 1.0, 4.0, None]
    assert report.line(rows[2], rows).startswith("| 30 s | chat wav | 8 | this | 20 | 4.00 |")


def test_runs_of_one_machine_become_one_report(tmp_path) -> None:
    about = {"hardware": "a computer", "versions": {"vllm": "0"}, "layers": None, "date": "2026-01-01"}
    first, second = ({**about, "rows": [vars(one) for one in rows]} for rows in (
        [row("upstream", 4.0, released=True), row("this", 10.0)], [row("this", 20.0)]))  # fmt: skip
    assert "| this | 20 | 5.00 |" in report.write(report.merged([first, second]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md", "throughput.svg", "throughput.png"}
    with pytest.raises(ValueError, match="hardware differs"):
        report.merged([first, second | {"hardware": "another"}])
