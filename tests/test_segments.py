"""server/glmasr_segments.py and glmasr_vad.py on spoken recordings whose times are known."""

import random
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution

import numpy as np
import onnxruntime
import pytest
from conftest import ROOT
from glmasr_segments import GRID, RANGES, Cutting, Segment, Segmenter, halves
from glmasr_vad import CHUNK, CONTEXT, VoiceActivity
from sentences import training_sentence
from speech import background, mix, non_speech, sample_voice, synthesize

import registry

RATE = 16000
NEAR_S = 0.3
LINE = {"install.sh": ROOT / "server" / "install.sh", "dockerfile": ROOT / "dockerfile"}


@dataclass(frozen=True)
class Recording:
    """Samples (samples,), and the first sample and the end of each sentence in them."""

    samples: np.ndarray
    sentences: list[tuple[int, int]]

    def spoken_together(self, pause_s: float) -> list[tuple[int, int]]:
        """The sentences, joined where less than `pause_s` lies between them."""
        joined = self.sentences[:1]
        for begin, end in self.sentences[1:]:
            if begin - joined[-1][1] < pause_s * RATE:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((begin, end))
        return joined


def spoken(seed: int, count: int, pauses: tuple, sounds: bool, snr_db: float | None = None) -> Recording:
    """English and Mandarin in random voices, `pauses` a choice of ranges in seconds.

    `sounds` puts tones, chords, clicks or noise into long pauses, 0.4 s from either sentence.
    """
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    parts, sentences, place = [np.zeros(RATE // 2, np.float32)], [], RATE // 2
    for _ in range(count):
        language = rng.choice(("en", "zh"))
        speech = synthesize(training_sentence(language, rng), sample_voice(language, rng)) * np.float32(rng.uniform(0.3, 1))
        loud = np.flatnonzero(np.abs(speech) > 0.02 * np.abs(speech).max())
        speech = speech[loud[0] : loud[-1] + 1]
        pause = np.zeros(int(rng.uniform(*rng.choice(pauses)) * RATE), np.float32)
        if sounds and pause.size > 1.4 * RATE:
            edge = int(0.4 * RATE)
            pause[edge:-edge] = non_speech(noise, pause.size / RATE)[: pause.size - 2 * edge]
        sentences.append((place, place + speech.size))
        place += speech.size + pause.size
        parts += [speech, pause]
    samples = np.concatenate(parts)
    if snr_db is not None:
        samples = mix(samples, background("hiss", samples.size, noise), snr_db)
    return Recording(samples, sentences)


@pytest.fixture(scope="module")
def paused() -> Recording:
    """40 sentences with pauses of 0.3 to 3 s, none of about `silence_ms`, where either is right."""
    return spoken(20, 40, ((0.3, 0.4), (0.65, 3), (0.65, 3), (0.65, 3)), sounds=True)


@pytest.fixture(scope="module")
def fluent() -> Recording:
    """40 sentences that no pause of `silence_ms` separates, over faint noise, so that no two stretches of it are equal."""
    return spoken(12, 40, ((0.15, 0.4),), sounds=False, snr_db=40)


def segmented(samples: np.ndarray, cutting: Cutting = Cutting(), sizes: tuple[int, ...] = (RATE,)) -> list[Segment]:
    segmenter, found, place, turn = Segmenter(cutting), [], 0, 0
    while place < samples.size:
        size = sizes[turn % len(sizes)]
        found += segmenter.feed(samples[place : place + size])
        place, turn = place + size, turn + 1
    return found + segmenter.finish()


def place_of(segment: Segment, samples: np.ndarray) -> int:
    """Where the segment's audio begins in the recording."""
    speech = round(segment.start_s * RATE)
    return next(
        begin
        for begin in range(speech, -1, -1)
        if samples[begin] == segment.samples[0]
        and np.array_equal(samples[begin : begin + segment.samples.size], segment.samples)
    )


def handed_out(segments: list[Segment], samples: np.ndarray) -> np.ndarray:
    """(samples,) how often each sample was."""
    counts = np.zeros(samples.size, int)
    for segment in segments:
        begin = place_of(segment, samples)
        counts[begin : begin + segment.samples.size] += 1
    return counts


def in_word(cut: int, recording: Recording) -> bool:
    """Whether the cut is in a sentence, but not in a pause within it."""
    level = np.abs(recording.samples)
    around = level[cut - RATE // 25 : cut + RATE // 25].mean()  # 80 ms
    return any(begin < cut < end and around > 0.05 * level[begin:end].mean() for begin, end in recording.sentences)


# --- where speech is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [None, 10])
def test_speech_is_found_with_its_times_and_nothing_else(snr_db):
    starts, ends, missed, false, count = [], [], 0, 0, 0
    for seed in (20, 22, 23):
        recording = spoken(seed, 40, ((0.3, 0.4), (0.65, 3), (0.65, 3), (0.65, 3)), snr_db is None, snr_db)
        segments = segmented(recording.samples)
        times = np.array([(segment.start_s, segment.end_s) for segment in segments]) * RATE
        for begin, end in recording.spoken_together(0.5):
            starts.append(np.abs(times[:, 0] - begin).min() / RATE)
            ends.append(np.abs(times[:, 1] - end).min() / RATE)
        met = np.array([[start < end and begin < stop for begin, end in recording.sentences] for start, stop in times])
        missed, false, count = missed + (~met.any(axis=0)).sum(), false + (~met.any(axis=1)).sum(), count + met.shape[1]
    near = [float(np.mean(np.array(errors) <= NEAR_S)) for errors in (starts, ends)]
    print(f"starts within {NEAR_S} s {near[0]:.1%}, ends {near[1]:.1%}, {missed} of {count} missed, {false} false segments")
    assert min(near) >= 0.95 and missed == 0 and false == 0


def test_the_speech_of_a_segment_is_measured(paused):
    spoken_s = sum(end - begin for begin, end in paused.sentences) / RATE
    assert sum(segment.speech_s for segment in segmented(paused.samples)) == pytest.approx(spoken_s, rel=0.1)


def test_silence_noise_and_music_are_not_handed_out():
    rng = np.random.default_rng(5)
    found = [segment for _ in range(50) for segment in segmented(non_speech(rng, 6.0))]
    assert found == []


def test_a_recording_without_samples_or_shorter_than_a_chunk_has_no_segments():
    for size in (0, 1, CHUNK - 1):
        assert segmented(np.zeros(size, np.float32)) == []


# --- what is handed out -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cutting", [Cutting(), Cutting(max_s=8), Cutting(silence_ms=150), Cutting(prefix_padding_ms=1000)], ids=str
)
def test_every_sample_of_speech_is_handed_out_once_and_no_sample_twice(fluent, cutting):
    segments = segmented(fluent.samples, cutting)
    counts = handed_out(segments, fluent.samples)
    lost = [(begin / RATE, end / RATE) for begin, end in fluent.sentences if (counts[begin:end] == 0).mean() > 0.01]
    assert counts.max() == 1 and lost == []
    assert all(a.end_s <= b.start_s for a, b in zip(segments, segments[1:], strict=False))


@pytest.mark.parametrize("seed", range(4))
def test_segments_do_not_depend_on_the_blocks_that_the_audio_comes_in(fluent, seed):
    samples = fluent.samples[: 60 * RATE]
    rng = np.random.default_rng(seed)
    sizes = tuple(int(size) for size in np.exp(rng.uniform(0, np.log(40 * RATE), 40))) if seed else (samples.size,)
    cutting = Cutting(max_s=7)
    expected, found = segmented(samples, cutting, (320,)), segmented(samples, cutting, sizes)
    assert len(expected) > 8
    for a, b in zip(expected, found, strict=True):
        assert (a.start_s, a.end_s, a.speech_s) == (b.start_s, b.end_s, b.speech_s)
        assert np.array_equal(a.samples, b.samples)


def test_a_segment_comes_as_soon_as_its_pause_is_long_enough(paused):
    segmenter, place, delays = Segmenter(Cutting()), 0, []
    while place < paused.samples.size:
        place += CHUNK
        delays += [place / RATE - segment.end_s for segment in segmenter.feed(paused.samples[place - CHUNK : place])]
    assert len(delays) > 25 and np.median(delays) < 0.55


def test_audio_is_added_before_and_after_speech():
    recording = spoken(3, 6, ((2, 3),), sounds=False, snr_db=40)
    for prefix_ms in (0, 300, 1000):
        for segment in segmented(recording.samples, Cutting(prefix_padding_ms=prefix_ms)):
            before = round(segment.start_s * RATE) - place_of(segment, recording.samples)
            after = segment.samples.size - before - round((segment.end_s - segment.start_s) * RATE)
            assert before == min(prefix_ms * RATE // 1000, round(segment.start_s * RATE)) and after == 0.2 * RATE


def test_a_shorter_pause_ends_a_segment_where_that_is_asked_for(fluent):
    assert len(segmented(fluent.samples, Cutting(silence_ms=150))) > 3 * len(segmented(fluent.samples))


# --- speech that is too long ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_s", [8, 30])
def test_long_speech_is_cut_in_pauses_and_not_in_words(fluent, max_s):
    segments = segmented(fluent.samples, Cutting(max_s=max_s))
    ends = [place_of(segment, fluent.samples) + segment.samples.size for segment in segments]
    within = [end / RATE for end in ends[:-1] if in_word(end, fluent)]
    sizes = [segment.samples.size for segment in segments]
    assert len(segments) > fluent.samples.size / RATE / max_s
    assert max(sizes) <= max_s * RATE < 2 * np.mean(sizes)
    assert within == []


def test_speech_without_a_pause_is_cut_on_the_grid_where_it_is_quietest_and_loses_nothing():
    recording = spoken(5, 40, ((0.05, 0.06),), sounds=False, snr_db=40)
    samples = np.concatenate([recording.samples[begin:end] for begin, end in recording.sentences])  # no pause is left
    segments = segmented(samples, Cutting(max_s=6))
    sizes = [segment.samples.size for segment in segments]
    places = [place_of(segment, samples) for segment in segments]
    cut = [place for place, before, size in zip(places[1:], places, sizes, strict=False) if place == before + size]
    on_grid = [size % GRID == 0 for size in sizes[:-1]]
    print(f"{len(segments)} segments, {len(cut)} cuts in speech, {np.mean(on_grid):.0%} on the grid")
    assert max(sizes) <= 6 * RATE and min(sizes) >= 0.1 * RATE and np.mean(on_grid) > 0.5
    assert (handed_out(segments, samples) == 1).mean() > 0.99
    around = [np.abs(samples[place - RATE // 50 : place + RATE // 50]).mean() for place in cut]
    assert np.median(around) < 0.5 * np.abs(samples).mean()


def test_at_most_a_window_is_held(fluent):
    segmenter, held = Segmenter(Cutting(max_s=10)), []
    for begin in range(0, fluent.samples.size, 4000):
        segmenter.feed(fluent.samples[begin : begin + 4000])
        held.append(len(segmenter._chunks) * CHUNK / RATE)
    segmenter.feed(np.zeros(20 * RATE, np.float32))
    assert 9 < max(held) < 11 and len(segmenter._chunks) * CHUNK / RATE < 1


def test_a_whole_recording_is_a_segment_with_its_speech_measured(paused):
    samples = paused.samples[: paused.sentences[2][1]]
    whole = Segment.whole(np.array_split(samples, 5))
    assert (whole.start_s, whole.end_s) == (0, samples.size / RATE) and np.array_equal(whole.samples, samples)
    assert whole.speech_s == pytest.approx(sum(end - begin for begin, end in paused.sentences[:3]) / RATE, rel=0.15)
    assert Segment.whole([np.zeros(RATE, np.float32)]).speech_s == 0


def test_halves_are_cut_in_the_pause_and_a_short_clip_is_not(fluent):
    (_, end), (begin, _) = fluent.sentences[4:6]
    clip = fluent.samples[end - 4 * RATE : begin + 4 * RATE]
    first, second = halves(clip)
    assert np.array_equal(np.concatenate([first, second]), clip) and first.size % GRID == 0
    assert min(first.size, second.size) >= clip.size // 6
    assert not in_word(end - 4 * RATE + first.size, fluent)
    assert len(halves(np.zeros(RATE + GRID, np.float32))) == 2 and len(halves(np.zeros(RATE - 1, np.float32))) == 1


# --- parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANGES)
def test_a_parameter_out_of_range_is_named(name):
    least, most = RANGES[name]
    for value in (least, most):
        assert vars(Cutting(**{name: value}))[name] == value
    for value in (least - 0.01, most + 0.01, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value}; expected {least} to {most}")):
            Cutting(**{name: value})


# --- the model ------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_packages_own_model_chunk_by_chunk(paused):
    path = distribution("silero-vad").locate_file("silero_vad/data/silero_vad.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    samples = paused.samples[: 20 * RATE // CHUNK * CHUNK]
    state, context, expected = np.zeros((2, 1, 128), np.float32), np.zeros(CONTEXT, np.float32), []
    for chunk in samples.reshape(-1, CHUNK):
        inputs = {"input": np.concatenate([context, chunk])[None], "state": state, "sr": np.array(RATE)}
        probability, state = session.run(None, inputs)
        context = chunk[-CONTEXT:]
        expected.append(probability.item())
    assert max(expected) > 0.99 and min(expected) < 0.01
    assert np.abs(VoiceActivity().feed(samples) - expected).max() <= 1e-6


def test_probabilities_do_not_depend_on_the_blocks_and_streams_not_on_one_another(paused):
    samples, rng = paused.samples[: 20 * RATE], np.random.default_rng(0)
    blocks = np.split(samples, np.sort(rng.integers(0, samples.size, 300)))
    stream, other = VoiceActivity(), VoiceActivity()
    found = []
    for block in blocks:
        found.append(stream.feed(block))
        other.feed(block[::-1])
    assert np.array_equal(np.concatenate(found), VoiceActivity().feed(samples))
    assert np.concatenate(found).shape == (samples.size // CHUNK,)


def test_neither_torch_nor_the_package_around_the_model_is_imported():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'server')!r}); import glmasr_segments as s, numpy as n\n"
        "s.Segmenter(s.Cutting()).feed(n.zeros(9999, n.float32))\n"
        "assert not {'torch', 'silero_vad', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_modules_find_one_another_as_a_package_too(tmp_path):
    for source in registry.FILES:
        if source.startswith("server/") and source.endswith(("vad.py", "segments.py", "decode.py")):
            (tmp_path / source.split("/")[1]).write_bytes((ROOT / source).read_bytes())
    package = tmp_path.name
    code = f"import sys; sys.path.insert(0, {str(tmp_path.parent)!r}); import {package}.glmasr_segments, {package}.glmasr_decode"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("file", LINE)
def test_the_installed_model_is_the_one_that_is_named(file):
    versions = set(re.findall(r"silero-vad==([\d.]+)", LINE[file].read_text()))
    assert versions == {distribution("silero-vad").version}
