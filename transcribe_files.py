"""What transcribe.py reads and writes: which recordings there are, their audio as it is sent, and the outputs.

It imports neither the client nor vLLM.
"""

import base64
import html
import itertools
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import av
import numpy as np
import soundfile
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "server"))

from glmasr_subtitles import cues, srt, vtt  # noqa: E402

FORMATS = ("txt", "srt", "vtt", "json", "html")
VIDEO = set(".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
RECORDINGS = VIDEO | set(".aac .ac3 .aif .aiff .amr .caf .flac .m4a .m4b .mka .mp3 .oga .ogg .opus .w64 .wav .wma".split())
# What the server takes as it is, by libsndfile's names: suffix and media type. All else is sent as FLAC.
SENDABLE = {
    "WAV": ("wav", "audio/wav"), "WAVEX": ("wav", "audio/wav"), "FLAC": ("flac", "audio/flac"),
    "OGG": ("ogg", "audio/ogg"), "MP3": ("mp3", "audio/mpeg"),
}  # fmt: skip
TAGS = {"chinese": "zh", "english": "en", "cantonese": "yue"}  # of the languages' names
MOST_AS_IS = 25 * 2**20  # bytes; a larger file is sent as FLAC at the model's rate
SAMPLING_RATE = 16000  # Hz
GAP_S = (0.1, 600)  # a track that starts late or has a hole gets silence, so that times are the video's


@dataclass(frozen=True)
class Job:
    """A recording, the files still to be written about it, its format if it can be sent as it is, and its length."""

    path: Path
    outputs: dict[str, Path]
    kind: str | None
    duration_s: float | None


# --- Which files there are, and what is to be written about them


def shown(path: Path) -> str:
    """A path that can be printed, whatever its bytes."""
    return os.fsencode(path).decode(errors="replace")


def is_recording(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in RECORDINGS


def recordings(paths: list[Path]) -> list[Path]:
    """Files as given and all recordings in the folders, each once.

    Raises:
        ValueError: a path is missing, or holds no recording
        OSError: a folder cannot be read
    """

    def refuse(error: OSError) -> None:
        raise error

    found: dict[str, None] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{shown(path)}: no such file or folder")
        inside = [str(path)]
        if path.is_dir():
            walk = os.walk(path, onerror=refuse)
            inside = sorted(os.path.join(folder, name) for folder, _, names in walk for name in names if is_recording(name))
        if not inside:
            raise ValueError(f"{shown(path)}: no recordings in this folder (looked for {' '.join(sorted(RECORDINGS))})")
        found |= dict.fromkeys(os.path.abspath(name) for name in inside)
    return [Path(name) for name in found]


def stems(folder: Path) -> Counter[str]:
    """How many recordings of a folder have each name without suffix."""
    return Counter(os.path.splitext(name)[0] for name in os.listdir(folder) if is_recording(name))


def is_done(output: Path, recording: Path) -> bool:
    return output.is_file() and output.stat().st_mtime_ns >= recording.stat().st_mtime_ns


def probe(path: Path) -> tuple[str | None, float | None]:
    """Its format, if one of SENDABLE and not large, and its seconds; None for what is not known."""
    try:
        info = soundfile.info(os.fsencode(path))
        return (info.format if info.format in SENDABLE and path.stat().st_size <= MOST_AS_IS else None), info.duration
    except (soundfile.LibsndfileError, OSError):
        pass
    try:
        with av.open(str(path)) as container:
            return None, container.duration / av.time_base if container.duration else None
    except (av.FFmpegError, OSError):
        return None, None  # what is wrong is said when it is read


def plan(paths: list[Path], out: Path | None, formats: list[str], overwrite: bool) -> tuple[list[Job], int]:
    """What is to be done, and how many recordings are done already.

    Raises:
        ValueError, OSError: see `recordings`; or two recordings would have the same output
    """
    found = recordings(paths)
    above = os.path.commonpath([os.path.abspath(path if path.is_dir() else path.parent) for path in paths])
    in_folder = {folder: stems(folder) for folder in {path.parent for path in found}}
    owner: dict[Path, Path] = {}
    jobs = []
    for path in tqdm(found, desc="looking", unit=" files", leave=False, delay=1, disable=None):
        folder = out / os.path.relpath(path.parent, above) if out else path.parent
        # Beside another recording of that name, a.wav and a.mp3, the suffix stays in the name.
        alone = is_recording(path.name) and in_folder[path.parent][path.stem] == 1
        outputs = {kind: folder / f"{path.stem if alone else path.name}.{kind}" for kind in formats}
        for output in outputs.values():
            if other := owner.get(output):
                raise ValueError(f"{shown(path)} and {shown(other)} would both be written to {shown(output)}; rename one")
            owner[output] = path
        if missing := {kind: output for kind, output in outputs.items() if overwrite or not is_done(output, path)}:
            jobs.append(Job(path, missing, *probe(path)))
    return jobs, len(found) - len(jobs)


# --- Reading a recording, writing what is known of it


def as_flac(path: Path, stopping: threading.Event) -> BinaryIO:
    """The (first) audio track as 16 kHz FLAC with one channel, in a file that has no name.

    Raises:
        ValueError: there is no audio in it
        av.FFmpegError: it cannot be decoded
    """
    file = tempfile.TemporaryFile()
    with av.open(str(path)) as container:
        if not container.streams.audio:
            raise ValueError("there is no audio track in it")
        began_s, written = (container.start_time or 0) / av.time_base, 0
        resampler = av.AudioResampler("s16", "mono", SAMPLING_RATE)
        with soundfile.SoundFile(file, "w", SAMPLING_RATE, 1, "PCM_16", format="FLAC") as flac:
            for frame in itertools.chain(container.decode(audio=0), [None]):  # None: what the resampler still holds
                if stopping.is_set():
                    raise InterruptedError
                gap_s = (frame.time or 0) - began_s - written / SAMPLING_RATE if frame else 0
                silence = np.zeros(int(gap_s * SAMPLING_RATE) if GAP_S[0] < gap_s < GAP_S[1] else 0, np.int16)
                for samples in (silence, *(part.to_ndarray()[0] for part in resampler.resample(frame))):
                    flac.write(samples)
                    written += len(samples)
    if not written:
        raise ValueError("its audio track is empty")
    file.seek(0)
    return file


def readable(job: Job, stopping: threading.Event) -> BinaryIO:
    """What is sent to the server."""
    return job.path.open("rb") if job.kind else as_flac(job.path, stopping)


def clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}" if minutes >= 60 else f"{minutes}:{second:02}"


def page(job: Job, answer: dict[str, Any], embedded: bytes | None) -> str:
    """The HTML page: the template's {{names}} replaced, once, by escaped text."""
    media = quote(os.fsencode(os.path.relpath(job.path, job.outputs["html"].parent)))
    if embedded is not None:
        media = f"data:{SENDABLE[job.kind or 'FLAC'][1]};base64,{base64.b64encode(embedded).decode()}"
    segments = "\n".join(
        f'<li data-start="{part["start"]:.3f}" data-end="{part["end"]:.3f}"><button tabindex="-1">{clock(part["start"])}'
        f"</button><span>{html.escape(part['text'].strip())}</span></li>"
        for part in answer["segments"]
    )
    values = {
        "title": html.escape(shown(Path(job.path.name))),
        "language": html.escape(TAGS.get(answer["language"], answer["language"])),
        "duration": clock(answer["duration"]),
        "player": "video" if job.path.suffix.lower() in VIDEO and embedded is None else "audio",
        "media": html.escape(media),
        "segments": segments,
    }
    template = (ROOT / "transcribe_page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def render(kind: str, job: Job, answer: dict[str, Any], embedded: bytes | None) -> str:
    """One of FORMATS, from the server's verbose_json."""
    if kind == "txt":
        return answer["text"].strip() + "\n"
    if kind == "json":
        return json.dumps({"file": shown(Path(job.path.name)), **answer}, ensure_ascii=False, indent=2) + "\n"
    if kind == "html":
        return page(job, answer, embedded)
    parts = ((part["start"], part["end"], part["text"].strip()) for part in answer["segments"])
    return {"srt": srt, "vtt": vtt}[kind]([cue for part in parts for cue in cues(*part)])


def write(path: Path, text: str, no_older_than_ns: int) -> None:
    """The whole file or nothing of it, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    try:
        with unfinished.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mtime_ns = max(time.time_ns(), no_older_than_ns)
        os.utime(unfinished, ns=(mtime_ns, mtime_ns))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
