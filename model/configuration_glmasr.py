"""Configuration of GLM-ASR in checkpoint layout A (`whisper_config` and `lm_config`).

Layout B (`audio_config` and `text_config`) is transformers' own `GlmAsrConfig`; both share the
model type `glmasr`, so reading a layout-B dictionary through this class gives that one.
"""

from transformers import GlmAsrConfig, LlamaConfig, PretrainedConfig, WhisperConfig


class GlmasrConfig(PretrainedConfig):
    """Sizes of the encoder, the adapter and the decoder.

    Args:
        whisper_config: the encoder's sizes, under Whisper's names (`d_model`, `encoder_layers`, ...).
        lm_config: the Llama decoder's sizes.
        merge_factor: neighbouring encoder frames joined into one audio token.
        mlp_adapter_act: activation between the adapter's two layers.
        audio_token_id: id of the placeholder that audio embeddings replace.
        use_rope, adapter_type: published checkpoints have rotary positions and an MLP adapter;
            anything else raises ValueError.
    """

    model_type = "glmasr"
    sub_configs = {"whisper_config": WhisperConfig, "lm_config": LlamaConfig}

    def __init__(
        self,
        whisper_config: dict | WhisperConfig | None = None,
        lm_config: dict | LlamaConfig | None = None,
        merge_factor: int = 4,
        mlp_adapter_act: str = "gelu",
        audio_token_id: int = 59248,
        use_rope: bool = True,
        adapter_type: str = "mlp",
        **kwargs,
    ):
        if not use_rope:
            raise ValueError(f"use_rope is {use_rope}; only encoders with rotary positions are supported")
        if adapter_type != "mlp":
            raise ValueError(f"adapter_type is {adapter_type!r}; only 'mlp' is supported")
        self.whisper_config = _sub_config(WhisperConfig, whisper_config)
        self.lm_config = _sub_config(LlamaConfig, lm_config)
        self.merge_factor = merge_factor
        self.mlp_adapter_act = mlp_adapter_act
        self.audio_token_id = audio_token_id
        self.use_rope = use_rope
        self.adapter_type = adapter_type
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> PretrainedConfig:
        """Reads either layout; a layout-B dictionary gives a `GlmAsrConfig`."""
        if "audio_config" in config_dict:
            return GlmAsrConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> LlamaConfig:
        """The decoder's configuration, where generation and vLLM look for layers and heads."""
        return self.lm_config


def _sub_config(config_class: type, value: dict | PretrainedConfig | None) -> PretrainedConfig:
    """Makes a sub-configuration of a dictionary; an instance passes, None gives the defaults."""
    if isinstance(value, config_class):
        return value
    return config_class(**(value or {}))


__all__ = ["GlmasrConfig"]
