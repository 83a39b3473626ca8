"""The parts of live transcription that need no server: events, audio on the wire, turns, and which text may be shown."""

import base64
import importlib.util
import json
import random
import re
import warnings

import numpy as np
import pytest
from glmasr_agreement import Agreement, aligned, joint, units
from glmasr_events import CLIENT_EVENTS, G711, Pcm, Refused, Settings, check, parse
from glmasr_limits import LIVE_LIMITS, Limits
from glmasr_turns import WINDOW, Turns
from glmasr_vad import CHUNK, VoiceActivity
from glmasr_voices import Voice, Voices
from glmasr_wire import TABLES, Recording, decode
from openai.types.realtime import realtime_transcription_session_audio_input_turn_detection as detection

SENTENCES = ["My sister wants to play the harp, but I don't.", "吴刚出生于一九三三年四月十八号。", "Say 你好 to her, it's 3.5 km.", ""]


def keys(text: str) -> list[str]:
    return [unit.key for unit in units(text)[0]]


# --- text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", SENTENCES)
def test_units_joined_are_the_text(text: str):
    found, tail = units(text)
    assert "".join(unit.before + unit.text for unit in found) + tail == text


def test_units_are_words_and_cjk_characters():
    assert [unit.text for unit in units(SENTENCES[2])[0]] == ["Say", "你", "好", "to", "her", "it's", "3.5", "km"]


def test_a_word_is_shown_when_two_decodings_agree_on_it():
    agreement = Agreement()
    assert agreement.partial("My system") == ""
    assert agreement.partial("My sister wants") == "My"
    assert agreement.partial("my sister wants to.") == " sister wants"
    assert agreement.partial("My sister, wants to play") == " to"
    assert agreement.finish("My sister wants to play the harp.") == " play the harp."
    assert agreement.text == "My sister wants to play the harp."


def test_what_was_shown_stays_when_a_later_decoding_differs():
    agreement = Agreement()
    agreement.partial("ice cream is")
    assert agreement.partial("ice cream is") == "ice cream is"
    assert agreement.finish("icecream is good.") == " good."  # no word is doubled, none lost
    assert agreement.text == "ice cream is good."


def test_windows_of_one_item_are_joined_with_no_word_lost_or_doubled():
    agreement = Agreement()
    agreement.partial("one two")
    agreement.partial("one two three")
    agreement.close_window("One two three.")
    agreement.partial("four five")
    agreement.partial("four five six")
    agreement.close_window("four five six")
    assert agreement.text == "one two three. four five six"
    assert agreement.finish("One two three. Four five six seven.") == " seven."


def test_cjk_is_joined_without_a_space():
    assert [joint("你好", "世界"), joint("hello", "world"), joint("", "a"), joint("好", "a"), joint("a", "")] == ["世界", " world", "a", "a", ""]


@pytest.mark.parametrize("seed", range(50))
def test_deltas_are_the_final_text_where_decodings_only_err_at_their_end(seed: int):
    rng = random.Random(seed)
    words = [rng.choice(["alpha", "beta", "gamma", "你", "好", "a"]) for _ in range(30)]
    final, agreement = " ".join(words) + ".", Agreement()
    for end in range(0, 30, rng.choice((1, 3))):
        agreement.partial(" ".join([*words[:end], f"noise{rng.random()}"]))
        assert keys(agreement.text) == words[: len(keys(agreement.text))]
    agreement.finish(final)
    assert agreement.text == final


def test_alignment_is_by_least_edit_distance():
    assert aligned(list("abcd"), list("abxde")) == 4
    assert aligned(list("abc"), []) == 0
    assert aligned([], list("abc")) == 0
    assert aligned(list("ab"), list("abab")) == 2


# --- the wire -----------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("audioop") is None, reason="Python 3.13 has no audioop to compare with")
def test_g711_is_decoded_as_pythons_audioop_decodes_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import audioop
    every = bytes(range(256))
    for name, expected in (("audio/pcmu", audioop.ulaw2lin(every, 2)), ("audio/pcma", audioop.alaw2lin(every, 2))):
        assert (TABLES[name] == np.frombuffer(expected, np.int16)).all(), name
        assert (decode(base64.b64encode(every).decode(), G711(type=name)) == np.frombuffer(expected, np.int16)).all()


@pytest.mark.parametrize(("audio", "says"), [("!!!!", "not base64"), ("YQ", "not base64"), (5, "not base64"), (None, "not base64"),
                                             ("YQ==", "1 bytes"), ("你好", "not base64")])  # fmt: skip
def test_audio_that_is_none_is_refused(audio, says):
    with pytest.raises(Refused, match=says) as refused:
        decode(audio, Pcm(type="audio/pcm"))
    assert refused.value.param == "audio"


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_a_recordings_clips_are_what_was_put_in(rate: int):
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate)).astype(np.int16)
    recording, light = Recording(rate), []
    for piece in np.array_split(tone, 37):
        light.append(recording.add(piece))
    assert recording.end == 48000
    assert 48000 - 800 <= sum(part.size for part in light) <= 48000
    recording.forget(8000)
    expected = 8000 / 32768 * np.sin(2 * np.pi * 440 * np.arange(16000, 32000) / 16000)
    clip = recording.clip(16000, 32000)
    assert clip.size == 16000 and np.abs(clip - expected)[200:-200].max() < 2e-3
    assert np.abs(np.concatenate(light)[16000:32000] - expected).max() < 0.02
    with pytest.raises(AssertionError, match="forgotten"):
        recording.clip(7000, 9000)


# --- events -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("message", "code", "param"), [
    ("{", "invalid_json", None), ("[1]", "invalid_json", None), (b"\xff\xfe", "invalid_json", None), ("[" * 100_000, "invalid_json", None),
    ({}, "missing_required_parameter", "type"), ({"type": "response.create"}, "invalid_value", "type"), ({"type": 5}, "invalid_value", "type"),
    ({"type": "transcription_session.update"}, "invalid_value", "type"), ({"type": ["a"]}, "invalid_value", "type"),
    ({"type": "input_audio_buffer.append"}, "missing_required_parameter", "audio"),
    ({"type": "input_audio_buffer.commit", "final": True}, "unknown_parameter", "final"),
])  # fmt: skip
def test_a_message_that_is_no_event_is_refused(message, code, param):
    with pytest.raises(Refused) as refused:
        check(parse(message if isinstance(message, str | bytes) else json.dumps(message)))
    assert (refused.value.code, refused.value.param) == (code, param)


@pytest.mark.parametrize(("changes", "code", "param"), [
    (5, "missing_required_parameter", "session"), ({}, "missing_required_parameter", "session.type"),
    ({"type": "realtime"}, "invalid_value", "session.type"), ({"type": "transcription", "voice": "a"}, "unknown_parameter", "session.voice"),
    ({"type": "transcription", "audio": {"input": {"format": {"type": "audio/mp3"}}}}, "invalid_value", "session.audio.input.format"),
    ({"type": "transcription", "audio": {"input": {"format": {"type": "audio/pcm", "rate": 8000}}}}, "invalid_value", "session.audio.input.format.rate"),
    ({"type": "transcription", "audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 2}}}}, "invalid_value",
     "session.audio.input.turn_detection.threshold"),
    ({"type": "transcription", "include": ["item.input_audio_transcription.logprobs"]}, "invalid_value", "session.include"),
])  # fmt: skip
def test_settings_that_are_none_are_refused_by_name(changes, code, param):
    with pytest.raises(Refused) as refused:
        Settings(type="transcription").updated(changes)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_updates_are_partial():
    def updated(settings: Settings, **heard) -> Settings:
        return settings.updated({"type": "transcription", "audio": {"input": heard}})

    settings = updated(Settings(type="transcription"), transcription={"language": "en"}, turn_detection={"type": "server_vad", "threshold": 0.7})
    settings = updated(settings, turn_detection={"type": "server_vad", "silence_duration_ms": 200}, transcription={"prompt": "p"})
    heard = settings.audio.input
    assert (heard.turn_detection.threshold, heard.turn_detection.silence_ms) == (0.7, 200)
    assert (heard.transcription.language, heard.transcription.prompt) == ("en", "p")
    settings = updated(settings, turn_detection=None, format={"type": "audio/pcmu"})
    assert updated(settings, transcription={"language": None}).audio.input.turn_detection is None
    assert updated(settings, turn_detection={"type": "semantic_vad", "eagerness": "low"}).audio.input.turn_detection.silence_ms == 2000


def test_the_clients_own_fields_of_turn_detection_are_known():
    theirs = {name for one in (detection.ServerVad, detection.SemanticVad) for name in one.model_fields}
    ours = {name for one in Settings.model_json_schema()["$defs"].items() if one[0].endswith("Vad") for name in one[1]["properties"]}
    assert theirs == ours and set(CLIENT_EVENTS) == {"session.update", *(f"input_audio_buffer.{one}" for one in ("append", "commit", "clear"))}


def test_limits_are_shared_by_processes():
    limits = Limits.read({"MAX_SESSIONS": "10", "MAX_PARTIALS": ""}, processes=4)
    assert (limits.sessions, limits.partials, limits.session_s) == (3, 4, 60 * float(LIVE_LIMITS["MAX_SESSION_MINUTES"]))


# --- turns --------------------------------------------------------------------------------------------


def found(turns: Turns, probabilities: list[float]) -> list[tuple[str, int]]:
    return [(what, turns.place // CHUNK) for probability in probabilities if (what := turns.step(probability))]


def test_a_turn_begins_after_two_chunks_and_ends_after_the_silence():
    turns = Turns(0.5, 320)
    assert found(turns, [0.1, 0.9, 0.1, 0.6, 0.9, 0.4, 0.4] + [0.1] * 30) == [("start", 5), ("stop", 15)]
    assert not turns.speaking and turns.start == 3 * CHUNK and turns.last == 7 * CHUNK
    assert found(turns, [0.9, 0.9]) == [("start", 39)]


def test_without_turn_detection_there_are_no_turns():
    assert found(Turns(0.5, None), [0.9] * 50 + [0.0] * 100) == []


def test_a_long_turn_is_cut_where_speech_is_least_likely():
    turns = Turns(0.5, 500)
    count = WINDOW // CHUNK
    found(turns, [0.9] * (count - 50) + [0.2] + [0.9] * 49)
    assert turns.cut() == (count - 50) * CHUNK + CHUNK // 2


async def _heard(parts: list[list[np.ndarray]]) -> list[list[float]]:
    import asyncio

    voices = Voices()
    voices.streams = len(parts)

    async def one(pieces: list[np.ndarray]) -> list[float]:
        voice = Voice()
        return [probability for piece in pieces for probability in await voices.hear(voice, piece)]

    return await asyncio.gather(*(one(pieces) for pieces in parts))


def test_streams_that_share_runs_have_the_probabilities_that_they_have_alone():
    import asyncio

    from held_out import speech_clips

    clips = [clip.waveform for clip in speech_clips(8)]
    rng = np.random.default_rng(0)
    pieces = [np.split(clip, np.sort(rng.integers(0, clip.size, 40))) for clip in clips]
    for clip, heard in zip(clips, asyncio.run(_heard(pieces)), strict=True):
        assert np.allclose(heard, VoiceActivity().feed(clip), atol=1e-4)


def test_nothing_in_the_pure_parts_imports_vllm():
    from conftest import ROOT

    pure = [path for path in (ROOT / "server").glob("glmasr_*.py") if re.search("agreement|events|limits|scribe|session|turns|voices|wire|upstream", path.name)]
    assert len(pure) >= 9
    assert not [path.name for path in pure if re.search(r"^\s*(from|import) vllm", path.read_text(), re.MULTILINE)]
