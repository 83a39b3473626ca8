"""GLM-ASR for Hugging Face transformers: audio embeddings take the placeholders' places in a Llama decoder.

This is the reference: plain torch, one obvious way. server/ holds the fast one.
"""

from torch import Tensor, nn
from transformers import Cache, GenerationMixin, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_glmasr import GlmasrConfig
from .modeling_audio import AudioMLPAdapter


class GlmasrForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Audio and a text instruction in, text out. Weights are named as in layout-A checkpoints."""

    config_class = GlmasrConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["EncoderLayer", "LlamaDecoderLayer"]
    _keys_to_ignore_on_load_unexpected = [
        r"^audio_encoder\.proj\.",
        r"^audio_encoder\.audio_bos_eos_token\.",
        r"^audio_encoder\.whisper\.embed_positions\.",
    ]

    def __init__(self, config: GlmasrConfig):
        super().__init__(config)
        self.audio_encoder = AudioMLPAdapter(config)
        self.model = LlamaModel(config.lm_config)
        self.lm_head = nn.Linear(config.lm_config.hidden_size, config.lm_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        input_features: Tensor | None = None,
        num_frames: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """One step of the decoder.

        Args:
            input_ids: (batch, length), with one placeholder for each audio embedding
            attention_mask: (batch, length), 0 on padding
            input_features: (windows, mel bins, frames), all clips' windows in the order of their placeholders
            num_frames: (windows,) each window's own number of frames
            logits_to_keep: how many positions at the end get logits; 0 for all

        Returns:
            logits (batch, kept length, vocabulary) and the cache

        Raises:
            ValueError: the placeholders and the audio embeddings differ in number
        """
        inputs_embeds = self.model.embed_tokens(input_ids)
        if input_features is not None:
            audio = self.audio_encoder(input_features.to(inputs_embeds.dtype), num_frames)
            inputs_embeds = self._place(audio, input_ids, inputs_embeds)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def _place(self, audio: Tensor, input_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Puts audio embeddings (N, hidden) where the placeholders are."""
        placeholders = input_ids == self.config.audio_token_id
        if (wanted := int(placeholders.sum())) != audio.shape[0]:
            raise ValueError(f"the text has {wanted} audio placeholders; the audio gives {audio.shape[0]} embeddings")
        return inputs_embeds.masked_scatter(placeholders[..., None], audio.to(inputs_embeds.dtype))

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, input_features=None, num_frames=None, **kwargs
    ):
        """Hands the audio to the first step only; later steps find it in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        first = past_key_values is None or past_key_values.get_seq_length() == 0
        inputs["input_features"] = input_features if first else None
        inputs["num_frames"] = num_frames if first else None
        return inputs


__all__ = ["GlmasrForConditionalGeneration"]
