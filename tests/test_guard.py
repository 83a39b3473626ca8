"""server/glmasr_guard.py: true speech is never doubted, loops always are, and what is done about a doubt."""

import asyncio
import random

import pytest
import sentences
import soundfile
from conftest import CHECKPOINT, ROOT
from glmasr_guard import MAX_TRIES, Decoded, Guarded, compression_ratio, doubts, max_tokens, transcribe
from tokenizers import Tokenizer

SENTENCES = 250  # held out, of each language
RATES = (2.0, 3.0, 4.5, 6.0)  # words or characters a second
LOOPS = {
    "word": "no " * 400,
    "punctuated word": "Yes. " * 400,
    "phrase with a repeat in it": "He asked, and we said no no no no, " * 60,
    "phrase": "I want to bake a cake. How much is and then " + "we went to the " * 90,
    "sentence": "It is raining in Beijing. " * 75,
    "CJK character": "我说" + "对" * 400,
    "CJK phrase": "提醒我明天早上一点零八分准备晚饭。" + "我要三本，" * 100,
    "mixed phrase": "打开 Wi-Fi，" * 120,
    "growing": " ".join("and so I went back home"[: 1 + i % 23] for i in range(140)),
    "counting": "".join(f"There are {sentences.english_number(i)} apples. " for i in range(80)),
    "CJK counting": "".join(f"这是第{sentences.mandarin_number(i)}个。" for i in range(80)),
    "long word": "ha" * 1500,
}
TRUE_REPEATS = {
    "no no no no": ("No no no no!", 0.8),
    "对对对对": ("对对对对。", 0.7),
    "a sentence said twice": ("It is raining in Beijing. It is raining in Beijing.", 2.5),
    "a sentence said four times": ("我要三本杂志。" * 4, 5.0),
    "a chant": ("We want cake! " * 20, 24.0),
    "marching": ("one two " * 30, 28.0),
    "laughter": ("哈" * 40, 8.0),
    "no at six a second": ("no " * 60, 10.0),
    "对 at eight a second": ("对" * 80, 10.0),
    "a detector that hears half of it": ("No no no no!", 0.35),
}


def answer(text: str, logprob: float = -0.2, finish_reason: str = "stop") -> Decoded:
    return Decoded(text, list(range(len(text.split()) or len(text))), logprob, finish_reason)


@pytest.fixture(scope="module")
def spoken() -> list[tuple[str, int]]:
    """Held-out sentences, alone, in pairs and in both languages, and how many words and characters each has."""
    rng = random.Random(0)
    texts = {language: [sentences.held_out_sentence(language, rng) for _ in range(SENTENCES)] for language in sentences.LANGUAGES}
    counted = [(text, len(sentences.units(language, text))) for language, some in texts.items() for text in some]
    pairs = [rng.sample(counted, 2) for _ in range(SENTENCES)]
    return counted + [(f"{one} {other}", first + second) for (one, first), (other, second) in pairs]


@pytest.mark.parametrize("rate", RATES)
def test_true_sentences_at_a_natural_rate_are_never_doubted(spoken, rate):
    doubted = [(text, found) for text, count in spoken if (found := doubts(answer(text), count / rate, count / rate))]
    assert not doubted and len(spoken) >= 400


@pytest.mark.parametrize("rate", RATES)
def test_many_true_sentences_in_half_a_minute_are_never_doubted(spoken, rate):
    rng = random.Random(1)
    for _ in range(50):
        text, count = "", 0
        while count < 25 * rate:
            more, length = rng.choice(spoken)
            text, count = f"{text} {more}", count + length
        assert doubts(answer(text), max(30.0, count / rate), count / rate) == [], text


@pytest.mark.parametrize("wav", sorted(ROOT.glob("wavs/*.wav")), ids=lambda wav: wav.stem)
def test_the_samples_are_never_doubted(wav):
    duration = soundfile.info(wav).duration
    assert doubts(answer(wav.with_suffix(".txt").read_text()), duration, 0.7 * duration) == []


@pytest.mark.parametrize(("text", "speech_s"), TRUE_REPEATS.values(), ids=TRUE_REPEATS)
def test_what_is_truly_said_again_and_again_is_kept(text, speech_s):
    assert doubts(answer(text), speech_s + 1, speech_s) == []


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_a_loop_that_outruns_the_audio_is_doubted(text):
    assert "looping" in doubts(answer(text), 30, 20)


@pytest.mark.parametrize("name", ["word", "phrase", "sentence", "CJK character", "CJK phrase", "mixed phrase"])
def test_a_loop_that_ran_into_its_bound_is_doubted_at_any_rate(name):
    some = LOOPS[name][: len(LOOPS[name]) // 4]
    assert doubts(answer(some, finish_reason="length"), 60, 55) == ["looping", "cut_off"]


def test_a_loop_is_seen_though_its_last_word_is_broken_off():
    broken = answer("Well thank you thank you thank you thank yo", finish_reason="length")
    assert doubts(broken, 30, 20) == ["looping", "cut_off"]


def test_what_follows_a_loop_is_kept():
    text = "no " * 100 + "stop"
    assert doubts(answer(text), 10, 4) == ["looping", "too_much_text"]
    assert guard(dict.fromkeys(ALL_LOOP, answer(text)), speech_s=4.0).text.endswith("no stop")


def test_an_answer_that_ran_into_its_bound_is_cut_off():
    assert doubts(answer("It is raining in", finish_reason="length"), 3, 2) == ["cut_off"]


@pytest.mark.parametrize("text", ["Thank you for watching.", "谢谢观看。", "."])
def test_text_without_speech_is_doubted(text):
    assert doubts(answer(text), 5, 0.05) == ["no_speech"]
    assert doubts(answer(" "), 5, 0.05) == []


def test_more_than_can_be_said_is_doubted_though_nothing_is_repeated(spoken):
    english, mandarin = (" ".join(text for text, _ in some[:12]) for some in (spoken, spoken[SENTENCES:]))
    assert doubts(answer(english), 20, 4) == doubts(answer(mandarin), 20, 4) == ["too_much_text"]
    assert doubts(answer(english), 4, 20) == ["too_much_text"]


@pytest.mark.parametrize(("text", "speech_s"), [("再见。", 4.5), ("你会说中文吗？", 8.4), ("Good evening.", 3.0)])
def test_less_than_the_slowest_say_is_doubted(text, speech_s):
    assert doubts(answer(text), 10, speech_s) == ["too_little"]
    assert doubts(answer(text), 10, speech_s / 3) == doubts(answer(""), 10, speech_s) == []


def test_no_time_and_no_tries_are_refused():
    for seconds, speech_s in ((0, 0), (-1, 0), (1, -1), (float("nan"), 0), (1, float("nan"))):
        with pytest.raises(ValueError, match="expected more than 0 s of audio"):
            doubts(answer("Yes."), seconds, speech_s)
    with pytest.raises(ValueError, match="at least 1 try"):
        guard({}, max_tries=0)


def test_the_compression_ratio_is_whispers():
    assert compression_ratio("") == 0
    assert compression_ratio("It is raining in Beijing.") < 1.5 < 2.4 < compression_ratio(LOOPS["sentence"])


@pytest.mark.parametrize("language", sentences.LANGUAGES)
def test_the_bound_on_tokens_leaves_room_for_all_that_is_said(language):
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    rng = random.Random(2)
    some = [sentences.held_out_sentence(language, rng) for _ in range(200)]
    for text in [*some, *(" ".join(some[i : i + 20]) for i in range(0, 200, 20))]:
        seconds = len(sentences.units(language, text)) / 6
        assert len(tokenizer.encode(text).ids) < max_tokens(seconds), text
    assert max_tokens(30) == 376


# ---- transcribe: samples are named by strings here, and each answer is written down for (samples, temperature) ----


def guard(
    answers: dict[tuple[str, float], Decoded], seconds: float = 10.0, speech_s: float = 3.0, max_tries: int = MAX_TRIES,
    halves: tuple[str, ...] = ("left", "right"), asked: list | None = None,
) -> Guarded:  # fmt: skip
    async def decode(samples: str, temperature: float) -> Decoded:
        if asked is not None:
            asked.append((samples, temperature))
        return answers[samples, temperature]

    return asyncio.run(transcribe("whole", seconds, speech_s, decode, lambda _: list(halves), max_tries))


LOOP = answer(LOOPS["phrase"], -0.05, "length")
ALL_LOOP = {(samples, t): LOOP for samples in ("whole", "left", "right") for t in (0.0, 0.2, 0.4, 0.6)}


def test_an_answer_without_doubt_is_asked_for_once():
    asked: list = []
    result = guard({("whole", 0.0): answer("It is raining.", -0.1)}, asked=asked)
    assert asked == [("whole", 0.0)]
    assert result == Guarded("It is raining.", -0.1, compression_ratio("It is raining."), pytest.approx(0.7), 0.0, [])


def test_shorter_windows_are_tried_next_and_put_together():
    answers = ALL_LOOP | {("left", 0.0): answer("It is raining", -0.1), ("right", 0.0): answer("in Beijing.", -0.4)}
    result = guard(answers)
    assert (result.text, result.temperature, result.warnings) == ("It is raining in Beijing.", 0.0, [])
    assert result.avg_logprob == pytest.approx((3 * -0.1 + 2 * -0.4) / 5)


@pytest.mark.parametrize(
    ("left", "right", "whole"),
    [
        ("我要", "三本杂志。", "我要三本杂志。"),
        ("打开", "Wi-Fi", "打开Wi-Fi"),
        ("", " Yes. ", "Yes."),
        ("Yes.", "", "Yes."),
        ("", "", ""),
    ],
)
def test_windows_are_put_together_as_their_script_is_written(left, right, whole):
    assert guard(ALL_LOOP | {("left", 0.0): answer(left), ("right", 0.0): answer(right)}).text == whole


def test_sampling_comes_last_and_ends_with_the_first_answer_without_doubt():
    asked: list = []
    result = guard(ALL_LOOP | {("whole", 0.4): answer("It is raining.")}, asked=asked)
    assert asked == [("whole", 0.0), ("left", 0.0), ("right", 0.0), ("whole", 0.2), ("whole", 0.4)]
    assert (result.text, result.temperature, result.warnings) == ("It is raining.", 0.4, [])


def test_a_sentence_that_is_missing_is_sought_in_windows_and_not_by_sampling():
    missing, asked = {key: answer("再见。") for key in ALL_LOOP}, []
    found = missing | {("right", 0.0): answer("今天是一月八号，星期二。")}
    assert guard(found, speech_s=4.5, asked=asked).text == "再见。今天是一月八号，星期二。"
    assert asked == [("whole", 0.0), ("left", 0.0), ("right", 0.0)]
    assert guard(missing, speech_s=9.0, asked=asked).warnings == ["too_little"] and asked[3:] == asked[:3]
    assert guard(missing, speech_s=4.5, halves=("whole",)).warnings == ["too_little"]


def test_what_cannot_be_split_is_sampled_at_once():
    asked: list = []
    guard(ALL_LOOP, halves=("whole",), asked=asked)
    assert asked == [("whole", t) for t in (0.0, 0.2, 0.4, 0.6)]


@pytest.mark.parametrize("max_tries", range(1, MAX_TRIES + 1))
def test_no_more_is_tried_than_allowed(max_tries):
    asked: list = []
    guard(ALL_LOOP, max_tries=max_tries, asked=asked)
    assert len(asked) == max_tries + (max_tries > 1)  # the second try asks for both halves


def test_the_fewest_doubts_win_then_the_likeliest_then_the_least_repetitive():
    cut = answer("It is raining in", -0.9, "length")
    assert guard(ALL_LOOP | {("whole", 0.2): cut}).text == cut.text
    assert guard(ALL_LOOP | {("whole", 0.2): cut, ("whole", 0.6): answer("It is snowing in", -0.5, "length")}).temperature == 0.6
    repetitive = answer("It is it is it is it is it is in", -0.9, "length")
    assert guard(ALL_LOOP | {("whole", 0.2): repetitive, ("whole", 0.6): cut}).text == cut.text


@pytest.mark.parametrize(
    "name",
    [
        "word",
        "punctuated word",
        "phrase",
        "phrase with a repeat in it",
        "sentence",
        "CJK character",
        "CJK phrase",
        "mixed phrase",
    ],
)
def test_a_loop_that_stays_is_shortened_to_what_can_be_said(name):
    text = LOOPS[name]
    result = guard(dict.fromkeys(ALL_LOOP, answer(text, finish_reason="length")), speech_s=4.0, halves=())
    assert text.startswith(result.text) and result.text
    assert "looping" in result.warnings and doubts(answer(result.text), 10, 4) == []
    assert doubts(answer(text[: len(result.text) + 12]), 10, 2.5)  # and not shorter than need be


def test_what_stands_before_a_loop_is_kept_however_little_time_there_is():
    result = guard(ALL_LOOP, speech_s=1.0)
    assert result.text == "I want to bake a cake. How much is and then we went to the"


def test_a_text_that_repeats_itself_but_fits_is_kept_whole():
    text = "We want cake! " * 9
    assert guard(dict.fromkeys(ALL_LOOP, answer(text, finish_reason="length")), speech_s=8.0, halves=()).text == text


def test_random_texts_lose_nothing_but_looping_tails():
    rng = random.Random(3)
    for _ in range(200):
        head = " ".join(rng.choices("abcdefghij对好是，", k=rng.randrange(30)))
        period = rng.choices(["no", "对", "we", "went", "好的，", "Yes."], k=rng.randrange(1, 6))
        text = " ".join([head, *period * rng.randrange(1, 60)])
        found = answer(text, finish_reason=rng.choice(["stop", "length"]))
        result = guard(dict.fromkeys(ALL_LOOP, found), seconds=10, speech_s=rng.uniform(0.1, 10), halves=())
        assert text.startswith(result.text) and len(result.text) >= len(head.rstrip(" ，"))
        assert result.text == text or "looping" in result.warnings


def test_text_without_speech_is_dropped_only_if_the_model_was_unsure_of_it():
    unsure, sure = (guard(dict.fromkeys(ALL_LOOP, answer("Thank you.", p)), speech_s=0, halves=()) for p in (-1.5, -0.1))
    assert (unsure.text, unsure.warnings, unsure.no_speech_prob) == ("", ["no_speech"], 1.0)
    assert (sure.text, sure.warnings, sure.no_speech_prob) == ("Thank you.", ["no_speech"], 1.0)


def test_silence_is_silence_and_speech_beyond_the_segment_is_all_of_it():
    assert guard({("whole", 0.0): answer("")}, speech_s=0).text == ""
    assert guard({("whole", 0.0): answer("Yes.")}, seconds=1.0, speech_s=1.02).no_speech_prob == 0.0


def test_cancellation_and_errors_pass_through():
    async def cancelled() -> None:
        async def decode(samples: str, temperature: float) -> Decoded:
            await asyncio.sleep(60)
            raise AssertionError("was not cancelled")

        task = asyncio.create_task(transcribe("whole", 1.0, 1.0, decode, lambda _: [], MAX_TRIES))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())
    with pytest.raises(KeyError):
        guard({})
