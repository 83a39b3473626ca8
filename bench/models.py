"""Model folders to measure speed with: the full model's sizes, the bundled tokenizer, no weights (vLLM's dummy ones).

Both layouts have the same sizes and the same vocabulary of 59264 entries; those beyond the tokenizer's own stand for nothing.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GlmAsrConfig, GlmAsrProcessor, PreTrainedConfig, WhisperFeatureExtractor

ROOT = Path(__file__).resolve().parent.parent
FULL, BUNDLED = ROOT / "model", ROOT / "checkpoint"
# Layout B's prompt. Upstream's transcription route writes the placeholder into the text itself.
TEMPLATE_B = """{%- for message in messages -%}
<|{{ message.role }}|>\n
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type != "text" -%}<|begin_of_audio|><|pad|><|end_of_audio|><|user|>\n{%- endfor -%}
{%- for part in message.content if part.type == "text" -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>\n{%- endif -%}"""


def layout_a(folder: Path, layers: int | None = None) -> Path:
    """Writes a checkpoint as `bupalinyu/glm-asr-eligant` has it, with so many layers in encoder and decoder (None: all)."""
    shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    config, full = (json.loads((path / "config.json").read_text()) for path in (BUNDLED, FULL))
    config["whisper_config"] = full["whisper_config"]
    config["lm_config"] |= {name: value for name, value in full["lm_config"].items() if not name.endswith("token_id")}
    if layers:
        config["whisper_config"]["encoder_layers"] = config["lm_config"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=2))

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"unused {i}": i for i in range(len(vocabulary), config["lm_config"]["vocab_size"])}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    _write_no_weights(folder)
    return folder


def native_config(config: PreTrainedConfig, dtype: str) -> GlmAsrConfig:
    """Layout B's names for layout A's sizes."""
    encoder = config.whisper_config
    return GlmAsrConfig(
        audio_config={
            "hidden_size": encoder.d_model,
            "intermediate_size": encoder.encoder_ffn_dim,
            "num_hidden_layers": encoder.encoder_layers,
            "num_attention_heads": encoder.encoder_attention_heads,
            "num_mel_bins": encoder.num_mel_bins,
            "hidden_act": encoder.activation_function,
        },
        text_config=config.lm_config.to_dict(),
        audio_token_id=config.audio_token_id,
        projector_hidden_act=config.mlp_adapter_act,
        tie_word_embeddings=False,
        dtype=dtype,
    )


def layout_b(folder: Path, layers: int | None = None) -> Path:
    """Writes the same model as `zai-org/GLM-ASR-Nano-2512` has it."""
    layout_a(folder, layers)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")
    native = native_config(config, dtype="bfloat16")
    native.architectures = ["GlmAsrForConditionalGeneration"]
    native.audio_token_id = tokenizer.convert_tokens_to_ids("<|pad|>")
    shutil.rmtree(folder)
    native.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=config.whisper_config.num_mel_bins)
    GlmAsrProcessor(extractor, tokenizer, chat_template=TEMPLATE_B).save_pretrained(folder)
    extractor.save_pretrained(folder)
    _write_no_weights(folder)
    return folder


def _write_no_weights(folder: Path) -> None:
    """A file without tensors, because server/serve.py refuses a folder without weights."""
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})


def encoder_flops(config: dict, seconds: float) -> float:
    """Multiplications and additions of encoder and adapter for one clip, padding none.

    A matrix product of (m, k) and (k, n) counts 2 m k n; attention's two products count, everything else is small.
    """
    encoder, hidden = config["whisper_config"], config["lm_config"]["hidden_size"]
    width, frames = encoder["d_model"], int(100 * seconds)
    positions, tokens = frames // 2, frames // 8
    layer = 2 * positions * (4 * width**2 + 2 * width * encoder["encoder_ffn_dim"]) + 4 * positions**2 * width
    convolutions = 2 * 3 * (frames * encoder["num_mel_bins"] * width + positions * width**2)
    adapter = 2 * tokens * (4 * width * 2 * hidden + 2 * hidden * hidden)
    return encoder["encoder_layers"] * layer + convolutions + adapter


def flops(config: dict, seconds: float, answer_tokens: int, text_tokens: int = 20) -> float:
    """Those of all the model for one clip, counted likewise: encoder, adapter, prefill and answer."""
    decoder = config["lm_config"]
    hidden = decoder["hidden_size"]
    keys = decoder["num_key_value_heads"] * hidden // decoder["num_attention_heads"]
    weights = 2 * hidden * (hidden + keys) + 3 * hidden * decoder["intermediate_size"]
    length = int(100 * seconds) // 8 + text_tokens + answer_tokens
    decode = decoder["num_hidden_layers"] * (2 * length * weights + 2 * length**2 * hidden)
    head = 2 * answer_tokens * hidden * decoder["vocab_size"]
    return encoder_flops(config, seconds) + decode + head
