"""/v1/audio/transcriptions over real HTTP: OpenAI's contract by its client's own types, recordings of any length, refusals."""

import http.server
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import held_out
import httpx
import numpy as np
import openai
import pysubs2
import pytest
import soundfile
import webvtt
from clients import MODEL, WAVS, ask, expected_text, wav_bytes
from conftest import Server
from openai.types.audio import Transcription, TranscriptionStreamEvent, TranscriptionVerbose
from pydantic import TypeAdapter

RATE = 16000
SAMPLE = next(wav for wav in WAVS if wav.stem == "en_french")
PAUSES_S = (0.7, 3.0)  # between the sentences of a recording
MAX_TIME_ERROR_S = 0.3
MAX_LOSS = 2.0  # percent, of words or characters: two of those in this recording
SENTENCES, LONG_SENTENCES = 24, 60


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client


def create(client: openai.OpenAI, file=SAMPLE, **options):
    return client.audio.transcriptions.create(model=MODEL, file=file, **options)


def post(server: Server, data: dict | None = None, file: bytes | None = SAMPLE.read_bytes(), **options) -> httpx.Response:
    files = {"file": ("speech.wav", file)} if file is not None else {"other": ("", b"")}
    return httpx.post(f"{server.url}/v1/audio/transcriptions", files=files, data={"model": MODEL} | (data or {}), timeout=120, **options)


def refusal(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status and set(error) >= {"message", "type", "param"}
    return error["message"]


def words(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fff]|[a-z']+", text.lower())


# --- a recording with known times ---------------------------------------------------------------------


class Recording:
    """Held-out sentences with pauses between them, in which there is noise, a chord, or nothing."""

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        self.clips = [clip for clip in held_out.speech_clips(3 * count) if not clip.noisy][:count]
        parts, self.times, self.ends, place = [], [], [], 0
        for i, clip in enumerate(self.clips):
            pause = self._pause(rng, i)
            loud = np.flatnonzero(np.abs(clip.waveform) > 0.02 * np.abs(clip.waveform).max())
            begin = place + pause.size
            self.times.append(((begin + loud[0]) / RATE, (begin + loud[-1]) / RATE))
            self.ends.append((begin + clip.waveform.size) / RATE)
            parts += [pause, clip.waveform]
            place = begin + clip.waveform.size
        self.waveform = np.concatenate(parts)

    @staticmethod
    def _pause(rng: np.random.Generator, i: int) -> np.ndarray:
        time_s = np.arange(int(rng.uniform(*PAUSES_S) * RATE)) / RATE
        if i % 3 == 1:
            return (0.003 * rng.standard_normal(time_s.size)).astype(np.float32)
        if i % 3 == 2:
            return (0.02 * sum(np.sin(2 * np.pi * f * time_s) for f in (220, 277, 330))).astype(np.float32)
        return np.zeros(time_s.size, np.float32)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording(SENTENCES, seed=3)


@pytest.fixture(scope="module")
def transcript(client: openai.OpenAI, recording: Recording) -> TranscriptionVerbose:
    return create(client, ("recording.wav", wav_bytes(recording.waveform)), response_format="verbose_json")


@pytest.fixture(scope="module")
def by_clip(recording: Recording, transcript: TranscriptionVerbose) -> list[list]:
    """For each clip the segments in it: a clip may be two sentences with a pause between them."""
    found = [[] for _ in recording.clips]
    for segment in transcript.segments:
        found[int(np.searchsorted(recording.ends, (segment.start + segment.end) / 2))].append(segment)
    return found


def test_every_sentence_of_a_recording_is_there_once_at_its_time(recording, transcript, by_clip):
    assert all(by_clip)
    edges = [(segments[0].start, segments[-1].end) for segments in by_clip]
    errors = np.abs(np.array(edges) - np.array(recording.times))
    near = (errors <= MAX_TIME_ERROR_S).mean()
    print(f"{len(transcript.segments)} segments for {SENTENCES} clips; {near:.1%} of the times within {MAX_TIME_ERROR_S} s; median {np.median(errors):.3f} s")
    assert near >= 0.95
    times = [time_s for segment in transcript.segments for time_s in (segment.start, segment.end)]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= transcript.duration
    assert transcript.duration == pytest.approx(recording.waveform.size / RATE, abs=0.01)


def test_a_sentence_in_a_recording_has_the_text_that_it_has_alone(server, recording, by_clip):
    texts = [" ".join(segment.text for segment in segments) for segments in by_clip]
    with ThreadPoolExecutor(8) as pool:
        alone = list(pool.map(lambda clip: ask(server, clip.waveform), recording.clips))
    rates, rates_alone = (held_out.error_rates(recording.clips, some) for some in (texts, alone))
    print(f"in the recording {rates}, alone {rates_alone}")
    assert all(rates[name] <= rates_alone[name] + MAX_LOSS for name in rates)


def test_long_audio_comes_whole_in_every_format_and_the_same(client, recording, transcript):
    file = ("recording.wav", wav_bytes(recording.waveform))
    plain = create(client, file, response_format="text")
    assert plain.strip() == create(client, file).text == transcript.text
    shown = pysubs2.SSAFile.from_string(create(client, file, response_format="srt"), format_="srt")
    captions = webvtt.from_string(create(client, file, response_format="vtt"))
    assert words(" ".join(cue.plaintext for cue in shown)) == words(" ".join(cue.text for cue in captions)) == words(transcript.text)
    times = [(cue.start / 1000, cue.end / 1000) for cue in shown]
    assert times == sorted(times) and all(0 <= start < end <= transcript.duration for start, end in times)


def test_the_first_delta_of_a_stream_comes_long_before_the_last(client):
    long = Recording(LONG_SENTENCES, seed=4)
    began = time.monotonic()
    events, first_s = [], None
    for event in create(client, ("long.wav", wav_bytes(long.waveform)), stream=True):
        first_s = first_s or time.monotonic() - began
        events.append(event)
    took_s, seconds = time.monotonic() - began, long.waveform.size / RATE
    print(f"{seconds:.0f} s of audio in {took_s:.1f} s, first delta after {first_s:.2f} s")
    assert first_s < 2
    *deltas, done = events
    assert {event.type for event in deltas} == {"transcript.text.delta"} and done.type == "transcript.text.done"
    assert "".join(event.delta for event in deltas) == done.text
    assert len(deltas) >= LONG_SENTENCES


# --- OpenAI's contract --------------------------------------------------------------------------------


def test_each_format_is_of_the_clients_type_and_content_type(server, client):
    text = expected_text(SAMPLE)
    plain = create(client)
    assert isinstance(plain, Transcription) and plain.text == text
    assert plain.usage.type == "duration" and plain.usage.seconds == np.ceil(soundfile.info(SAMPLE).duration)
    detailed = create(client, response_format="verbose_json", timestamp_granularities=["segment"])
    TypeAdapter(TranscriptionVerbose).validate_python(detailed.model_dump(), strict=True)
    assert words(detailed.text) == words(text) and detailed.language == "english"
    types = {"json": "application/json", "text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}
    for response_format, content_type in types.items():
        assert post(server, {"response_format": response_format}).headers["content-type"].partition(";")[0] == content_type


def test_streamed_events_are_of_the_clients_types(server):
    with httpx.stream("POST", f"{server.url}/v1/audio/transcriptions", files={"file": SAMPLE.read_bytes()},
                      data={"model": MODEL, "stream": "true", "include[]": "logprobs"}, timeout=60) as response:  # fmt: skip
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    events = [TypeAdapter(TranscriptionStreamEvent).validate_json(line, strict=True) for line in lines]
    assert events[-1].type == "transcript.text.done" and events[-1].text == expected_text(SAMPLE)
    assert "".join(one.token for one in events[-1].logprobs).strip() == expected_text(SAMPLE)
    assert events[-1].usage.total_tokens == events[-1].usage.input_tokens + events[-1].usage.output_tokens > 50


def test_a_streamed_verbose_json_tells_each_segment_as_the_whole_answer_does(server):
    long = next(wav for wav in WAVS if wav.stem == "en_long").read_bytes()
    fields = {"response_format": "verbose_json"}
    lines = [line.removeprefix("data: ") for line in post(server, fields | {"stream": "true"}, long).text.splitlines() if line]
    events = [TypeAdapter(TranscriptionStreamEvent).validate_json(line, strict=True) for line in lines]
    told = [json.loads(line) for line in lines]
    whole = post(server, fields, long).json()
    segments = [event for event in told if event["type"] == "transcript.text.segment"]
    assert len(segments) > 5 and events[-1].text == whole["text"] == "".join(e["delta"] for e in told if "delta" in e)
    assert {name: told[-1][name] for name in ("language", "duration", "warnings")} == {
        name: whole[name] for name in ("language", "duration", "warnings")
    }
    for segment, expected in zip(segments, whole["segments"], strict=True):
        assert [segment[name] for name in ("start", "end", "text", "tokens")] == [
            expected[name] for name in ("start", "end", "text", "tokens")
        ]
        assert words(" ".join(cue["text"] for cue in segment["cues"])) == words(segment["text"])
        assert (segment["cues"][0]["start"], segment["cues"][-1]["end"]) == (segment["start"], segment["end"])


def test_logprobs_are_given_when_asked_for(client):
    found = create(client, include=["logprobs"]).logprobs
    assert "".join(one.token for one in found).strip() == expected_text(SAMPLE)
    assert all(one.logprob <= 0 and bytes(map(int, one.bytes)).decode() == one.token for one in found)
    assert create(client).logprobs is None


@pytest.mark.parametrize(
    "strategy", ["auto", {"type": "server_vad"}, {"type": "server_vad", "threshold": 0.4, "silence_duration_ms": 300}], ids=str
)
def test_each_chunking_strategy_of_the_client_is_taken(client, strategy):
    assert words(create(client, chunking_strategy=strategy).text) == words(expected_text(SAMPLE))


def test_a_clients_own_limit_ends_the_text_and_is_told_but_no_reason_to_try_again(server, client):
    def tokens() -> float:
        metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
        return sum(map(float, re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)))

    before = tokens()
    given = create(client, response_format="verbose_json", extra_body={"max_completion_tokens": 3})
    assert (given.segments[0].warnings, len(given.segments[0].tokens), tokens() - before) == (["cut_off"], 3, 3)
    assert expected_text(SAMPLE).startswith(given.text)


def test_vllms_sampling_fields_still_work(client):
    texts = {create(client, temperature=1.0, extra_body={"seed": seed, "top_p": 1.0}).text for seed in range(4)}
    again = {create(client, temperature=1.0, extra_body={"seed": seed, "top_p": 1.0}).text for seed in range(4)}
    assert texts == again


@pytest.mark.parametrize("language", ["en", "English", "en-US", "zh", "yue"])
def test_a_language_the_model_knows_is_taken(client, language):
    assert create(client, language=language).text == expected_text(SAMPLE)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_each_container_gives_the_text(client, kind):
    buffer = io.BytesIO()
    soundfile.write(buffer, soundfile.read(SAMPLE)[0], RATE, format=kind.upper())
    assert create(client, (f"speech.{kind}", buffer.getvalue())).text == expected_text(SAMPLE)


# --- what bad input gets ------------------------------------------------------------------------------

BAD_FIELDS = {
    "response_format": ({"response_format": "docx"}, "response_format is 'docx'"),
    "temperature": ({"temperature": "3"}, "temperature is '3'"),
    "temperature in words": ({"temperature": "warm"}, "temperature is 'warm'"),
    "language": ({"language": "tlh"}, "language is 'tlh'; this model knows zh"),
    "word times": ({"timestamp_granularities[]": "word", "response_format": "verbose_json"}, "word times are not available yet"),
    "times in json": ({"timestamp_granularities[]": "segment"}, "needs response_format=verbose_json"),
    "include": ({"include[]": "faces"}, "include[] is 'faces'"),
    "logprobs in text": ({"include[]": "logprobs", "response_format": "text"}, "needs response_format=json"),
    "a streamed srt": ({"stream": "true", "response_format": "srt"}, "stream works with json, text and verbose_json"),
    "chunking": ({"chunking_strategy": "by hand"}, "chunking_strategy is 'by hand'"),
    "chunking out of range": ({"chunking_strategy[type]": "server_vad", "chunking_strategy[threshold]": "7"}, "threshold is 7.0"),
    "chunking not JSON": ({"chunking_strategy": "{type"}, "chunking_strategy is not JSON"),
    "top_p": ({"top_p": "7"}, "top_p"),
    "n": ({"n": "3"}, "beam search is not available"),
}


@pytest.mark.parametrize("fields, problem", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_wrong_field_is_refused_by_name(server, fields, problem):
    assert problem in refusal(post(server, fields))


def test_a_request_without_audio_or_with_two_is_refused(server):
    assert "as `file` (an upload) or as `url`" in refusal(post(server, file=None))
    assert "as `file` (an upload) or as `url`" in refusal(post(server, {"url": "http://localhost/x.wav"}))
    body = httpx.post(f"{server.url}/v1/audio/transcriptions", json={"file": "…"}, timeout=30)
    assert "expected multipart/form-data" in refusal(body)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="whisper-9"):
        client.audio.transcriptions.create(model="whisper-9", file=SAMPLE)


def test_a_file_damaged_midway_is_refused_with_the_seconds_before(server, recording):
    buffer = io.BytesIO()
    soundfile.write(buffer, recording.waveform, RATE, format="FLAC")
    data = bytearray(buffer.getvalue())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    assert re.search(r"damaged after \d+\.\d s", refusal(post(server, file=bytes(data))))


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Serves the sample, a redirect to an address that is not allowed, and a redirect to itself."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            places = {"/away": "http://169.254.169.254/latest", "/round": "/round", "/here": "/speech.wav"}
            if self.path in places:
                self.send_response(302)
                self.send_header("Location", places[self.path])
                self.end_headers()
                return
            self.send_response(200 if self.path == "/speech.wav" else 404)
            self.end_headers()
            self.wfile.write(SAMPLE.read_bytes())

        def log_message(self, *_) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_audio_behind_a_url_of_a_named_host_is_transcribed(server, site):
    for path in ("speech.wav", "here"):
        assert post(server, {"url": f"{site}/{path}"}, file=None).json()["text"] == expected_text(SAMPLE)


def test_a_url_elsewhere_is_refused_and_so_is_a_redirect_to_there(server, site):
    assert "does not name" in refusal(post(server, {"url": "http://10.0.0.1/speech.wav"}, file=None))
    assert "169.254.169.254" in refusal(post(server, {"url": f"{site}/away"}, file=None))
    assert "redirects more than" in refusal(post(server, {"url": f"{site}/round"}, file=None))
    assert "answered 404" in refusal(post(server, {"url": f"{site}/nothing"}, file=None))
    assert "expected http:// or https://" in refusal(post(server, {"url": "file:///etc/passwd"}, file=None))


# --- clients that leave -------------------------------------------------------------------------------


def running(server: Server) -> float:
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", metrics, re.MULTILINE)
    return sum(map(float, found))


def test_a_client_that_leaves_takes_its_segments_out_of_the_engine(server, recording):
    data = wav_bytes(np.tile(recording.waveform, 5))
    for streamed in ("false", "true"):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/audio/transcriptions", files={"file": ("long.wav", data)},
                       data={"model": MODEL, "stream": streamed}, timeout=httpx.Timeout(30, read=0.5 if streamed == "false" else 0.05))  # fmt: skip
        deadline = time.monotonic() + 5
        while running(server) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert running(server) == 0
