"""Everything of the bundled checkpoint but its weights: tokenizer, configuration, links to the model's code."""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from sentences import LANGUAGES, training_sentence
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MODEL_DIR = Path(__file__).resolve().parent.parent / "model"
CODE = ["configuration_glmasr.py", "modeling_audio.py", "modeling_glmasr.py", "processing_glmasr.py",
        "waveform_glmasr.py", "chat_template.jinja"]  # fmt: skip
SPECIAL_TOKENS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|audio|>",
                  "<|begin_of_audio|>", "<|end_of_audio|>", "<|pad|>"]  # fmt: skip
STOP_TOKENS = ["<|endoftext|>", "<|user|>", "<|observation|>"]
VOCABULARY = 3072
TOKENIZER_SENTENCES = 200_000
DESCRIPTION_WORDS = (
    "Please transcribe this audio. Please describe this audio. A man A woman Nobody speaks English Mandarin "
    "slowly fast at a normal pace in a quiet place over hiss over rumble over a hum, ."
)

ENCODER = {"d_model": 256, "encoder_layers": 8, "encoder_attention_heads": 4, "encoder_ffn_dim": 1024}
DECODER = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 768, "max_position_embeddings": 8192}  # fmt: skip


def train_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE from training sentences and saves it into `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=True,
        special_tokens=SPECIAL_TOKENS,
    )  # fmt: skip
    tokenizer.train_from_iterator(_tokenizer_text(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>", model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(path)
    return fast


def _tokenizer_text() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(TOKENIZER_SENTENCES):
        yield training_sentence(rng.choice(LANGUAGES), rng)
    for _ in range(1000):
        yield DESCRIPTION_WORDS


def write_configuration(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the JSON files: the full model's (model/), with this checkpoint's sizes and ids in place."""
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    stops = [ids[token] for token in STOP_TOKENS]
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config |= {"audio_token_id": ids["<|audio|>"], "eos_token_id": stops, "pad_token_id": ids["<|pad|>"]}
    config["whisper_config"] |= ENCODER
    config["lm_config"] |= DECODER | {
        "vocab_size": len(tokenizer), "eos_token_id": stops, "pad_token_id": ids["<|pad|>"]
    }  # fmt: skip
    generation = json.loads((MODEL_DIR / "generation_config.json").read_text())
    generation |= {"eos_token_id": stops, "pad_token_id": ids["<|pad|>"]}
    copied = {name: json.loads((MODEL_DIR / name).read_text()) for name in ("preprocessor_config.json", "processor_config.json")}
    for name, content in {"config.json": config, "generation_config.json": generation, **copied}.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")


def create(path: Path) -> None:
    """Makes `path` a checkpoint that lacks nothing but model.safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    for name in CODE:
        (path / name).unlink(missing_ok=True)
    write_configuration(path, train_tokenizer(path))
    for name in CODE:
        (path / name).symlink_to(os.path.relpath(MODEL_DIR / name, path))


if __name__ == "__main__":
    create(Path(sys.argv[1]))
