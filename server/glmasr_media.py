"""Audio as clients send it, in vLLM's API process: named refusals, and one decoder for chat and transcription.

Decodes as the reference's `load_audio` does: native rate, channels averaged, soxr to the model's rate.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import aiohttp
import numpy as np
import pybase64
import requests
import soundfile
from pydantic import AfterValidator
from typing_extensions import Required, TypedDict  # pydantic needs these before Python 3.12
from urllib3.util import Url

import vllm.envs as envs
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.audio import resample_audio_soxr
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, AudioMediaIO, MediaConnector
from vllm.multimodal.media.audio import load_audio_soundfile
from vllm.utils.mem_constants import MiB_bytes

from .glmasr_decode import decode_blocks, read_by_soundfile

# Formats a client may name → media types that mean them in a data: URL.
FORMATS = {
    "wav": ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"),
    "flac": ("audio/flac", "audio/x-flac"),
    "ogg": ("audio/ogg", "audio/opus", "audio/vorbis", "application/ogg"),
    "mp3": ("audio/mp3", "audio/mpeg", "audio/x-mp3"),
}
ALLOWED = ", ".join(FORMATS)
EXPECTED = {"input_audio": "an audio file in base64", "audio_url": "a data: or http(s) URL"}
DECODED_HZ = 16000  # of what soundfile cannot read: the model's own rate
SF_ERR_SYSTEM = 2  # libsndfile's code that comes with a message about the file system
# How each container begins. A WAV's and an AIFF's size stands between the two parts.
SIGNATURES = {
    "wav": rb"(RIFF|RF64|RIFX).{4}WAVE",
    "flac": rb"fLaC",
    "ogg": rb"OggS",
    "mp3": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",  # a tag, or a layer-III frame of MPEG 2.5, 2 or 1
    "aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    "aiff": rb"FORM.{4}AIF[FC]",
    "mp4": rb".{4}ftyp",
    "webm": rb"\x1a\x45\xdf\xa3",
}


def container(data: bytes) -> str | None:
    """What kind of file the data begin as, a key of SIGNATURES; None for anything else."""
    return next((kind for kind, start in SIGNATURES.items() if re.match(start, data[:12], re.DOTALL)), None)


def check_container(declared: str, data: bytes) -> None:
    """Raises ValueError where data are not what the client calls them, one of FORMATS."""
    if (kind := container(data)) == declared or (kind is None and declared == "mp3"):  # an MP3 may begin with anything
        return
    found = kind or f"{len(data)} bytes that begin with {data[:8]!r}"
    raise ValueError(f"the audio is declared as {declared} but is {found}; name its format ({ALLOWED}) as it is")


def decode(data: bytes, max_duration_s: float, max_decode_bytes: int) -> tuple[np.ndarray, float]:
    """A file's bytes to (samples,) float32, channels averaged, and the rate in Hz.

    Raises:
        ValueError: the data are empty, not audio, incomplete, damaged, or longer than the limits
    """
    if not data:
        raise ValueError(f"the audio is empty (0 bytes); expected a {ALLOWED} file")
    limits = {"sr": None, "max_duration_s": max_duration_s, "max_decode_bytes": max_decode_bytes}
    kind, reason = container(data), "soundfile would not read it to its end"
    if read_by_soundfile(BytesIO(data)):
        try:
            return load_audio_soundfile(BytesIO(data), **limits)
        except soundfile.LibsndfileError as error:
            reason = "it cannot be opened" if error.code == SF_ERR_SYSTEM else error.error_string
    try:  # m4a, webm and others; not vLLM's load_audio_pyav, which eight channels make crash the process
        return np.concatenate(list(decode_blocks(BytesIO(data), DECODED_HZ, max_duration_s))), DECODED_HZ
    except ValueError as error:
        if kind in FORMATS:
            raise ValueError(f"the {kind} file of {len(data)} bytes is damaged or incomplete: {reason}") from error
        raise ValueError(f"{len(data)} bytes that begin with {data[:8]!r} cannot be read as audio: {error}") from error


def load_audio(
    path: BytesIO, *, sr: float, mono: bool, max_duration_s: float, max_decode_bytes: int
) -> tuple[np.ndarray, float]:
    """`decode`, resampled to `sr` Hz; stands in for vLLM's function of this name in its transcription route."""
    assert mono, "speech to text asks for one channel"
    waveform, rate = decode(path.getvalue(), max_duration_s, max_decode_bytes)
    return resample_audio_soxr(waveform, orig_sr=rate, target_sr=sr), sr


class AudioPartFields(TypedDict, total=False):
    """A chat message's audio part before it is checked."""

    type: Required[Literal["input_audio", "audio_url"]]
    input_audio: Any
    audio_url: Any
    uuid: str | None


def check_audio_part(part: AudioPartFields) -> AudioPartFields:
    """Lets through an audio part that says all it must.

    Raises:
        VLLMValidationError: names what is missing or wrong (pydantic would bury a ValueError)
    """
    kind = part["type"]
    body, key = part.get(kind), "data" if kind == "input_audio" else "url"
    if not isinstance(body, dict) or not isinstance(body.get(key, ""), str):
        raise VLLMValidationError(f"a part of type {kind!r} needs {kind!r}: an object with the text {key!r}", parameter=kind)
    if not body.get(key) and part.get("uuid") is None:  # by its uuid vLLM finds earlier audio
        raise VLLMValidationError(f"{kind}.{key} is empty; expected {EXPECTED[kind]}", parameter=kind)
    if kind == "input_audio" and body.get("format") not in FORMATS:
        found = body.get("format")
        raise VLLMValidationError(f"input_audio.format is {found!r}; expected one of {ALLOWED}", parameter=kind)
    return part


AudioPart = Annotated[AudioPartFields, AfterValidator(check_audio_part)]


class GlmAsrAudioIO(AudioMediaIO):
    """Decodes audio, and compares it with what its data: URL calls it."""

    def load_bytes(self, data: bytes) -> tuple[np.ndarray, float]:
        if len(data) > (most := self.get_max_bytes()):
            raise ValueError(
                f"the audio file has {len(data) / MiB_bytes:.1f} MiB; at most {most / MiB_bytes:.0f} MiB are taken "
                "(VLLM_MAX_AUDIO_CLIP_FILESIZE_MB)"
            )
        return decode(data, envs.VLLM_MAX_AUDIO_DECODE_DURATION_S, envs.VLLM_MAX_AUDIO_DECODE_BYTES)

    def load_base64(self, media_type: str, data: str) -> tuple[np.ndarray, float]:
        media_type = media_type.lower()
        if media_type.partition("/")[0] not in ("audio", "video", "application", ""):
            raise ValueError(f"the media type is {media_type!r}; expected audio, for example audio/wav")
        try:
            decoded = pybase64.b64decode(data, validate=True)
        except ValueError as error:
            wrong = re.search(r"[^A-Za-z0-9+/=]", data)
            what = f"{wrong[0]!r} at position {wrong.start()}" if wrong else f"{len(data)} characters, or = in the midst"
            raise ValueError(f"the audio data are not base64: {what}") from error
        declared = next((name for name, types in FORMATS.items() if media_type in types), None)
        if declared and decoded:
            check_container(declared, decoded)
        return self.load_bytes(decoded)

    def load_file(self, filepath: Path) -> tuple[np.ndarray, float]:
        try:
            return self.load_bytes(filepath.read_bytes())
        except OSError as error:
            raise ValueError(f"cannot read {filepath.name}: {error.strerror}") from error


@MEDIA_CONNECTOR_REGISTRY.register("glmasr")
class GlmAsrMediaConnector(MediaConnector):
    """vLLM's connector, but failures to get audio are the client's errors, and a URL's host must be allowed by name.

    Chosen by VLLM_MEDIA_CONNECTOR=glmasr.
    """

    def fetch_audio(self, audio_url: str) -> tuple[np.ndarray, float]:
        with _unreachable(audio_url):
            return self.load_from_url(audio_url, self._audio_io(), fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT)

    async def fetch_audio_async(self, audio_url: str) -> tuple[np.ndarray, float]:
        with _unreachable(audio_url):
            return await self.load_from_url_async(
                audio_url, self._audio_io(), fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT
            )

    def _audio_io(self) -> GlmAsrAudioIO:
        return GlmAsrAudioIO(**self.media_io_kwargs.get("audio", {}))

    def _load_data_url(self, url: str, media_io):
        if not url.partition(",")[0].endswith(";base64"):
            raise ValueError(f"the URL begins with {url[:32]!r}; expected data:audio/FORMAT;base64,DATA")
        return super()._load_data_url(url, media_io)

    def _assert_url_in_allowed_media_domains(self, url_spec: Url) -> None:
        if not self.allowed_media_domains:
            raise ValueError(
                "http(s) URLs are not allowed here (the server has no --allowed-media-domains); send a data: URL"
            )
        super()._assert_url_in_allowed_media_domains(url_spec)

    def _load_file_url(self, url_spec: Url, media_io):
        if self.allowed_local_media_path is None:
            raise ValueError("file: URLs are not allowed here (the server has no --allowed-local-media-path)")
        return super()._load_file_url(url_spec, media_io)


@contextmanager
def _unreachable(url: str) -> Iterator[None]:
    """Turns failures to fetch `url` into a ValueError that names it."""
    try:
        yield
    except (aiohttp.ClientError, requests.RequestException, TimeoutError, VLLMUnprocessableEntityError) as error:
        raise ValueError(f"cannot fetch the audio_url {url[:200]!r}: {error or type(error).__name__}") from error
