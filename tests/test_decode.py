"""server/glmasr_decode.py: as glmasr_media decodes at once, but in blocks; and files that are cut off, damaged or too long."""

import io
import re
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from glmasr_decode import MAX_PARTS, decode_blocks, probe_duration
from vllm.multimodal.audio import resample_audio_soxr

from server import glmasr_media

RATE = 16000
SOUNDFILE = {"wav": "PCM_16", "flac": "PCM_16", "ogg": "VORBIS"}
AAC = {"m4a": "ipod", "mp4": "mp4", "mkv": "matroska", "aac": "adts"}
RATES = (8000, 22050, 44100, 48000)


def sound(seconds: float, rate: int, channels: int) -> np.ndarray:
    """(samples, channels) float32: a wavering tone in noise, another in every channel."""
    time = np.arange(int(seconds * rate))[:, None] / rate
    tones = 0.3 * np.sin(2 * np.pi * (200 + 150 * np.arange(channels)) * time * (1 + 0.1 * np.sin(time)))
    return (tones + 0.02 * np.random.default_rng(0).standard_normal(tones.shape)).astype(np.float32)


def by_pyav(container: str, codec: str, samples: np.ndarray, rate: int, **options: str) -> bytes:
    file, layout = io.BytesIO(), {1: "mono", 2: "stereo", 8: "7.1"}[samples.shape[1]]
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.codec_context.layout = layout
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="flt", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        fifo = av.AudioFifo()
        for part in av.AudioResampler(stream.codec_context.format.name, layout, rate).resample(frame):
            fifo.write(part)
        while part := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return file.getvalue()


def encoded(kind: str, seconds: float = 3.2, rate: int = 44100, channels: int = 2) -> bytes:
    samples = sound(seconds, rate, channels)
    if kind in AAC:
        return by_pyav(AAC[kind], "aac", samples, rate)
    if kind == "mp3":
        return by_pyav("mp3", "libmp3lame", samples, rate)
    if kind in ("opus", "webm"):
        return by_pyav("ogg" if kind == "opus" else "webm", "libopus", sound(seconds, 48000, channels), 48000)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind.upper(), subtype=SOUNDFILE[kind])
    return file.getvalue()


def decoded(data: bytes, max_s: float = 100) -> np.ndarray:
    return np.concatenate(list(decode_blocks(io.BytesIO(data), RATE, max_s)))


def at_once(data: bytes) -> np.ndarray:
    waveform, rate = glmasr_media.decode(data, 100, 1 << 30)
    return resample_audio_soxr(waveform, orig_sr=rate, target_sr=RATE)


def refusal(data: bytes, max_s: float = 100) -> tuple[str, float]:
    """What is wrong with the data, and the seconds that were handed out before that was said."""
    seconds = 0.0
    with pytest.raises(ValueError) as error:  # noqa: PT012
        for block in decode_blocks(io.BytesIO(data), RATE, max_s):
            seconds += block.size / RATE
    print(error.value)
    return str(error.value), seconds


def without_lengths(wav: bytes, size: int) -> bytes:
    """A WAV as it is written live, with `size` for both its sizes."""
    return wav[:4] + struct.pack("<I", size) + wav[8:40] + struct.pack("<I", size) + wav[44:]


def unknown_length(flac: bytes) -> bytes:
    return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


# --- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SOUNDFILE, "mp3", *AAC])
def test_every_format_rate_and_channel_count_gives_what_decoding_at_once_gives(kind):
    for rate in RATES:
        for channels in (1, 2):
            data = encoded(kind, rate=rate, channels=channels)
            blocks, expected = decoded(data), at_once(data)
            assert blocks.dtype == np.float32 and blocks.shape == expected.shape
            assert np.abs(blocks - expected).max() <= 1e-6, (rate, channels)


@pytest.mark.parametrize("kind", ["opus", "webm"])
def test_opus_gives_what_decoding_at_once_gives(kind):
    for channels in (1, 2):
        data = encoded(kind, channels=channels)
        assert np.array_equal(decoded(data), at_once(data))


@pytest.mark.parametrize(
    ("container", "codec"),
    [("matroska", "flac"), ("matroska", "pcm_s16le"), ("matroska", "pcm_u8"), ("mov", "pcm_s24le"), ("ipod", "alac")],
)
def test_integers_in_whatever_container_become_samples_from_minus_one_to_one(container, codec):
    samples = sound(2, RATE, 2)
    blocks = decoded(by_pyav(container, codec, samples, RATE))
    assert np.abs(blocks - samples.mean(axis=1)).max() < (0.01 if codec == "pcm_u8" else 1e-4)


@pytest.mark.parametrize("channels", [3, 6])
def test_more_than_two_channels_are_averaged(channels):
    file = io.BytesIO()
    soundfile.write(file, sound(2, 48000, channels), 48000, format="WAV")
    assert np.array_equal(decoded(file.getvalue()), at_once(file.getvalue()))


def test_eight_channels_apart_from_one_another_which_pyav_itself_cannot_take_are_averaged():
    loud = np.repeat(sound(2, 48000, 1), 8, axis=1)
    for container, codec in (("mp4", "aac"), ("matroska", "pcm_s16le")):
        blocks = decoded(by_pyav(container, codec, loud, 48000))
        assert blocks.size == pytest.approx(2 * RATE, abs=RATE // 10)
        assert 0.8 < np.abs(blocks).mean() / np.abs(loud).mean() < 1.1


@pytest.mark.parametrize("kind", ["wav", "mp3", "m4a"])
def test_blocks_are_about_a_second(kind):
    sizes = [block.size / RATE for block in decode_blocks(io.BytesIO(encoded(kind, 10.5)), RATE, 100)]
    assert max(sizes) < 1.2 and len(sizes) <= 13


def test_a_path_will_do_and_an_open_file_stays_open(tmp_path):
    path = tmp_path / "audio"
    for kind in ("flac", "webm"):
        path.write_bytes(encoded(kind))
        with path.open("rb") as file:
            file.seek(100)
            from_file = np.concatenate(list(decode_blocks(file, RATE, 100)))
            assert not file.closed
        assert np.array_equal(from_file, np.concatenate(list(decode_blocks(path, RATE, 100))))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF - 36])
def test_a_wav_written_live_is_decoded_to_its_end(size):
    wav = encoded("wav")
    assert np.array_equal(decoded(without_lengths(wav, size)), decoded(wav))


def test_a_flac_written_live_is_decoded_to_its_end():
    flac = encoded("flac")
    assert np.array_equal(decoded(unknown_length(flac)), decoded(flac))


def test_a_webm_written_live_is_decoded_to_its_end():
    samples = sound(3, 48000, 1)
    live = by_pyav("webm", "libopus", samples, 48000, live="1")
    assert probe_duration(io.BytesIO(live)) is None
    assert np.array_equal(decoded(live), decoded(by_pyav("webm", "libopus", samples, 48000)))


def test_recordings_joined_in_one_file_are_decoded_all():
    opus, mp3 = encoded("opus"), encoded("mp3", 4)
    bare = by_pyav("mp3", "libmp3lame", sound(4, 44100, 2), 44100, write_xing="0")
    assert decoded(opus * 2).size == pytest.approx(2 * decoded(opus).size, abs=RATE // 20)
    assert decoded(mp3 * 3).size == pytest.approx(3 * decoded(mp3).size, abs=RATE // 5)
    assert decoded(bare * 3).size == pytest.approx(3 * decoded(mp3).size, abs=RATE // 5)


@pytest.mark.parametrize("kind", ["opus", "mp3"])
def test_joined_recordings_come_whole_in_chat_too(kind):
    one = encoded(kind, 4)
    assert at_once(one * 2).size == pytest.approx(2 * at_once(one).size, abs=RATE // 5)


def test_an_mp3_of_variable_rate_that_does_not_tell_its_length_comes_whole_in_chat():
    """By its first frames, which are silent, soundfile takes it for shorter, and stops there."""
    samples, file = sound(12, 44100, 1), io.BytesIO()
    samples[: 6 * 44100] = 0
    soundfile.write(file, samples, 44100, format="MP3", bitrate_mode="VARIABLE", compression_level=0)
    told = file.getvalue()
    bare = told.replace(b"Xing", bytes(4), 1)
    assert bare != told and len(soundfile.read(io.BytesIO(bare))[0]) < 8 * 44100
    assert at_once(bare).size == pytest.approx(12 * RATE, abs=RATE // 5)


def test_a_wav_that_is_cut_off_is_refused_in_chat_too():
    data = encoded("wav", 8)
    with pytest.raises(ValueError, match=r"is incomplete: by its headers it has at least \d+ bytes"):
        glmasr_media.decode(data[: len(data) // 2], 100, 1 << 30)


def test_a_rate_that_changes_midway_is_followed():
    low, high = encoded("aac", rate=22050), encoded("aac", rate=44100)
    assert decoded(low + high).size == pytest.approx(2 * 3.2 * RATE, abs=RATE // 5)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "m4a", "mp4", "mkv", "webm"])
def test_the_duration_is_told_beforehand(kind):
    assert probe_duration(io.BytesIO(encoded(kind))) == pytest.approx(3.2, abs=0.05)


# --- files that are cut off or damaged -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SOUNDFILE, "opus", "webm", "mp3", *AAC])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_is_cut_off_is_an_error_and_not_a_shorter_text(kind, share):
    data = encoded(kind, 8)
    message, _ = refusal(data[: int(share * len(data))])
    assert re.search(r"is incomplete: by its headers it has at least \d+ bytes|is damaged after \d\.\d s", message)


def test_live_and_fragmented_files_that_are_cut_off_are_errors_too():
    samples = sound(8, 48000, 1)
    for data in (
        by_pyav("webm", "libopus", samples, 48000, live="1"),
        by_pyav("mp4", "aac", samples, 48000, movflags="frag_keyframe+empty_moov", frag_duration="1000000"),
    ):
        assert decoded(data).size == pytest.approx(8 * RATE, abs=RATE // 20)
        assert "is incomplete" in refusal(data[: len(data) * 6 // 10])[0]


@pytest.mark.parametrize("kind", ["flac", "ogg", "opus", "webm", "m4a", "mkv", "mp3"])
def test_a_hole_in_the_middle_is_an_error(kind):
    data, middle = encoded(kind, 8), len(encoded(kind, 8)) // 2
    hole = data[:middle] + bytes(12_000) + data[middle + 12_000 :]
    message, seconds = refusal(hole)
    assert "is damaged at byte" in message or "is damaged after 3." in message or "is damaged after 4." in message
    assert seconds < 4.5


def test_samples_that_are_no_numbers_are_refused():
    file, samples = io.BytesIO(), sound(3, RATE, 1)
    samples[40_000] = np.nan
    soundfile.write(file, samples, RATE, format="WAV", subtype="FLOAT")
    assert refusal(file.getvalue()) == ("the audio has NaN or infinite samples after 2.0 s", 2.0)


# --- what is not audio ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"x", b"<html>" + b"hello " * 3000, b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1/a.ts\n", b"ffconcat version 1.0\nfile a.wav\n"],
    ids=["a byte", "a page", "a playlist", "a list of files"],
)
def test_what_is_not_audio_is_named_by_its_first_bytes(data):
    message, _ = refusal(data)
    assert message.startswith(f"{len(data)} bytes that begin with {data[:8]!r} cannot be read as audio; expected a wav, ")


@pytest.mark.parametrize(
    "data", [b"OggS", b"ID3", b"fLaC", b"\x1a\x45\xdf\xa3", b"\xff\xfb", b"\0\0\0\x18ftypmp42", b"RIFF0000WAVE"], ids=repr
)
def test_a_beginning_alone_is_an_error(data):
    assert re.search(r"incomplete|damaged", refusal(data)[0])


def test_an_empty_file_and_one_without_samples_are_refused():
    assert refusal(b"")[0].startswith("the audio is empty (0 bytes); expected a wav, flac, ogg, mp3, m4a, mp4, webm or mkv")
    assert refusal(without_lengths(encoded("wav", 0), 0))[0] == "the wav file has no audio in it (0 samples)"


def test_a_video_without_sound_is_refused():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        output.mux(stream.encode(None))
    assert refusal(file.getvalue())[0] == "the mp4 file has no audio track"


def test_an_absurd_sampling_rate_is_refused():
    wav = encoded("wav", channels=1)
    assert "a sampling rate of 100000000 Hz" in refusal(wav[:24] + struct.pack("<I", 10**8) + wav[28:])[0]


# --- length and memory ------------------------------------------------------------------------------------


def silent_flac(hours: float) -> bytes:
    """At 8 kHz, in some KiB."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC", subtype="PCM_16") as output:
        for _ in range(int(hours * 60)):
            output.write(np.zeros(8000 * 60, np.int16))
    return file.getvalue()


@pytest.fixture(scope="module")
def bomb() -> bytes:
    data = silent_flac(2)
    assert len(data) < 300_000
    return data


def test_a_small_file_with_hours_of_audio_is_refused_before_anything_is_decoded(bomb):
    assert refusal(bomb, 3600) == ("the audio is 7200 s long; at most 3600 s are taken", 0)


def test_one_that_keeps_its_length_to_itself_is_refused_when_the_limit_is_passed(bomb):
    before = rss_mib()
    message, seconds = refusal(unknown_length(bomb), 3600)
    assert message == "the audio is longer than 3600 s, the most that is taken"
    assert 3590 < seconds <= 3600 and rss_mib() < before + 16


def test_an_mp4_that_speaks_of_more_samples_than_it_has_bytes_is_refused():
    m4a = encoded("m4a")
    table = m4a.index(b"stsz") + 8
    many = m4a[:table] + struct.pack(">II", 1, 50_000_000) + m4a[table + 8 :]
    assert refusal(many)[0] == f"the mp4 file of {len(m4a)} bytes is damaged: it speaks of 50000000 samples"
    pcm = by_pyav("mov", "pcm_s16le", sound(2, RATE, 1), RATE)
    table = pcm.index(b"stsc") + 16
    assert "it speaks of" in refusal(pcm[:table] + struct.pack(">I", 1 << 31) + pcm[table + 4 :])[0]
    live = by_pyav("mp4", "aac", sound(2, RATE, 1), RATE, movflags="frag_keyframe+empty_moov")
    table = live.index(b"trun") + 4
    assert "it speaks of" in refusal(live[:table] + struct.pack(">II", 1, 1 << 28) + live[table + 8 :])[0]


def test_a_file_of_countless_parts_is_refused(monkeypatch):
    monkeypatch.setattr("glmasr_decode.MAX_PARTS", 100_000)
    webm = b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" + b"\xec\x80" * 200_000
    assert refusal(webm)[0] == "the webm file has more than 100000 parts"
    assert MAX_PARTS > 24 * 3600 * (50 + 60)  # a day of audio and video


def long_wav(path: Path, hours: float) -> None:
    """Silence that takes no room on the disk."""
    size = int(hours * 3600 * RATE) * 2
    with path.open("wb") as file:
        sizes = (size + 36, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", size)
        header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", *sizes)
        file.write(header)
        file.truncate(size + len(header))


def long_flac(path: Path, hours: float) -> None:
    """One that does not tell its length, which soundfile cannot read."""
    path.write_bytes(unknown_length(silent_flac(hours)))


@pytest.mark.parametrize("make", [long_wav, long_flac], ids=["by soundfile", "by PyAV"])
def test_three_hours_take_no_more_memory_than_some_seconds(tmp_path, make):
    make(tmp_path / "long", 3)
    sizes, memory = [], []
    for block in decode_blocks(tmp_path / "long", RATE, 4 * 3600):
        sizes.append(block.size)
        memory.append(rss_mib())
    print(f"{sum(sizes) / RATE:.0f} s, {memory[20]:.1f} MiB after 20 s, at most {max(memory):.1f} MiB")
    assert sum(sizes) == pytest.approx(3 * 3600 * RATE, rel=0.01)
    assert max(memory) < memory[20] + 4
