"""model/modeling_glmasr.py at a small size with random weights against transformers' native GlmAsrForConditionalGeneration."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.models import native_config
from conftest import CHECKPOINT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    BatchFeature,
    GlmAsrForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
)

RATE = 16000
MAX_LOGIT_DIFFERENCE = 1e-3
MAX_BATCH_DIFFERENCE = 1e-4
NEW_TOKENS = 10
ENCODER = {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 512}
DECODER = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
# Names of layout A and of transformers' native model, as patterns.
NATIVE_NAMES = {
    r"audio_encoder\.whisper\.layers\.(\d+)\.self_attn_layer_norm": r"model.audio_tower.layers.\1.input_layernorm",
    r"audio_encoder\.whisper\.layers\.(\d+)\.self_attn\.out_proj": r"model.audio_tower.layers.\1.self_attn.o_proj",
    r"audio_encoder\.whisper\.layers\.(\d+)\.final_layer_norm": r"model.audio_tower.layers.\1.post_attention_layernorm",
    r"audio_encoder\.whisper\.layers\.(\d+)\.(fc[12])": r"model.audio_tower.layers.\1.mlp.\2",
    r"audio_encoder\.whisper\.": "model.audio_tower.",
    r"audio_encoder\.layer_norm": "model.audio_tower.norm",
    r"audio_encoder\.adapting\.0": "model.multi_modal_projector.linear_1",
    r"audio_encoder\.adapting\.2": "model.multi_modal_projector.linear_2",
    r"model\.": "model.language_model.",
}


# --- two models with the same weights -----------------------------------------------------------------


def randomize(model: nn.Module, seed: int) -> None:
    """Weights large enough that a wrong rotation, order or norm shows in the logits."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=1.5 * weight[0].numel() ** -0.5)
        else:
            nn.init.normal_(weight, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)


def small_checkpoint(folder: Path) -> Path:
    """The bundled checkpoint's files without its weights, at the small size."""
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    config["whisper_config"] |= ENCODER
    config["lm_config"] |= DECODER
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def small_model(folder: Path, seed: int = 0) -> PreTrainedModel:
    """The reference of a small checkpoint, with random weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    randomize(model, seed)
    return model.float().eval()


def split_halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorders the first half of each head of (heads × width, ...) from neighbouring pairs to two halves."""
    heads = weight.unflatten(0, (num_heads, -1))
    turned, kept = heads.chunk(2, dim=1)
    return torch.cat([turned[:, 0::2], turned[:, 1::2], kept], dim=1).flatten(0, 1)


def native_weights(weights: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Layout A's weights under the native model's names and in its order."""
    mapped = {}
    for name, weight in weights.items():
        if re.search(r"audio_encoder\..*\.[qk]_proj\.", name):
            weight = split_halves(weight, num_heads)
        for pattern, replacement in NATIVE_NAMES.items():
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", replacement, name)
                break
        mapped[name] = weight.clone()
    return mapped


def native_model(model: PreTrainedModel) -> GlmAsrForConditionalGeneration:
    """transformers' own model with the reference's weights; every weight finds its place."""
    native = GlmAsrForConditionalGeneration(native_config(model.config, dtype="float32"))
    native.load_state_dict(native_weights(model.state_dict(), model.config.whisper_config.encoder_attention_heads))
    return native.float().eval()


# --- comparing ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("reference") / "checkpoint")


@pytest.fixture(scope="module")
def processor(folder: Path) -> ProcessorMixin:
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return small_model(folder)


def clip(seconds: float, seed: int) -> np.ndarray:
    """Noise that comes and goes, so that a position matters."""
    rng = np.random.default_rng(seed)
    size = round(seconds * RATE)
    level = np.repeat(rng.uniform(0.001, 0.3, size // 1600 + 1), 1600)[:size]
    return (level * rng.standard_normal(size)).astype(np.float32)


def inputs_of(processor: ProcessorMixin, *clips: np.ndarray) -> BatchFeature:
    return processor.apply_chat_template(
        [[{"role": "user", "content": [{"type": "audio", "audio": clip}]}] for clip in clips]
    )


@torch.no_grad()
def logits_of(model: PreTrainedModel, inputs: BatchFeature) -> Tensor:
    """(batch, length, vocabulary)"""
    return model(**inputs).logits


@torch.no_grad()
def native_logits(native: GlmAsrForConditionalGeneration, inputs: BatchFeature) -> Tensor:
    """The same of the native model, for windows that fill the 30 s."""
    features = inputs["input_features"]
    mask = torch.ones(features.shape[0], features.shape[2], dtype=torch.long)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return native(**text, input_features=features, input_features_mask=mask).logits


@torch.no_grad()
def greedy(model: PreTrainedModel, inputs: BatchFeature) -> list[list[int]]:
    """What each conversation is answered with, exactly NEW_TOKENS ids."""
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_a_clip_of_exactly_30_s_gives_the_native_models_logits(folder, processor, seed):
    model = small_model(folder, seed)
    inputs = inputs_of(processor, clip(30, seed))
    ours, theirs = logits_of(model, inputs), native_logits(native_model(model), inputs)
    difference = float((ours - theirs).abs().max())
    print(f"seed {seed}: largest logit difference {difference:.1e}, over logits of spread {ours.std():.2f}")
    assert ours.std() > 0.5
    assert difference < MAX_LOGIT_DIFFERENCE


def test_two_clips_of_30_s_in_a_batch_give_the_native_models_logits(model, processor):
    inputs = inputs_of(processor, clip(30, 10), clip(30, 11))
    ours, theirs = logits_of(model, inputs), native_logits(native_model(model), inputs)
    difference = float((ours - theirs).abs().max())
    print(f"two clips: largest logit difference {difference:.1e}")
    assert difference < MAX_LOGIT_DIFFERENCE
    assert float((ours[0] - ours[1]).abs().max()) > 1


def test_without_the_reordering_of_the_rotary_halves_the_native_model_differs(model, processor, monkeypatch):
    monkeypatch.setitem(globals(), "split_halves", lambda weight, num_heads: weight)
    inputs = inputs_of(processor, clip(30, 0))
    difference = float((logits_of(model, inputs) - native_logits(native_model(model), inputs)).abs().max())
    print(f"without reordering: largest logit difference {difference:.1e}")
    assert difference > 100 * MAX_LOGIT_DIFFERENCE


def test_the_native_model_answers_with_the_same_text(model, processor):
    inputs = inputs_of(processor, clip(30, 3))
    native = native_model(model)
    answer = greedy(model, inputs)[0]
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    inputs = BatchFeature({**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert native_logits(native, inputs)[0, -NEW_TOKENS - 1 : -1].argmax(-1).tolist() == answer


# --- batches ------------------------------------------------------------------------------------------


def test_a_batch_of_mixed_lengths_gives_what_each_clip_gives_alone(model, processor):
    clips = [clip(seconds, seed) for seed, seconds in enumerate((0.1, 1, 3.333, 30, 41))]
    together, texts = logits_of(model, inputs_of(processor, *clips)), greedy(model, inputs_of(processor, *clips))
    differences = []
    for row, waveform in enumerate(clips):
        inputs = inputs_of(processor, waveform)
        alone = logits_of(model, inputs)[0]
        assert greedy(model, inputs)[0] == texts[row]
        differences.append((together[row, -1] - alone[-1]).abs().max())
        assert float((together[row, -len(alone) :] - alone).abs().max()) < MAX_LOGIT_DIFFERENCE
    largest = float(torch.stack(differences).max())  # NaN if any is
    print(f"{len(clips)} clips, batched against alone: largest difference at the last position {largest:.1e}")
    assert largest < MAX_BATCH_DIFFERENCE


def test_generation_with_the_cache_agrees_with_one_pass_over_everything(model, processor):
    inputs = inputs_of(processor, clip(5, 0), clip(2, 1))
    answers = torch.tensor(greedy(model, inputs))
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], dim=1)
    logits = logits_of(model, BatchFeature({**inputs, "input_ids": ids, "attention_mask": mask}))
    assert torch.equal(logits[:, -NEW_TOKENS - 1 : -1].argmax(-1), answers)


def test_placeholders_that_do_not_match_the_embeddings_are_refused(model, processor):
    inputs = inputs_of(processor, clip(1, 0))
    inputs["num_frames"] = inputs["num_frames"] - 16
    with pytest.raises(ValueError, match="the text has 12 audio placeholders; the audio gives 10 embeddings"):
        logits_of(model, inputs)


# --- checkpoints --------------------------------------------------------------------------------------


def test_a_saved_model_and_processor_come_back_through_the_auto_classes(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype="float32").eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    inputs, again = inputs_of(processor, clip(2, 0)), inputs_of(loaded_processor, clip(2, 0))
    assert {name: values.tolist() for name, values in again.items()} == {name: values.tolist() for name, values in inputs.items()}
    assert torch.equal(logits_of(loaded, again), logits_of(model, inputs))
    assert greedy(loaded, again) == greedy(model, inputs)


def saved_with(model: PreTrainedModel, folder: Path, extra: dict[str, Tensor]) -> Path:
    """The model's checkpoint with extra weights in its file."""
    model.save_pretrained(folder)
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_with_info(folder: Path) -> tuple[PreTrainedModel, dict]:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32", output_loading_info=True)


def test_weights_that_layout_a_has_without_using_them_are_tolerated(model, processor, tmp_path):
    unused = {
        "audio_encoder.proj.weight": torch.ones(3, 3),
        "audio_encoder.proj.bias": torch.ones(3),
        "audio_encoder.audio_bos_eos_token.weight": torch.ones(2, 128),
        "audio_encoder.whisper.embed_positions.weight": torch.ones(1500, 128),
    }
    loaded, info = load_with_info(saved_with(model, tmp_path, unused))
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = inputs_of(processor, clip(1, 0))
    assert torch.equal(logits_of(loaded.eval(), inputs), logits_of(model, inputs))


def test_another_unknown_weight_is_reported(model, tmp_path):
    _, info = load_with_info(saved_with(model, tmp_path, {"audio_encoder.surprise.weight": torch.ones(3)}))
    assert set(info["unexpected_keys"]) == {"audio_encoder.surprise.weight"}
