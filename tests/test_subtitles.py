"""server/glmasr_subtitles.py: valid SubRip and WebVTT, read back by public parsers, and text cut where it may be."""

import io
import random
import re

import pysubs2
import pytest
import sentences
import webvtt
from glmasr_subtitles import Cue, cues, srt, vtt

TWO = [Cue(0.0, 1.5, "It is raining."), Cue(1.5, 366_000.0004, "Yes & no,\n<maybe>.")]
SAMPLES = 150  # random texts of each property


def random_text(rng: random.Random) -> str:
    """True sentences in both languages, single words and signs, in any order."""
    parts = [
        lambda: sentences.sentence("en", rng),
        lambda: sentences.sentence("zh", rng),
        lambda: "".join(rng.choices("ab对好，。—()《》\"'“”-<>&3.é😀ー한", k=rng.randrange(1, 60))),
        lambda: rng.choice(["-->", "1", "NOTE", "WEBVTT", "e-mail", "3.5%", "\t", "\n\n", "  "]),
    ]
    return rng.choice(["", " "]).join(rng.choice(parts)() for _ in range(rng.randrange(1, 25)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return [random_text(rng) for _ in range(SAMPLES)]


def without_space(text: str) -> str:
    return "".join(text.split())


def columns(line: str) -> int:
    """42 for 21 CJK characters or full-width signs."""
    return len(line) + len(re.findall("[\u3000-\u9fff\uff00-\uff60]", line))


def test_subrip_is_written_to_the_letter():
    assert srt(TWO) == (
        "1\n00:00:00,000 --> 00:00:01,500\nIt is raining.\n\n"
        "2\n00:00:01,500 --> 101:40:00,000\nYes & no,\n<maybe>.\n"
    )  # fmt: skip
    assert srt([]) == ""


def test_webvtt_is_written_to_the_letter():
    assert vtt(TWO) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nIt is raining.\n\n"
        "00:00:01.500 --> 101:40:00.000\nYes &amp; no,\n&lt;maybe&gt;.\n"
    )  # fmt: skip
    assert vtt([]) == "WEBVTT\n"


@pytest.mark.parametrize("text", ["a --> b", "-->", "00:00:01.000 --> 00:00:02.000"])
def test_an_arrow_in_the_text_is_not_taken_for_times(text):
    assert srt([Cue(0, 1, text)]).count("-->") == vtt([Cue(0, 1, text)]).count("-->") == 1
    assert [cue.text for cue in webvtt.from_string(vtt([Cue(0, 1, text)]))] == [text.replace(">", "&gt;")]


def test_blank_lines_in_a_text_and_cues_without_text_are_left_out():
    some = [Cue(0, 1, "\n\none\r\n\r\n two \u2028\n"), Cue(1, 2, " \n"), Cue(2, 3, "three")]
    assert srt(some) == "1\n00:00:00,000 --> 00:00:01,000\none\ntwo\n\n2\n00:00:02,000 --> 00:00:03,000\nthree\n"
    assert [cue.text for cue in webvtt.from_string(vtt(some))] == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    "wrong",
    [
        [Cue(-1, 1, "a")],
        [Cue(2, 1, "a")],
        [Cue(float("nan"), 1, "a")],
        [Cue(0, float("inf"), "a")],
        [Cue(1, 2, "a"), Cue(0.5, 3, "b")],
    ],
)
def test_times_that_go_back_are_refused(wrong):
    for write in (srt, vtt):
        with pytest.raises(ValueError, match="expected a cue from"):
            write(wrong)


def test_a_segment_that_ends_before_it_begins_and_no_room_are_refused():
    with pytest.raises(ValueError, match="2 s to 1 s"):
        cues(2, 1, "Yes.")
    with pytest.raises(ValueError, match="at least 4 columns"):
        cues(0, 1, "Yes.", max_chars=3)


def test_rounded_times_never_overlap_and_no_cue_lasts_no_time():
    rng = random.Random(1)
    for _ in range(100):
        ends = sorted(rng.choice([0, 1e-4, 1e-3, 7, 3e5]) * rng.random() for _ in range(12))
        some = [Cue(start, end, "a") for start, end in zip(ends, ends[1:], strict=False)]
        written = pysubs2.SSAFile.from_string(srt(some), format_="srt")
        bounds = [time for event in written for time in (event.start, event.end)]
        assert bounds == sorted(bounds) and all(event.start < event.end for event in written) and len(written) == len(some)
        assert all(abs(event.start - 1000 * cue.start_s) < len(some) + 1 for event, cue in zip(written, some, strict=True))


def test_what_is_written_is_read_back_by_others(texts):
    for text in texts:
        some = cues(3.25, 63.5, text)
        plain = [Cue(cue.start_s, cue.end_s, re.sub(" *[<>&] *", "", cue.text) or "a") for cue in some]
        for write, name in ((srt, "srt"), (vtt, "vtt")):
            read = pysubs2.SSAFile.from_string(write(plain), format_=name)
            assert [event.plaintext for event in read] == [cue.text for cue in plain]
            times = [(round(1000 * cue.start_s), round(1000 * cue.end_s)) for cue in plain]
            assert [(event.start, event.end) for event in read] == times
        read = webvtt.from_buffer(io.BytesIO(vtt(some).encode()))
        escaped = [cue.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for cue in some]
        assert [cue.raw_text for cue in read] == escaped
        assert [cue.start_in_seconds for cue in read] == [round(cue.start_s * 1000) // 1000 for cue in some]


def test_nothing_is_lost_and_cues_fill_the_segment(texts):
    rng = random.Random(4)
    for text in texts:
        start_s, end_s = sorted((rng.uniform(0, 100), rng.uniform(0, 100)))
        some = cues(start_s, end_s, text)
        assert without_space("".join(cue.text for cue in some)) == without_space(text)
        if some:
            assert (some[0].start_s, some[-1].end_s) == (start_s, end_s)
            assert all(cue.start_s < cue.end_s and cue.text for cue in some)
            assert all(one.end_s == other.start_s for one, other in zip(some, some[1:], strict=False))


@pytest.mark.parametrize("max_chars", [84, 60])
def test_a_cue_has_two_lines_at_most_and_lines_have_42_columns(max_chars):
    rng = random.Random(2)
    for _ in range(SAMPLES):
        text = " ".join(sentences.sentence(rng.choice(["en", "zh"]), rng) for _ in range(rng.randrange(1, 12)))
        for cue in cues(0, 30, text, max_chars):
            lines = cue.text.split("\n")
            assert len(lines) <= 2 and all(0 < columns(line) <= max_chars // 2 for line in lines), cue


@pytest.mark.parametrize("max_chars", [4, 24, 84])
def test_words_are_never_broken_or_joined(texts, max_chars):
    for text in texts:
        words = re.findall(r"[A-Za-z]+", text)
        assert re.findall(r"[A-Za-z]+", " ".join(cue.text for cue in cues(0, 9, text, max_chars))) == words
        english = re.sub(r"[^\x00-\x7f]", "e", text)
        assert " ".join(cue.text for cue in cues(0, 9, english, max_chars)).split() == english.split()


def test_a_word_longer_than_a_line_has_a_line_of_its_own():
    lines = [line for cue in cues(0, 9, f"one {'x' * 100} two three") for line in cue.text.split("\n")]
    assert lines == ["one", "x" * 100, "two three"]


def test_no_line_begins_with_a_closing_sign_or_ends_with_an_opening_one():
    rng = random.Random(3)
    for _ in range(SAMPLES):
        text = "".join(rng.choice("好对我，。、！《》（）「」") for _ in range(rng.randrange(1, 200)))
        text = re.sub(r"([，。、！》）」])[，。、！》）」]+", r"\1", re.sub(r"[《（「]+(?=[《（「])", "", text))
        lines = [line for cue in cues(0, 9, text) for line in cue.text.split("\n")]
        assert not any(line[0] in "，。、！》）」" for line in lines[1:])
        assert not any(line[-1] in "《（「" for line in lines[:-1])


def test_cues_end_with_sentences_or_else_with_clauses():
    english = "I want to bake a cake. How much are the microphones? " * 4
    assert all(cue.text[-1] in ".?" for cue in cues(0, 20, english))
    mandarin = "提醒我明天早上一点零八分准备晚饭，我要三本杂志和一张照片，" * 4
    assert all(cue.text[-1] == "，" for cue in cues(0, 20, mandarin))
    quoted = "他昨天在电话里对我说：“提醒我明天早上准备晚饭。”" * 4
    assert all(cue.text[-1] == "”" for cue in cues(0, 20, quoted))


def test_a_line_that_just_fits_is_not_cut():
    one, two = "a" * 20 + " " + "b" * 21, "c" * 20 + " " + "d" * 20 + "."
    assert [cue.text for cue in cues(0, 20, f"{one} {two}")] == [f"{one}\n{two}"]
    assert [cue.text for cue in cues(0, 20, f"{one}. {one}. {two}")][-1] == two


def test_time_is_shared_out_by_length():
    some = cues(10, 30, "a" * 40 + " " + "b" * 40 + ". " + "c" * 40 + ".")
    assert [len(cue.text) for cue in some] == [82, 41]
    assert some[0].end_s == pytest.approx(10 + 20 * 82 / 123)


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_no_text_has_no_cues(text):
    assert cues(0, 1, text) == []


def test_a_short_segment_is_one_cue_in_one_line():
    assert cues(1, 2, " It is raining. ") == [Cue(1, 2, "It is raining.")]
    assert cues(1, 2, "外面在下雨。") == [Cue(1, 2, "外面在下雨。")]
