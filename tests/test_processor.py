"""model/processing_glmasr.py and the chat template, through AutoProcessor; and the JSON files of model/ and checkpoint/."""

import base64
import io
import json
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from conftest import CHECKPOINT, ROOT
from transformers import AutoConfig, AutoProcessor, BatchFeature, ProcessorMixin

RATE = 16000
INSTRUCTION = "Please transcribe this audio."
MARKED = "<|begin_of_audio|><|audio|><|end_of_audio|>"
# What differs between a small and a large model of the same family: sizes and token ids.
OWN_VALUES = {
    "audio_token_id", "eos_token_id", "pad_token_id", "vocab_size", "d_model", "encoder_attention_heads", "encoder_ffn_dim",
    "encoder_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
}  # fmt: skip


@pytest.fixture(scope="module")
def processor() -> ProcessorMixin:
    return AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose samples are 16-bit integers / 32768, so that a WAV file holds them exactly."""
    integers = np.random.default_rng(seed).integers(-8000, 8000, round(seconds * RATE))
    return (integers / 32768).astype(np.float32)


def encoded(waveform: np.ndarray, rate: int = RATE, format: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=format, subtype="PCM_16")
    return buffer.getvalue()


def audio(source) -> dict:
    return {"type": "audio", "audio": source}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def assert_equal(a: BatchFeature, b: BatchFeature) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def prompt_of(inputs: BatchFeature, processor: ProcessorMixin, row: int = 0) -> list[int]:
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


# --- sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "Path", "FLAC path", "tensor", "half tensor", "bytes", "base64", "data URL", "float64"])
def test_every_kind_of_source_gives_the_same_inputs_as_a_numpy_array(processor, tmp_path, kind):
    waveform = clip(2.345)
    if kind == "half tensor":
        waveform = waveform.astype(np.float16).astype(np.float32)
    (tmp_path / "clip.wav").write_bytes(encoded(waveform))
    (tmp_path / "clip.flac").write_bytes(encoded(waveform, format="FLAC"))
    text64 = base64.b64encode(encoded(waveform)).decode()
    sources = {
        "path": str(tmp_path / "clip.wav"),
        "Path": tmp_path / "clip.wav",
        "FLAC path": str(tmp_path / "clip.flac"),
        "tensor": torch.from_numpy(waveform),
        "half tensor": torch.from_numpy(waveform).half(),
        "bytes": encoded(waveform),
        "base64": text64,
        "data URL": f"data:audio/wav;base64,{text64}",
        "float64": waveform.astype(np.float64),
    }
    expected = processor(text=MARKED, audio=waveform)
    assert_equal(processor(text=MARKED, audio=sources[kind]), expected)
    assert_equal(processor(text=[MARKED], audio=[sources[kind]]), expected)
    assert_equal(processor.apply_chat_template(user(audio(sources[kind]))), processor.apply_chat_template(user(audio(waveform))))


@pytest.mark.parametrize("key", ["audio", "path", "base64", "url"])
def test_a_part_names_its_source_by_any_of_four_keys(processor, tmp_path, key):
    (tmp_path / "clip.wav").write_bytes(encoded(clip(1)))
    part = {"type": "audio", key: str(tmp_path / "clip.wav")}
    assert_equal(processor.apply_chat_template(user(part)), processor.apply_chat_template(user(audio(clip(1)))))


def test_a_file_with_two_channels_is_mixed_down(processor):
    stereo = np.stack([clip(1), np.zeros(RATE, np.float32)], axis=1)
    mixed = processor(text=MARKED, audio=encoded(stereo))
    assert_equal(mixed, processor(text=MARKED, audio=clip(1) / 2))


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_audio_at_another_rate_is_resampled_as_librosa_does(processor, rate):
    waveform = np.resize(clip(1), 2 * rate)
    expected = processor(text=MARKED, audio=librosa.resample(waveform, orig_sr=rate, target_sr=RATE))
    assert_equal(processor(text=MARKED, audio=waveform, sampling_rate=rate), expected)
    assert_equal(processor(text=MARKED, audio=encoded(waveform, rate)), expected)
    assert_equal(
        processor.apply_chat_template(user(audio(waveform), text(INSTRUCTION)), sampling_rate=rate),
        processor.apply_chat_template(user(audio(encoded(waveform, rate)), text(INSTRUCTION))),
    )


# --- batches and lengths ------------------------------------------------------------------------------


def test_a_batch_holds_what_each_conversation_gives_alone(processor):
    conversations = [user(audio(clip(seconds, seed))) for seed, seconds in enumerate((0.1, 7.03, 31, 2))]
    batch = processor.apply_chat_template(conversations)
    window = 0
    for row, conversation in enumerate(conversations):
        single = processor.apply_chat_template(conversation)
        assert prompt_of(batch, processor, row) == prompt_of(single, processor)
        padding = batch["input_ids"].shape[1] - single["input_ids"].shape[1]
        assert not batch["attention_mask"][row, :padding].any() and batch["attention_mask"][row, padding:].all()
        for features, frames in zip(single["input_features"], single["num_frames"].tolist(), strict=True):
            assert batch["num_frames"][window] == frames
            assert torch.equal(batch["input_features"][window, :, :frames], features[:, :frames])
            assert not batch["input_features"][window, :, frames:].any()
            window += 1
    assert window == len(batch["num_frames"]) == 5


@pytest.mark.parametrize("seconds", [30, 30.01, 65.5, 125])
def test_nothing_is_truncated(processor, seconds):
    waveform = clip(seconds)
    inputs = processor(text=MARKED, audio=waveform)
    assert int(inputs["num_frames"].sum()) == waveform.size // 160
    assert int(inputs["num_frames"].max()) <= 3000
    placeholders = int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|audio|>")).sum())
    assert placeholders == processor.geometry.num_tokens(waveform.size) == pytest.approx(12.5 * seconds, abs=1)


def test_a_prompt_without_audio_has_no_features(processor):
    inputs = processor.apply_chat_template(user(text("hello")))
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert processor.decode(inputs["input_ids"][0]) == "<|user|>\nhello<|assistant|>\n"


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no such file.wav", "audio source 'no such file.wav' is neither a file nor base64"),
        ("data:audio/wav;base64,???", "neither a file nor base64"),
        (b"not audio at all", "16 bytes are not audio that can be read"),
        (b"", "0 bytes are not audio that can be read"),
        (base64.b64encode(b"not audio at all").decode(), "16 bytes are not audio that can be read"),
        (encoded(clip(1))[:20], "20 bytes are not audio that can be read"),
        (np.zeros(1599, np.float32), "at least 0.1 s is needed"),
        (np.zeros((2, RATE), np.float32), r"audio has shape \(2, 16000\); expected one channel"),
        (np.full(RATE, np.nan, np.float32), "audio has 16000 NaN or infinite samples"),
    ],
    ids=["no file", "bad data URL", "not audio", "empty", "base64 of no audio", "half a header", "short", "two channels", "NaN"],
)
def test_a_source_that_is_no_audio_is_refused_with_the_reason(processor, source, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(user(audio(source)))


def test_a_part_with_no_source_or_with_two_is_refused(processor):
    for part in ({"type": "audio"}, {"type": "audio", "audio": clip(1), "path": "clip.wav"}):
        with pytest.raises(ValueError, match="expected one of audio, path, base64, url"):
            processor.apply_chat_template(user(part))


def test_only_torch_tensors_are_returned(processor):
    with pytest.raises(ValueError, match="return_tensors is 'np'; only 'pt' is supported"):
        processor(text=MARKED, audio=clip(1), return_tensors="np")


@pytest.mark.parametrize(("prompt", "audios"), [("no placeholder", 1), (MARKED, 0), (MARKED * 2, 1), (MARKED, 2)])
def test_a_prompt_whose_placeholders_do_not_match_the_audios_is_refused(processor, prompt, audios):
    message = rf"the text has {prompt.count('<|audio|>')} <\|audio\|> placeholders for {audios} audios"
    with pytest.raises(ValueError, match=message):
        processor(text=prompt, audio=[clip(1)] * audios)


# --- the prompt ---------------------------------------------------------------------------------------

A, B = audio(clip(1)), audio(clip(2))
SPELLINGS = {
    "audio, text": (A, text(INSTRUCTION)),
    "text, audio": (text(INSTRUCTION), A),
    "no text": (A,),
    "empty text": (A, text("")),
    "placeholder before": (A, text(f"<|audio|>{INSTRUCTION}")),
    "placeholder and newline before": (A, text(f"<|audio|>\n{INSTRUCTION}")),
    "placeholder after": (A, text(f"{INSTRUCTION}<|audio|>")),
    "placeholder in a text before the audio": (text(f"<|audio|>\n{INSTRUCTION}"), A),
    "markers": (A, text(f"{MARKED}\n{INSTRUCTION}")),
    "markers in a text before the audio": (text(f"{MARKED}{INSTRUCTION}"), A),
    "markers behind the text": (A, text(f"{INSTRUCTION} {MARKED}")),
    "a part of its own": (A, text("<|audio|>"), text(INSTRUCTION)),
    "only a placeholder": (A, text("<|audio|>")),
    "spaces": (A, text(f"  {INSTRUCTION} \n")),
    "input_audio": ({"type": "input_audio", "audio": clip(1)}, text(INSTRUCTION)),
    "audio_url": ({"type": "audio_url", "audio": clip(1)}, text(INSTRUCTION)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_accepted_spelling_gives_the_same_ids(processor, spelling):
    written = f"<|user|>\n{MARKED.replace('<|audio|>', '<|audio|>' * 12)}\n{INSTRUCTION}<|assistant|>\n"
    inputs = processor.apply_chat_template(user(*SPELLINGS[spelling]))
    assert prompt_of(inputs, processor) == processor.tokenizer.encode(written, add_special_tokens=False)
    assert processor.decode(inputs["input_ids"][0]) == written


@pytest.mark.parametrize(
    "parts",
    [
        (A, B, text("Compare.")),
        (text("Compare."), A, B),
        (A, text("Compare."), B),
        (A, B, text("<|audio|><|audio|>Compare.")),
        (text(f"{MARKED}\n{MARKED}\nCompare."), A, B),
    ],
    ids=["before", "after", "around", "two placeholders", "markers"],
)
def test_several_audios_are_taken_in_order(processor, parts):
    inputs = processor.apply_chat_template(user(*parts))
    spans = [MARKED.replace("<|audio|>", "<|audio|>" * count) + "\n" for count in (12, 25)]
    assert processor.decode(inputs["input_ids"][0]) == f"<|user|>\n{''.join(spans)}Compare.<|assistant|>\n"
    for window, source in enumerate((clip(1), clip(2))):
        single = processor(text=MARKED, audio=source)["input_features"][0]
        assert torch.equal(inputs["input_features"][window, :, : single.shape[1]], single)


@pytest.mark.parametrize(
    ("parts", "written", "audios"),
    [
        ((text("<|audio|>hello"),), 1, 0),
        ((A, text("<|audio|><|audio|>hello")), 2, 1),
        ((A, B, text("<|audio|>hello")), 1, 2),
        ((A, text(f"{MARKED}{MARKED}")), 2, 1),
    ],
)
def test_a_message_whose_placeholders_do_not_match_its_audios_is_refused(processor, parts, written, audios):
    with pytest.raises(Exception, match=rf"the text has {written} <\|audio\|> placeholders and the message {audios} audios"):
        processor.apply_chat_template(user(*parts))


def test_a_part_of_an_unknown_type_is_refused(processor):
    with pytest.raises(Exception, match="a message has a part of type 'image'; expected audio or text"):
        processor.apply_chat_template(user({"type": "image"}))


def test_turns_of_system_user_and_assistant_follow_one_another(processor):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [A]},
        {"role": "assistant", "content": "one two"},
        {"role": "user", "content": [B, text("Please describe this audio.")]},
    ]
    expected = (
        f"<|system|>\nBe brief.<|user|>\n{MARKED}\n{INSTRUCTION}<|assistant|>\none two"
        f"<|user|>\n{MARKED}\nPlease describe this audio."
    )
    assert processor.apply_chat_template(conversation, tokenize=False) == f"{expected}<|assistant|>\n"
    assert processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False) == expected
    assert processor.apply_chat_template([conversation] * 2, tokenize=False) == [f"{expected}<|assistant|>\n"] * 2
    assert len(processor.apply_chat_template(conversation)["num_frames"]) == 2


def test_marks_are_single_tokens(processor):
    marks = ["<|system|>", "<|user|>", "<|assistant|>", "<|audio|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|endoftext|>"]
    assert all(len(processor.tokenizer.encode(mark, add_special_tokens=False)) == 1 for mark in marks)


# --- the files ----------------------------------------------------------------------------------------


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def common(settings: dict) -> dict:
    """Settings without those that each model has its own value of; the names stay."""
    return {
        name: common(value) if isinstance(value, dict) else None if name in OWN_VALUES else value
        for name, value in settings.items()
    }


@pytest.mark.parametrize("folder", [ROOT / "model", CHECKPOINT], ids=["model", "checkpoint"])
def test_the_files_of_a_checkpoint_agree_with_one_another(folder):
    config, generation = read(folder, "config.json"), read(folder, "generation_config.json")
    extractor, settings = read(folder, "preprocessor_config.json"), read(folder, "processor_config.json")
    assert settings["merge_factor"] == config["merge_factor"]
    assert extractor["feature_size"] == config["whisper_config"]["num_mel_bins"]
    frames = extractor["chunk_length"] * extractor["sampling_rate"] // extractor["hop_length"]
    assert config["whisper_config"]["max_source_positions"] == frames // 2
    for name in ("eos_token_id", "pad_token_id"):
        assert config[name] == config["lm_config"][name] == generation[name]
    tokenizer = read(folder, "tokenizer_config.json")
    assert tokenizer["model_max_length"] == config["lm_config"]["max_position_embeddings"]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_model_and_checkpoint_differ_in_sizes_and_ids_alone(name):
    assert common(read(ROOT / "model", name)) == common(read(CHECKPOINT, name))


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_model_and_checkpoint_have_the_same_file(name):
    assert read(ROOT / "model", name) == read(CHECKPOINT, name)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "model").glob("*") if path.suffix in (".py", ".jinja")))
def test_the_checkpoints_code_is_the_models(name):
    assert (CHECKPOINT / name).read_bytes() == (ROOT / "model" / name).read_bytes()


def test_the_checkpoints_ids_are_its_tokenizers(processor):
    config = AutoConfig.from_pretrained(CHECKPOINT, trust_remote_code=True)
    tokenizer = processor.tokenizer
    assert config.audio_token_id == tokenizer.convert_tokens_to_ids(processor.audio_token)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    assert config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer) <= config.lm_config.vocab_size
