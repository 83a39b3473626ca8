"""The server through its APIs: the sample recordings, every spelling of a request, and its speed."""

import time

import httpx
import numpy as np
import openai
import pytest
import soundfile
from clients import (
    DESCRIBE, MAX_TOKENS, MODEL, TRANSCRIBE, WAVS, Reference, ask, ask_all, audio_part, chat, expected_text, wav_bytes,
)  # fmt: skip
from conftest import CHECKPOINT, Server, run_server

START_LIMIT_S = 60
CLIP_LIMIT_S = 1.5

PLACEHOLDER = "<|audio|>"
MARKED = "<|begin_of_audio|><|audio|><|end_of_audio|>"


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.mark.parametrize("wav", WAVS, ids=lambda wav: wav.stem)
def test_chat_gives_each_sample_its_text(server: Server, wav):
    assert chat(server, [audio_part(wav.read_bytes())]).choices[0].message.content == expected_text(wav)


@pytest.mark.parametrize("wav", WAVS, ids=lambda wav: wav.stem)
def test_the_transcription_route_gives_each_sample_its_text(server: Server, wav):
    transcription = server.client.audio.transcriptions.create(model=MODEL, file=wav, temperature=0)
    assert transcription.text.strip() == expected_text(wav)


@pytest.mark.parametrize(
    "before, after",
    [
        ([], [TRANSCRIBE]),
        ([TRANSCRIBE], []),
        ([], [PLACEHOLDER + TRANSCRIBE]),
        ([], [TRANSCRIBE + PLACEHOLDER]),
        ([], [f"{MARKED}\n{TRANSCRIBE}"]),
        ([PLACEHOLDER], [TRANSCRIBE]),
        ([], [f"  {TRANSCRIBE}\n"]),
        ([], []),
    ],
    ids=["after", "before", "placeholder first", "placeholder last", "marks", "own part", "spaces", "no text"],
)
def test_every_accepted_spelling_gives_the_same_prompt_ids(server: Server, reference: Reference, before, after):
    wav = next(wav for wav in WAVS if wav.stem == "en_french")
    waveform, _ = soundfile.read(wav, dtype="float32")
    wanted = reference.prompt_ids([{"type": "audio", "audio": waveform}, {"type": "text", "text": TRANSCRIBE}])
    texts = [[{"type": "text", "text": text} for text in part] for part in (before, after)]
    completion = chat(server, [*texts[0], audio_part(wav.read_bytes()), *texts[1]])
    assert completion.model_extra["prompt_token_ids"] == wanted
    assert completion.choices[0].message.content == expected_text(wav)


def test_the_transcription_route_builds_the_same_prompt(reference: Reference):
    from vllm.config import ModelConfig
    from vllm.config.speech_to_text import SpeechToTextParams
    from vllm.model_executor.models.glm_asr import GlmasrForConditionalGeneration

    model_config = ModelConfig(str(CHECKPOINT))
    params = SpeechToTextParams(
        audio=np.zeros(16000, np.float32), model_config=model_config,
        stt_config=GlmasrForConditionalGeneration.get_speech_to_text_config(model_config, "transcribe"),
    )  # fmt: skip
    prompt = GlmasrForConditionalGeneration.get_generation_prompt(params)
    messages = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": TRANSCRIBE}]}]
    text = reference.processor.apply_chat_template(messages, tokenize=False)
    assert prompt["prompt_token_ids"] == reference.processor.tokenizer.encode(text, add_special_tokens=False)


def test_several_audios_are_taken_in_order(server: Server, reference: Reference):
    wavs = [next(wav for wav in WAVS if wav.stem == stem) for stem in ("en_french", "zh_birthday", "en_cake")]
    text = {"type": "text", "text": TRANSCRIBE}
    completion = chat(server, [*(audio_part(wav.read_bytes()) for wav in wavs), text])
    content = [*({"type": "audio", "path": str(wav)} for wav in wavs), text]
    assert completion.model_extra["prompt_token_ids"] == reference.prompt_ids(content)
    inputs = reference.processor.apply_chat_template([{"role": "user", "content": content}])
    output = reference.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
    (answer,) = reference.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert completion.choices[0].message.content == answer


def test_a_streamed_answer_is_the_same_text(server: Server):
    wav = next(wav for wav in WAVS if wav.stem == "en_long")
    chunks = server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": [audio_part(wav.read_bytes())]}], temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 10
    assert "".join(pieces) == expected_text(wav)


def test_a_client_that_leaves_a_stream_takes_no_text_from_the_next_one(server: Server):
    wav = next(wav for wav in WAVS if wav.stem == "en_long")
    waveform, _ = soundfile.read(wav, dtype="float32")
    data = {"file": ("long.wav", wav_bytes(waveform * 0.99))}  # audio that no test has sent yet, of two windows
    form = {"model": MODEL, "temperature": "0", "stream": "true"}
    url = f"{server.url}/v1/audio/transcriptions"
    with httpx.stream("POST", url, files=data, data=form, timeout=60) as response:
        next(response.iter_lines())
    text = httpx.post(url, files=data, data=form | {"stream": "false"}, timeout=60).json()["text"]
    assert text.strip() == expected_text(wav)


def test_a_description_names_the_language(server: Server):
    for stem, language in (("en_french", "English"), ("zh_birthday", "Mandarin")):
        wav = next(wav for wav in WAVS if wav.stem == stem)
        waveform, _ = soundfile.read(wav, dtype="float32")
        assert language in ask(server, waveform, DESCRIBE)


def test_translation_is_refused(server: Server):
    with pytest.raises(openai.BadRequestError, match="only transcribes"):
        server.client.audio.translations.create(model=MODEL, file=WAVS[0])


def test_a_key_that_is_set_is_asked_for(tmp_path):
    with run_server(tmp_path / "server.log", API_KEY="a secret") as locked:
        url = f"{locked.url}/v1/models"
        assert httpx.get(url).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer another"}).status_code == 401
        assert httpx.get(url, headers={"Authorization": "Bearer a secret"}).status_code == 200


def test_a_start_takes_less_than_a_minute(server: Server):
    print(f"healthy after {server.started_s:.1f} s")
    assert server.started_s < START_LIMIT_S


def test_a_clip_of_five_seconds_takes_less_than_a_second_and_a_half(server: Server):
    waveform, _ = soundfile.read(next(wav for wav in WAVS if wav.stem == "en_french"), dtype="float32")
    took = []
    for i in range(5):  # another silence before it each time, so that no cache answers
        clip = np.zeros(5 * 16000, np.float32)
        clip[i * 1600 :][: waveform.size] = waveform
        began = time.monotonic()
        ask(server, clip)
        took.append(time.monotonic() - began)
    print(f"a 5 s clip takes {np.median(took):.2f} s (median of {len(took)}, slowest {max(took):.2f} s)")
    assert np.median(took) < CLIP_LIMIT_S


def test_health_and_models_answer_while_clips_are_worked_on(server: Server):
    waveforms = [soundfile.read(wav, dtype="float32")[0] for wav in WAVS]
    assert ask_all(server, waveforms * 3, in_flight=21) == [expected_text(wav) for wav in WAVS] * 3
    assert [model.id for model in server.client.models.list()] == [MODEL]
