"""Long recordings over real HTTP, held to bounds: whole, each sentence once and at its time, soon, in little memory; many at once.

The recording is that of bench/long_recording.py, some minutes of it; the bench sends hours.
"""

import http.client
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from clients import MODEL
from conftest import ROOT, Server
from openai.types.audio import TranscriptionVerbose
from test_transcription import running

sys.path.insert(0, str(ROOT / "bench"))
import recordings  # noqa: E402
from memory import Peak  # noqa: E402
from recordings import NEAR_S, Sentence  # noqa: E402

MINUTES, SEED = 4, 11
MAX_LOSS = 1.5  # points of WER: one sentence in these minutes is one; the bench holds hours to 0.5
MIN_NEAR, MAX_RISE, MAX_FIRST_S = 0.95, 500e6, 2.0  # share of times, bytes, seconds
TOGETHER, LEAVING, TOGETHER_S = 64, 20, 40  # requests at once, those that leave, seconds of audio each
MAX_HEALTH_S = 1.0


@dataclass(frozen=True)
class Recording:
    path: Path
    sentences: list[Sentence]


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    path = tmp_path_factory.mktemp("long") / "recording.wav"
    return Recording(path, recordings.write(path, MINUTES * 60, SEED))


@pytest.fixture(scope="module")
def peak(server: Server) -> Peak:
    """Memory of the API process before the first long recording."""
    return Peak(server.pid)


@pytest.fixture(scope="module")
def transcript(server: Server, recording: Recording, peak: Peak) -> TranscriptionVerbose:
    return server.client.audio.transcriptions.create(model=MODEL, file=recording.path, response_format="verbose_json")


@pytest.fixture(scope="module")
def streamed(server: Server, recording: Recording, peak: Peak) -> tuple[str, float]:
    """The text of a stream, and the seconds to its first delta."""
    began, first_s = time.monotonic(), None
    for event in server.client.audio.transcriptions.create(model=MODEL, file=recording.path, stream=True):
        first_s = first_s or time.monotonic() - began
    return event.text, first_s


def test_a_long_recording_has_no_more_errors_than_its_sentences_alone(server, recording, transcript, tmp_path):
    def alone(sentence: Sentence) -> str:
        with (tmp_path / f"{sentence.begin}.wav").open("w+b") as file:
            recordings.cut(recording.path, sentence, file)
            return server.client.audio.transcriptions.create(model=MODEL, file=file).text

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(alone, recording.sentences))
    together, one_by_one = (recordings.score(recording.sentences, text).wer for text in (transcript.text, " ".join(texts)))
    print(f"{len(recording.sentences)} sentences: {together:.2f} % wrong in the recording, {one_by_one:.2f} % one by one")
    assert together <= one_by_one + MAX_LOSS


def test_every_sentence_is_there_once(recording, transcript, streamed):
    for text in (transcript.text, streamed[0]):
        scored = recordings.score(recording.sentences, text)
        assert (scored.missing, scored.twice) == ([], [])


def test_a_transcript_that_lacks_a_sentence_or_has_one_twice_is_noticed(recording):
    texts = [sentence.text for sentence in recording.sentences]
    longest = max(range(len(texts)), key=lambda i: len(recordings.units(texts[i])))
    whole, lacking = " ".join(texts), " ".join(texts[:longest] + texts[longest + 1 :])
    doubled = " ".join(texts[: longest + 1] + texts[longest:])
    assert recordings.score(recording.sentences, whole).wer == 0
    assert recordings.score(recording.sentences, lacking).missing == [texts[longest]]
    assert len(recordings.score(recording.sentences, doubled).twice) == 1


def test_segments_begin_and_end_where_sentences_do(recording, transcript):
    errors = recordings.time_errors(recording.sentences, [(segment.start, segment.end) for segment in transcript.segments])
    print(f"{len(errors)} segments, {(errors <= NEAR_S).mean():.1%} of their times within {NEAR_S} s, worst {errors.max():.2f} s")
    assert (errors <= NEAR_S).mean() >= MIN_NEAR


def test_the_first_delta_comes_soon_and_little_memory_is_taken(transcript, streamed, peak):
    print(f"first delta after {streamed[1]:.2f} s; API process at most {peak.rise / 1e6:.0f} MB above idle")
    assert streamed[1] < MAX_FIRST_S
    assert peak.rise < MAX_RISE


# --- many at once, of which some leave ----------------------------------------------------------------


class Health(threading.Thread):
    """Asks /health over and over, inside a `with`, and notes how long it takes."""

    def __init__(self, server: Server):
        super().__init__(daemon=True)
        self.address, self.latencies_s, self.healthy = server.url.removeprefix("http://"), [], True
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            began, connection = time.monotonic(), http.client.HTTPConnection(self.address, timeout=30)
            connection.request("GET", "/health")
            self.healthy &= connection.getresponse().status == 200
            connection.close()
            self.latencies_s.append(time.monotonic() - began)

    def __enter__(self) -> "Health":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self.join()


@pytest.fixture(scope="module")
def short_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("together") / "recording.wav"
    recordings.write(path, TOGETHER_S, SEED + 1)
    return path


def leave(client: openai.OpenAI, path: Path, number: int) -> None:
    """Half of them while they wait for the whole answer, half after the first delta."""
    if number % 2:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=httpx.Timeout(60, read=0.5)).audio.transcriptions.create(model=MODEL, file=path)
        return
    stream = client.audio.transcriptions.create(model=MODEL, file=path, stream=True)
    assert next(iter(stream)).type == "transcript.text.delta"
    stream.close()


def test_of_many_long_requests_some_leave_and_none_of_the_others_is_lost(server, short_path):
    client = server.client  # one for all: each would read the certificates anew

    def stay(_: int) -> str:
        return client.audio.transcriptions.create(model=MODEL, file=short_path).text

    alone = stay(0)
    began = time.monotonic()
    with Health(server) as health, ThreadPoolExecutor(TOGETHER) as pool:
        leaving = [pool.submit(leave, client, short_path, number) for number in range(LEAVING)]
        texts = list(pool.map(stay, range(TOGETHER - LEAVING)))
        for one in leaving:
            one.result()
    slowest_s, took_s = max(health.latencies_s), time.monotonic() - began
    print(f"{TOGETHER} × {TOGETHER_S} s in {took_s:.1f} s, slowest of {len(health.latencies_s)} /health {slowest_s:.2f} s")
    assert texts == [alone] * (TOGETHER - LEAVING)
    assert health.healthy and slowest_s < MAX_HEALTH_S
    deadline = time.monotonic() + 5
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running(server) == 0
