"""Audio files of any length to blocks of samples at the model's rate, as a stream: memory does not grow with the length.

Gives the values of `glmasr_media.decode`, resampled: native rate, channels averaged, soxr. A file that is cut off or
damaged is an error wherever its container lets one see it, since a shorter text would look like the whole one.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import soundfile
import soxr

EXPECTED = "wav, flac, ogg, mp3, m4a, mp4, webm or mkv"
MAX_S = 24 * 3600  # seconds
RATES = (1000, 768_000)  # Hz, in a file
BLOCK_S = 1
BLOCK_VALUES = 1 << 20  # samples × channels read at once, at most
MAX_PARTS = 10_000_000  # pages, boxes or elements of a file
UNKNOWN_FRAMES = 1 << 62  # libsndfile says so many or more where a file does not tell
MP3_SLACK = 2 * 1152  # samples: how far an MP3's header may be off, as some encoders count their delay in
SLACK = 64  # bytes that a WAV's size may be too large by, as some writers count the header in
TAGS = 4096  # bytes of tags behind an MP3's last frame; more may be audio
PLACEHOLDERS = (range(1), range(0x7FFF_F000, 0x8000_0001), range(0xFFFF_F000, 0x1_0000_0000))  # sizes a live WAV has

# How each container begins. A WAV's and an AIFF's size stands between the two parts.
SIGNATURES = {
    "wav": rb"(RIFF|RF64|RIFX).{4}WAVE",
    "aiff": rb"FORM.{4}AIF[FC]",
    "flac": rb"fLaC",
    "ogg": rb"OggS",
    "mp3": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",  # a tag, or a layer-III frame of MPEG 2.5, 2 or 1
    "aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    "mp4": rb".{4}(ftyp|moov|mdat|wide|free|skip)",
    "webm": rb"\x1a\x45\xdf\xa3",
}
DEMUXERS = "aac,flac,matroska,mov,mp3,ogg,wav"  # of FFmpeg's, those that read the file itself and no other
ESTIMATING = ("aac", "mp3", "ogg")  # those that guess the duration, or tell that of the first of joined recordings

# MP4's boxes that hold those with samples' sizes: each one, and what is looked for in it.
BOXES = {b"moov": b"trak", b"trak": b"mdia", b"mdia": b"minf", b"minf": b"stbl", b"moof": b"traf", b"traf": b"trun"}
MAX_RUNS = 1_000_000  # chunks with as many samples as one another, in a table
# Matroska's elements: those that contain others of this table, and those to be skipped.
SEGMENT, CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
ELEMENTS = {SEGMENT, CLUSTER} | {
    bytes.fromhex(name)
    for name in (
        "1a45dfa3 114d9b74 1549a966 1654ae6b 1c53bb6b 1254c367 1043a770 1941a469 ec bf "  # files and segments
        "e7 5854 a7 ab a0 a3 af"  # clusters
    ).split()
}
BIT_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def decode_blocks(file: BinaryIO | Path, sampling_rate: int = 16000, max_s: float = MAX_S) -> Iterator[np.ndarray]:
    """Decodes the first audio track of a file, which must be seekable and is read from its beginning.

    Yields:
        (samples,) float32 at `sampling_rate`, about a second each

    Raises:
        ValueError: the file is empty, not audio, has no audio track, is incomplete, damaged, or longer than `max_s`;
            where only decoding shows it, after the blocks before
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            yield from decode_blocks(opened, sampling_rate, max_s)
        return
    source = _Source(file)
    seconds, resampler, rate = 0.0, None, None
    try:
        for samples, native in source.pieces(max_s):
            if not np.isfinite(samples).all():
                raise ValueError(f"the audio has NaN or infinite samples after {seconds:.1f} s")
            seconds += samples.size / native
            if seconds > max_s:
                raise ValueError(f"the audio is longer than {max_s:g} s, the most that is taken")
            if native != rate:  # at the beginning; some live streams change it later too
                yield from _rest(resampler)
                rate, resampler = native, _resampler(native, sampling_rate)
            block = resampler.resample_chunk(samples) if resampler else samples
            if block.size:
                yield block
    except (soundfile.LibsndfileError, av.error.FFmpegError) as error:
        raise source.damaged(seconds, _reason(error)) from error
    yield from _rest(resampler)
    if not seconds:
        raise ValueError(f"the {source.name} has no audio in it (0 samples)")


def probe_duration(file: BinaryIO | Path) -> float | None:
    """Seconds of audio in a file by what it says itself; None where it does not. An ogg or webm file is read once.

    Raises:
        ValueError: the file is empty, not audio, has no audio track, or is incomplete
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return probe_duration(opened)
    with _Source(file).opened() as sound:
        return _told_s(sound)


def read_by_soundfile(file: BinaryIO) -> bool:
    """Whether soundfile, if it can read the file at all, reads it to its end: not so with some mp3s and joined recordings.

    Raises:
        ValueError: the file is empty, incomplete, or damaged in its structure
    """
    return _Source(file).check()


def _resampler(native: int, sampling_rate: int) -> soxr.ResampleStream | None:
    if not RATES[0] <= native <= RATES[1]:
        raise ValueError(f"the audio has a sampling rate of {native} Hz; expected {RATES[0]} to {RATES[1]}")
    return soxr.ResampleStream(native, sampling_rate, 1, dtype="float32") if native != sampling_rate else None


def _rest(resampler: soxr.ResampleStream | None) -> Iterator[np.ndarray]:
    """What a resampler still holds at the end."""
    if resampler and (block := resampler.resample_chunk(np.zeros(0, np.float32), last=True)).size:
        yield block


def _reason(error: soundfile.LibsndfileError | av.error.FFmpegError) -> str:
    return error.error_string if isinstance(error, soundfile.LibsndfileError) else error.strerror


def _told_s(sound: soundfile.SoundFile | av.container.InputContainer) -> float | None:
    """How long an open file says it is, in seconds."""
    if isinstance(sound, soundfile.SoundFile):
        return sound.frames / sound.samplerate
    stream = sound.streams.audio[0]
    if sound.format.name in ESTIMATING:
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    return sound.duration / av.time_base if sound.duration is not None else None


class _Sound(soundfile.SoundFile):
    """Read from the beginning to the end: `read` would seek to where it is after every block, which garbles some MP3s."""

    def seekable(self) -> bool:
        return False


class _Source:
    """An audio file: what it is, whether it is whole, and its samples."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = file.seek(0, 2)
        if not self.size:
            raise ValueError(f"the audio is empty (0 bytes); expected a {EXPECTED} file")
        self.parts = 0
        self.begin = self.read(0, 12)
        self.kind = next((kind for kind, start in SIGNATURES.items() if re.match(start, self.begin, re.DOTALL)), None)
        self.name = f"{self.kind} file" if self.kind else "audio file"

    # --- how it is built ------------------------------------------------------------------------------------------------

    def read(self, at: int, length: int) -> bytes:
        """Fewer bytes at the file's end."""
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise ValueError(f"the {self.name} has more than {MAX_PARTS} parts")
        self.file.seek(at)
        return self.file.read(length)

    def incomplete(self, told: int) -> ValueError:
        return ValueError(f"the {self.name} is incomplete: by its headers it has at least {told} bytes, but {self.size} came")

    def damaged_at(self, at: int) -> ValueError:
        return ValueError(f"the {self.name} of {self.size} bytes is damaged at byte {at}")

    def damaged(self, seconds: float, reason: str) -> ValueError:
        return ValueError(f"the {self.name} is damaged after {seconds:.1f} s of audio were decoded: {reason}")

    def check(self) -> bool:
        """Whether soundfile, too, would read to the end.

        Raises:
            ValueError: the file is incomplete, or damaged in its structure
        """
        checks = {"wav": self._check_chunks, "aiff": self._check_chunks, "mp4": self._check_boxes}
        checks |= {"webm": self._check_elements, "ogg": self._check_pages, "mp3": self._check_tag}
        return checks[self.kind]() if self.kind in checks else True

    def _check_chunks(self) -> bool:
        """WAV and AIFF: the chunk with the samples; written live, its size is a placeholder."""
        order, at = "<" if self.begin[:4] in (b"RIFF", b"RF64") else ">", 12
        while len(head := self.read(at, 8)) == 8:
            name, length = struct.unpack(order + "4sI", head)
            if name not in (b"data", b"SSND"):
                at += 8 + length + length % 2
                continue
            if self.begin.startswith(b"RF64"):
                (length,) = struct.unpack("<Q", self.read(28, 8))
            if not any(length in sizes for sizes in PLACEHOLDERS) and at + 8 + length > self.size + SLACK:
                raise self.incomplete(at + 8 + length)
            break
        return True

    def _check_boxes(self) -> bool:
        """MP4, by ISO/IEC 14496-12: the boxes one behind the other, and how many samples their tables speak of.

        FFmpeg sets room aside for each of these; as each takes up a byte at least, there cannot be more than bytes.
        """
        samples = 0
        for name, begin, end in self._boxes(0, self.size):
            if name in (b"moov", b"mdat", b"moof") and end > self.size:
                raise self.incomplete(end)
            samples += self._samples(name, begin, end)
            if samples > self.size:
                raise ValueError(f"the {self.name} of {self.size} bytes is damaged: it speaks of {samples} samples")
        return True

    def _boxes(self, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Yields the names of the boxes that begin there, and where their contents begin and end."""
        while len(head := self.read(begin, 16)) >= 8 and begin < end:
            length, name, long = struct.unpack(">I4sQ", head.ljust(16, b"\0"))
            content = begin + (16 if length == 1 else 8)
            begin = end if length == 0 else begin + (long if length == 1 else length)
            if begin < content:
                return
            yield name, content, begin

    def _samples(self, name: bytes, begin: int, end: int) -> int:
        """How many samples the tables within a box speak of without telling their sizes one by one, in bytes for `stsz`."""
        if name in BOXES:
            return sum(self._samples(*box) for box in self._boxes(begin, end) if box[0] == BOXES[name])
        if name == b"trun":
            flags, count = struct.unpack(">II", self.read(begin, 8).ljust(8, b"\0"))
            return 0 if flags & 0x200 else count
        tables = {table: content + 4 for table, content, _ in self._boxes(begin, end)} if name == b"stbl" else {}
        if not {b"stsz", b"stsc"} <= tables.keys():
            return 0
        each, count = struct.unpack(">II", self.read(tables[b"stsz"], 8).ljust(8, b"\0"))
        chunks, runs = (
            int.from_bytes(self.read(at, 4), "big") if at else 0
            for at in (tables.get(b"stco") or tables.get(b"co64"), tables[b"stsc"])
        )
        table = self.read(tables[b"stsc"] + 4, 12 * min(runs, MAX_RUNS))
        first, samples, _ = np.frombuffer(table, ">u4", len(table) // 12 * 3).reshape(-1, 3).T
        following = np.append(first[1:], chunks + 1).astype(np.float64)  # products of these may exceed 64 bits
        return each * max(count, int(((following - first).clip(0) * samples).sum()))

    def _check_elements(self) -> bool:
        """Matroska, by RFC 8794: every element up to the end, some of them of unknown size."""
        at, end = 0, self.size
        while at < end:
            head = self.read(at, 12).ljust(12, b"\0")
            width = 9 - head[0].bit_length()
            name, head = head[:width], head[width:]
            width = 9 - head[0].bit_length()
            if name not in ELEMENTS or width > 8:
                raise self.damaged_at(at)
            most = (1 << 7 * width) - 1
            length = int.from_bytes(head[:width], "big") & most
            at += len(name) + width
            if length == most:
                length = 0
                if name not in (SEGMENT, CLUSTER):
                    raise self.damaged_at(at)
            elif at + length > self.size:
                raise self.incomplete(at + length)
            elif name == SEGMENT:
                end = at + length
            if name not in (SEGMENT, CLUSTER):
                at += length
        return True

    def _check_pages(self) -> bool:
        """Ogg, by RFC 3533: every page and its checksum. Of streams that follow one another soundfile reads the first."""
        at, chained, within = 0, False, False
        while at < self.size:
            head = self.read(at, 27 + 255)
            if not head.startswith(b"OggS"):
                raise self.damaged_at(at)
            head = head[: 27 + head[26]] if len(head) >= 27 else head
            length = len(head) + sum(head[27:])
            page = head + self.read(at + len(head), length - len(head))
            if len(head) < 27 or len(page) < length:
                raise self.incomplete(at + max(length, 27))
            blanked = (page[:22] + bytes(4) + page[26:]).translate(BIT_REVERSED)
            checksum = zlib.crc32(blanked, 0xFFFF_FFFF) ^ 0xFFFF_FFFF  # Ogg's, its bits in the other direction
            if checksum.to_bytes(4, "big").translate(BIT_REVERSED) != page[22:26]:
                raise self.damaged_at(at)
            first = bool(page[5] & 2)
            chained, within = chained or (first and within), within or not first
            at += length
        return not chained

    def _check_tag(self) -> bool:
        """MP3: the size in the first frame. Without it soundfile guesses the length, and may stop too early."""
        begin, head = 0, self.read(0, 10)
        if head.startswith(b"ID3") and len(head) == 10:
            begin = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        found = re.search(rb"(?:Xing|Info)...([\x03\x07\x0b\x0f]).{4}(.{4})", self.read(begin, 256), re.DOTALL)
        if not found:
            return False
        told = begin + int.from_bytes(found[2], "big")
        if told > self.size + TAGS:
            raise self.incomplete(told)
        return self.size <= told + TAGS

    # --- its samples ----------------------------------------------------------------------------------------------------

    def opened(self) -> soundfile.SoundFile | av.container.InputContainer:
        """By soundfile, or by PyAV where soundfile cannot, or not to the end.

        Raises:
            ValueError: the file is not audio, has no audio track, is incomplete, or damaged in its structure
        """
        reason = None
        if self.check():
            self.file.seek(0)
            try:
                sound = _Sound(self.file)
            except soundfile.LibsndfileError as error:
                reason = error.error_string
            else:
                if 0 < sound.frames < UNKNOWN_FRAMES:
                    return sound
                sound.close()
        self.file.seek(0)
        try:
            container = av.open(self.file, "r", options={"format_whitelist": DEMUXERS})
        except av.error.FFmpegError as error:
            if self.kind:
                reason = reason or _reason(error)
                raise ValueError(f"the {self.name} of {self.size} bytes is damaged or incomplete: {reason}") from error
            text = f"{self.size} bytes that begin with {self.begin[:8]!r} cannot be read as audio; expected a {EXPECTED} file"
            raise ValueError(text) from error
        if not container.streams.audio:
            container.close()
            raise ValueError(f"the {self.name} has no audio track")
        return container

    def pieces(self, max_s: float) -> Iterator[tuple[np.ndarray, int]]:
        """Yields about a second at a time: (samples,) float32, channels averaged, and the rate in Hz."""
        with self.opened() as sound:
            told_s = _told_s(sound)
            if told_s is not None and told_s > max_s:
                raise ValueError(f"the audio is {told_s:.0f} s long; at most {max_s:g} s are taken")
            yield from self._by_soundfile(sound) if isinstance(sound, soundfile.SoundFile) else self._by_pyav(sound)

    def _by_soundfile(self, sound: soundfile.SoundFile) -> Iterator[tuple[np.ndarray, int]]:
        at_once = max(1, min(BLOCK_S * sound.samplerate, BLOCK_VALUES // sound.channels))
        count = 0
        while len(block := sound.read(at_once, dtype="float32", always_2d=True)):  # (samples, channels)
            count += len(block)
            yield block.T.mean(axis=0), sound.samplerate
        if count + (MP3_SLACK if self.kind == "mp3" else 0) < sound.frames:
            told_s = sound.frames / sound.samplerate
            raise self.damaged(count / sound.samplerate, f"it should have {told_s:.1f} s")

    def _by_pyav(self, container: av.container.InputContainer) -> Iterator[tuple[np.ndarray, int]]:
        held, count, rate, setup, interleaved = [], 0, 0, None, None
        for packet in container.demux(container.streams.audio[0]):
            if container.format.name == "mp3" and packet.size and bytes(packet)[0] != 0xFF:
                continue  # a tag between two recordings that were joined
            for frame in packet.decode():
                found = frame.format.name, frame.layout.name, frame.sample_rate
                if held and (found != setup or count >= BLOCK_S * rate):
                    yield np.concatenate(held), rate
                    held, count = [], 0
                if found != setup:  # at the beginning, seldom later
                    setup, rate = found, frame.sample_rate
                    interleaved = av.AudioResampler("flt", frame.layout, rate)
                held += [_mono(part) for part in interleaved.resample(frame)]
                count += frame.samples
        if held:
            yield np.concatenate(held), rate


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """(samples,) float32, channels averaged, of a frame with interleaved float32.

    PyAV 18 reads beyond a frame of eight planes and more, so none is asked for its planes.
    """
    values = np.frombuffer(frame.planes[0], np.float32, frame.samples * frame.layout.nb_channels)
    return values.reshape(frame.samples, -1).T.mean(axis=0)
