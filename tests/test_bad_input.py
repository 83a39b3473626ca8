"""What bad audio gets, through HTTP: a 400 that names the problem, and a server that goes on. And odd audio that works."""

import asyncio
import base64
import http.server
import io
import re
import threading
from collections.abc import Callable, Iterator

import httpx
import jiwer
import librosa
import numpy as np
import pytest
import soundfile
from clients import MODEL, TRANSCRIBE, WAVS, audio_part, expected_text, wav_bytes
from conftest import Server
from held_out import normalize

RATE = 16000
SAMPLE = next(wav for wav in WAVS if wav.stem == "en_french")
WAV = SAMPLE.read_bytes()
SPEECH, _ = soundfile.read(SAMPLE, dtype="float32")
TEXT = {"type": "text", "text": TRANSCRIBE}
PLACEHOLDER = "<|audio|>"
MAX_AUDIOS = 64
MAX_LOSSY_WER = 0.15  # of audio that went through a lossy codec or another rate


def encoded(waveform: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def broken(value: float) -> bytes:
    """A float WAV of speech with one sample that is no number."""
    waveform = SPEECH.copy()
    waveform[1000] = value
    return wav_bytes(waveform)


def url_part(url: str) -> dict:
    return {"type": "audio_url", "audio_url": {"url": url}}


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


# --- asking -----------------------------------------------------------------------------------------


def post_chat(server: Server, *parts: dict | str) -> httpx.Response:
    content = parts[0] if isinstance(parts[0], str) else list(parts)
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 100}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def post_transcription(server: Server, data: bytes, name: str = "speech.wav") -> httpx.Response:
    form = {"model": MODEL, "temperature": "0"}
    return httpx.post(f"{server.url}/v1/audio/transcriptions", files={"file": (name, data)}, data=form, timeout=120)


def chat_text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def transcription_text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["text"].strip()


def refusal(response: httpx.Response) -> str:
    """The message of a response that must be a 400 of OpenAI's form."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == 400 and error["type"] == "BadRequestError"
    message = error["message"]
    assert "Traceback" not in message and "\n" not in message and len(message) < 500, message
    return message


@pytest.fixture(autouse=True)
def next_request_works(server: Server) -> Iterator[None]:
    """Whatever a test sent, the server transcribes afterwards."""
    yield
    assert chat_text(post_chat(server, audio_part(WAV), TEXT)) == expected_text(SAMPLE)


# --- files ------------------------------------------------------------------------------------------

NO_AUDIO = b"Dear all, please find attached the minutes of our last meeting. " * 20
BAD_FILES = {
    "text": (NO_AUDIO, "1280 bytes that begin with b'Dear all'"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(500), "508 bytes that begin with b'\\x89PNG"),
    "zeros": (bytes(20000), "20000 bytes that begin with b'\\x00"),
    "a header cut at 20 bytes": (WAV[:20], "wav file of 20 bytes is damaged or incomplete"),
    "a header cut at 40 bytes": (WAV[:40], "wav file of 40 bytes is damaged or incomplete"),
    "a header and no samples": (WAV[:44], "wav file is incomplete: by its headers it has at least 119538 bytes, but 44 came"),
    "under 0.1 s": (wav_bytes(SPEECH[:1599]), "0.100 s long (1599 samples at 16000 Hz); at least 0.1 s is needed"),
    "under 0.1 s at 44100 Hz": (wav_bytes(SPEECH[:2000], 44100), "at least 0.1 s is needed"),
    "NaN": (broken(np.nan), "1 NaN or infinite samples"),
    "infinity": (broken(-np.inf), "1 NaN or infinite samples"),
}


# What transcription, which decodes as a stream, says otherwise.
SAID_IN_TRANSCRIPTION = {
    "NaN": "NaN or infinite samples after",
    "infinity": "NaN or infinite samples after",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_by_name_in_chat_and_in_transcription(server: Server, name: str):
    data, problem = BAD_FILES[name]
    assert problem in refusal(post_chat(server, audio_part(data), TEXT))
    assert SAID_IN_TRANSCRIPTION.get(name, problem) in refusal(post_transcription(server, data))


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3"])
def test_a_header_cut_short_is_refused_in_every_format(server: Server, kind: str):
    cut = encoded(SPEECH, kind=kind.upper())[:50]
    for refused in (post_chat(server, audio_part(cut, kind), TEXT), post_transcription(server, cut, f"speech.{kind}")):
        assert re.search(rf"the {kind} file .*incomplete", refusal(refused))


def test_an_empty_file_is_refused_as_empty(server: Server):
    assert "input_audio.data is empty" in refusal(post_chat(server, audio_part(b""), TEXT))
    assert "audio is empty (0 bytes)" in refusal(post_chat(server, url_part("data:audio/wav;base64,"), TEXT))
    assert "audio_url.url is empty" in refusal(post_chat(server, url_part(""), TEXT))
    assert "audio is empty (0 bytes)" in refusal(post_transcription(server, b""))


def test_a_part_without_its_audio_is_refused(server: Server):
    for part in ({"type": "input_audio"}, {"type": "input_audio", "input_audio": "UklG"}):
        assert "needs 'input_audio': an object with the text 'data'" in refusal(post_chat(server, part, TEXT))
    assert "needs 'audio_url': an object with the text 'url'" in refusal(post_chat(server, {"type": "audio_url"}))


# --- base64 and format names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, problem",
    [
        ("this is no base64!", "' ' at position 4"),
        (base64.b64encode(WAV).decode()[:-1] + "*", "'*' at position"),
        (base64.b64encode(WAV[:3001]).decode().rstrip("="), "4002 characters"),
        ("é" * 40, "'é' at position 0"),
    ],
    ids=["a sentence", "one wrong character", "padding lost", "not ASCII"],
)
def test_base64_that_is_not_is_refused_with_the_place(server: Server, data: str, problem: str):
    named = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    for part in (named, url_part("data:audio/wav;base64," + data)):
        message = refusal(post_chat(server, part, TEXT))
        assert "not base64" in message and problem in message


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_format_name_that_does_not_match_the_data_is_refused_with_both(server: Server, kind: str):
    declared = "wav" if kind != "WAV" else "mp3"
    data = encoded(SPEECH, kind=kind)
    for part in (audio_part(data, declared), url_part(data_url(data, f"audio/{declared}"))):
        assert f"declared as {declared} but is {kind.lower()}" in refusal(post_chat(server, part, TEXT))


def test_an_unknown_format_name_is_refused_with_the_allowed_ones(server: Server):
    problem = "input_audio.format is 'aac'; expected one of wav, flac, ogg, mp3"
    assert problem in refusal(post_chat(server, audio_part(WAV, "aac"), TEXT))
    nameless = {"type": "input_audio", "input_audio": {"data": base64.b64encode(WAV).decode()}}
    assert "input_audio.format is None" in refusal(post_chat(server, nameless, TEXT))
    picture = url_part(data_url(WAV, "image/png"))
    assert "media type is 'image/png'; expected audio" in refusal(post_chat(server, picture, TEXT))


# --- how many, and how much -------------------------------------------------------------------------


@pytest.mark.parametrize("audios, placeholders", [(0, 1), (1, 2), (2, 1), (3, 2)])
def test_placeholders_that_do_not_match_the_audios_are_refused_with_both_counts(server: Server, audios: int, placeholders: int):
    text = {"type": "text", "text": PLACEHOLDER * placeholders + TRANSCRIBE}
    message = refusal(post_chat(server, *[audio_part(WAV)] * audios, text))
    assert f"the text has {placeholders} {PLACEHOLDER} placeholders and the message {audios} audios" in message


def test_a_plain_text_with_a_placeholder_and_no_audio_is_refused(server: Server):
    assert "1 <|audio|> placeholders and the message 0 audios" in refusal(post_chat(server, PLACEHOLDER + TRANSCRIBE))


def test_more_audio_than_the_context_holds_is_refused_with_the_seconds_that_fit(server: Server):
    message = refusal(post_chat(server, audio_part(wav_bytes(np.zeros(350 * RATE, np.float32))), TEXT))
    assert "350.0 s long (4375 tokens)" in message and "a context of 4096 tokens holds 326.6 s" in message
    halves = [audio_part(wav_bytes(np.zeros(170 * RATE, np.float32)))] * 2
    assert "340.0 s long" in refusal(post_chat(server, *halves, TEXT))


def test_64_audios_are_taken_and_65_refused(server: Server):
    part = audio_part(wav_bytes(np.zeros(RATE // 10, np.float32)))
    assert post_chat(server, *[part] * MAX_AUDIOS, TEXT).status_code == 200
    assert f"At most {MAX_AUDIOS} audio(s)" in refusal(post_chat(server, *[part] * (MAX_AUDIOS + 1), TEXT))


# --- URLs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of an HTTP server with /speech.wav and /page.html, and nothing else."""
    pages = {"/speech.wav": WAV, "/page.html": b"<html>log in first</html>"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_audio_behind_an_http_url_is_transcribed(server: Server, site: str):
    assert chat_text(post_chat(server, url_part(f"{site}/speech.wav"), TEXT)) == expected_text(SAMPLE)


def test_a_url_without_audio_is_refused(server: Server, site: str):
    assert "HTTP 404" in refusal(post_chat(server, url_part(f"{site}/nothing.wav"), TEXT))
    assert "begin with b'<html>lo'" in refusal(post_chat(server, url_part(f"{site}/page.html"), TEXT))


@pytest.mark.parametrize(
    "url, problem",
    [
        ("http://127.0.0.1:1/speech.wav", "cannot fetch the audio_url 'http://127.0.0.1:1/speech.wav'"),
        ("file:///etc/hostname", "file: URLs are not allowed here"),
        ("ftp://127.0.0.1/speech.wav", "must be either a HTTP, data or file URL"),
        ("speech.wav", "must be either a HTTP, data or file URL"),
        ("data:audio/wav,RIFF", "expected data:audio/FORMAT;base64,DATA"),
        ("data:audio/wav;base64", "missing ',' separator"),
    ],
)
def test_a_url_that_cannot_be_fetched_is_refused(server: Server, url: str, problem: str):
    assert problem in refusal(post_chat(server, url_part(url), TEXT))


def test_a_host_that_is_not_allowed_is_refused(server: Server):
    problem = "allowed domains: ['127.0.0.1', 'localhost']. Input URL domain: recordings.example"
    assert problem in refusal(post_chat(server, url_part("http://recordings.example/speech.wav"), TEXT))


def test_no_host_is_allowed_by_default():
    from vllm.model_executor.models.glmasr_media import GlmAsrMediaConnector

    with pytest.raises(ValueError, match="not allowed here .the server has no --allowed-media-domains"):
        asyncio.run(GlmAsrMediaConnector().fetch_audio_async("http://127.0.0.1:1/speech.wav"))


# --- audio that is odd, and works -------------------------------------------------------------------


def at_rate(rate: int) -> np.ndarray:
    return librosa.resample(SPEECH, orig_sr=RATE, target_sr=rate)


LOSSLESS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "eight channels": ("wav", lambda: encoded(np.stack([SPEECH] * 8, axis=1))),
    "24-bit": ("wav", lambda: encoded(SPEECH, subtype="PCM_24")),
    "float": ("wav", lambda: encoded(SPEECH, subtype="FLOAT")),
    "FLAC": ("flac", lambda: encoded(SPEECH, kind="FLAC")),
}
LOSSY: dict[str, tuple[str, Callable[[], bytes]]] = {
    "192 kHz": ("wav", lambda: encoded(at_rate(192000), 192000)),
    "44.1 kHz stereo": ("wav", lambda: encoded(np.stack([at_rate(44100)] * 2, axis=1), 44100)),
    "MP3": ("mp3", lambda: encoded(at_rate(44100), 44100, kind="MP3")),
    "OGG": ("ogg", lambda: encoded(SPEECH, kind="OGG")),
    "Opus": ("ogg", lambda: encoded(at_rate(48000), 48000, kind="OGG", subtype="OPUS")),
}


def every_way(server: Server, kind: str, data: bytes) -> list[str]:
    """The text of one file as input_audio, as audio_url, and from the transcription route."""
    return [
        chat_text(post_chat(server, audio_part(data, kind), TEXT)),
        chat_text(post_chat(server, url_part(data_url(data, f"audio/{kind}")), TEXT)),
        transcription_text(post_transcription(server, data, f"speech.{kind}")),
    ]


@pytest.mark.parametrize("kind, make", LOSSLESS.values(), ids=LOSSLESS)
def test_a_lossless_file_gives_the_text_of_the_plain_one(server: Server, kind: str, make: Callable[[], bytes]):
    assert every_way(server, kind, make()) == [expected_text(SAMPLE)] * 3


@pytest.mark.parametrize("kind, make", LOSSY.values(), ids=LOSSY)
def test_a_lossy_file_gives_nearly_the_text_of_the_plain_one(server: Server, kind: str, make: Callable[[], bytes]):
    texts = every_way(server, kind, make())
    assert texts[0] == texts[1] == texts[2]
    assert jiwer.wer(normalize(expected_text(SAMPLE)), normalize(texts[0])) <= MAX_LOSSY_WER, texts[0]


def test_a_file_at_8_khz_is_taken(server: Server):
    texts = every_way(server, "wav", encoded(at_rate(8000), 8000))
    assert texts[0] == texts[1] == texts[2] != ""


def test_eight_channels_are_answered_and_leave_the_server_up(server: Server):
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000, layout="7.1")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8 * 48000), np.float32), format="flt", layout="7.1")
        frame.sample_rate = 48000
        resampler = av.AudioResampler(format="fltp", layout="7.1", rate=48000, frame_size=1024)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    response = post_chat(server, url_part(data_url(buffer.getvalue(), "audio/mp4")), TEXT)
    assert response.status_code in (200, 400), response.text


def test_another_container_is_taken_where_no_format_is_declared(server: Server):
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(SPEECH[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    text = chat_text(post_chat(server, url_part(data_url(buffer.getvalue(), "audio/mp4")), TEXT))
    assert jiwer.wer(normalize(expected_text(SAMPLE)), normalize(text)) <= MAX_LOSSY_WER, text
    assert transcription_text(post_transcription(server, buffer.getvalue(), "speech.m4a")) == text
