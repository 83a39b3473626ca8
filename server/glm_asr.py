"""GLM-ASR in vLLM: audio embeddings take the placeholders' places in a Llama decoder.

Replaces vLLM's own GlmAsrForConditionalGeneration and adds layout A's GlmasrForConditionalGeneration.
The API process sends waveforms; spectrogram, encoder and adapter run on the device.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BatchFeature, GlmAsrConfig, GlmAsrProcessor, WhisperFeatureExtractor

from vllm.config import ModelConfig, SpeechToTextConfig, VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict, PromptType, TokensPrompt
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import AudioProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.sequence import IntermediateTensors
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.transformers_utils.configs.glmasr import GlmasrConfig
from vllm.transformers_utils.processor import cached_feature_extractor_from_config, cached_processor_from_config
from vllm.utils.torch_utils import async_tensor_h2d

from .glmasr_audio import AudioSettings, GlmAsrAdapter, GlmAsrEncoder
from .glmasr_graphs import Clip, EncoderGraphs
from .glmasr_mel import LogMelSpectrogram
from .glmasr_packing import PackedWindows, Packer
from .waveform_glmasr import PAUSE_S, AudioGeometry, check_waveform, window_starts
from .interfaces import MultiModalEmbeddings, SupportsLoRA, SupportsMultiModal, SupportsPP, SupportsTranscription
from .utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix

MAX_AUDIOS = 64  # in one prompt
INSTRUCTION_A = "Please transcribe this audio."  # what layout A was trained with; layout B's stands in its processor

# Module names of layout A and of layout B, which are this model's own; * is a layer's number.
LAYOUT_A_TO_B = (
    ("audio_encoder.whisper.conv1", "audio_tower.conv1"),
    ("audio_encoder.whisper.conv2", "audio_tower.conv2"),
    ("audio_encoder.whisper.layers.*.self_attn_layer_norm", "audio_tower.layers.*.input_layernorm"),
    ("audio_encoder.whisper.layers.*.self_attn.q_proj", "audio_tower.layers.*.self_attn.q_proj"),
    ("audio_encoder.whisper.layers.*.self_attn.k_proj", "audio_tower.layers.*.self_attn.k_proj"),
    ("audio_encoder.whisper.layers.*.self_attn.v_proj", "audio_tower.layers.*.self_attn.v_proj"),
    ("audio_encoder.whisper.layers.*.self_attn.out_proj", "audio_tower.layers.*.self_attn.o_proj"),
    ("audio_encoder.whisper.layers.*.final_layer_norm", "audio_tower.layers.*.post_attention_layernorm"),
    ("audio_encoder.whisper.layers.*.fc1", "audio_tower.layers.*.mlp.fc1"),
    ("audio_encoder.whisper.layers.*.fc2", "audio_tower.layers.*.mlp.fc2"),
    ("audio_encoder.layer_norm", "audio_tower.norm"),
    ("audio_encoder.adapting.0", "multi_modal_projector.linear_1"),
    ("audio_encoder.adapting.2", "multi_modal_projector.linear_2"),
    ("model.embed_tokens", "language_model.model.embed_tokens"),
    ("model.layers", "language_model.model.layers"),
    ("model.norm", "language_model.model.norm"),
    ("lm_head", "language_model.lm_head"),
)
# transformers 5 may write layout B with one more prefix, or (save_pretrained of 5.19) with one doubled.
LAYOUT_B_SAVED = (
    ("language_model.model.model", "language_model.model"),
    ("model.audio_tower", "audio_tower"),
    ("model.multi_modal_projector", "multi_modal_projector"),
    ("model.language_model", "language_model.model"),
)
UNUSED = (
    "audio_encoder.proj",
    "audio_encoder.audio_bos_eos_token",
    "audio_encoder.whisper.embed_positions",
    "audio_tower.embed_positions",
)


def _rename(pairs: Iterable[tuple[str, str]]) -> dict[re.Pattern, str]:
    """Module names with * to patterns and replacements, matched at the start of a weight's name."""
    return {
        re.compile("^" + re.escape(old).replace(r"\*", r"(\d+)") + r"(?=\.)"): new.replace("*", r"\1")
        for old, new in pairs
    }


class GlmAsrProcessingInfo(BaseProcessingInfo):
    """What the processor needs to know of the model, read off its files."""

    @cached_property
    def settings(self) -> AudioSettings:
        return AudioSettings.from_config(self.ctx.get_hf_config((GlmasrConfig, GlmAsrConfig)))

    @cached_property
    def feature_extractor(self) -> WhisperFeatureExtractor:
        return cached_feature_extractor_from_config(self.ctx.model_config)

    @cached_property
    def geometry(self) -> AudioGeometry:
        return audio_geometry(self.feature_extractor, self.settings)

    @property
    def audio_token_id(self) -> int:
        return self.get_hf_config().audio_token_id

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that leaves room for one token of answer."""
        return self.ctx.model_config.max_model_len - 1

    def get_data_parser(self) -> MultiModalDataParser:
        return MultiModalDataParser(
            target_sr=self.geometry.sampling_rate,
            target_channels=1,
            audio_resample_method="soxr",  # as the reference's librosa
            expected_hidden_size=self._get_expected_hidden_size(),
        )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": MAX_AUDIOS}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"audio": self.max_prompt_tokens}


class GlmAsrDummyInputsBuilder(BaseDummyInputsBuilder[GlmAsrProcessingInfo]):
    """The longest silence a prompt can hold, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        token = self.info.get_tokenizer().convert_ids_to_tokens(self.info.audio_token_id)
        return token * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        count = mm_counts.get("audio", 0)
        tokens = self.info.max_prompt_tokens // max(count, 1)
        length = tokens * self.info.geometry.token_samples
        return {"audio": self._get_dummy_audios(length=length, num_audios=count, overrides=mm_options.get("audio"))}


class GlmAsrMultiModalProcessor(BaseMultiModalProcessor[GlmAsrProcessingInfo]):
    """Checks waveforms, cuts them into windows and counts their tokens; the spectrogram waits for the device."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Gives each clip's waveform (samples,) float32 and the first sample of each of its windows."""
        geometry = self.info.geometry
        clips = [_checked(np.asarray(clip), geometry) for clip in hf_data["audio"]]
        return BatchFeature(
            {
                "waveform": [torch.from_numpy(clip) for clip in clips],
                "window_starts": [torch.tensor(window_starts(clip, geometry)) for clip in clips],
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "waveform": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
            "window_starts": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        placeholder = self.info.audio_token_id

        def replacement(item: int) -> list[int]:
            samples = mm_items.get_items("audio", AudioProcessorItems).get_audio_length(item)
            return [placeholder] * self.info.geometry.num_tokens(samples)

        return [PromptReplacement(modality="audio", target=[placeholder], replacement=replacement)]

    def _maybe_apply_prompt_updates(self, mm_items: MultiModalDataItems, mm_res):
        """Expands the placeholders and refuses, with the numbers, what the context cannot hold."""
        geometry, room = self.info.geometry, self.info.max_prompt_tokens
        written = mm_res.prompt_ids.count(self.info.audio_token_id)
        if written != (audios := mm_items.get_all_counts().get("audio", 0)):
            raise VLLMValidationError(f"the prompt has {written} audio placeholders for {audios} audios")
        prompt_ids, placeholders = super()._maybe_apply_prompt_updates(mm_items, mm_res)
        audio_tokens = sum(item.length for item in placeholders.get("audio", []))
        text_tokens = len(prompt_ids) - audio_tokens
        if len(prompt_ids) > room:
            second = geometry.sampling_rate / geometry.token_samples  # tokens of one
            raise VLLMValidationError(
                f"the audio is {audio_tokens / second:.1f} s long ({audio_tokens} tokens); beside {text_tokens} tokens of "
                f"text, a context of {room + 1} tokens holds {max(0, room - text_tokens) / second:.1f} s. "
                "Send less audio at once, or start the server with a larger max-model-len."
            )
        return prompt_ids, placeholders


@MULTIMODAL_REGISTRY.register_processor(
    GlmAsrMultiModalProcessor, info=GlmAsrProcessingInfo, dummy_inputs=GlmAsrDummyInputsBuilder
)
class GlmAsrForConditionalGeneration(
    nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA, SupportsTranscription, EncoderGraphs
):
    """Audio encoder, adapter and Llama decoder, for checkpoints of both layouts."""

    supported_languages = {"zh": "Chinese", "en": "English", "yue": "Cantonese"}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex=_rename(LAYOUT_A_TO_B) | _rename(LAYOUT_B_SAVED),
        orig_to_new_prefix={f"{name}.": None for name in UNUSED},
    )
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config, quant_config = vllm_config.model_config, vllm_config.quant_config
        self.config = model_config.hf_config
        self.quant_config = quant_config
        self.settings = AudioSettings.from_config(self.config)
        extractor = cached_feature_extractor_from_config(model_config)
        self.geometry = audio_geometry(extractor, self.settings)
        padded = self.geometry.window_samples if self.settings.pad_windows else None
        self.packer = Packer(self.geometry, extractor.n_fft, padded)

        with self._mark_tower_model(vllm_config, "audio"):
            self.mel = LogMelSpectrogram(
                torch.tensor(extractor.mel_filters), extractor.n_fft, extractor.hop_length
            )
            max_positions = self.geometry.num_positions(self.geometry.num_frames(self.geometry.window_samples))
            self.audio_tower = GlmAsrEncoder(
                self.settings, max_positions, quant_config, maybe_prefix(prefix, "audio_tower")
            )
            self.multi_modal_projector = GlmAsrAdapter(
                self.settings, quant_config, maybe_prefix(prefix, "multi_modal_projector")
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config.get_text_config(),
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """None: the chat template writes the placeholders."""
        return None

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model.", connector="multi_modal_projector.", tower_model="audio_tower."
        )

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embeds clips, all windows of all clips in one pass.

        Args:
            waveform: for each clip (samples,) float32, on the host
            window_starts: for each clip (windows,), the first sample of each window, on the host

        Returns:
            for each clip (audio tokens, decoder width)
        """
        if "waveform" not in kwargs:
            return []
        clips = self.clips(kwargs)
        embeddings = self.embed(self.pack(clips))
        return embeddings.split([sum(clip.num_tokens) for clip in clips])

    def clips(self, inputs: Mapping[str, object]) -> list[Clip]:
        """The clips of `embed_multimodal`'s arguments, cut into their windows."""
        pairs = zip(inputs["waveform"], inputs["window_starts"], strict=True)
        return [self._clip(waveform.numpy(), starts.tolist()) for waveform, starts in pairs]

    def _clip(self, waveform: np.ndarray, starts: list[int]) -> Clip:
        windows = [waveform[start:end] for start, end in pairwise([*starts, waveform.size])]
        num_tokens = [self.geometry.num_window_tokens(window.size) for window in windows]
        return Clip(windows, num_tokens, sum(self.packer.token_places(window.size) for window in windows))

    def pack(self, clips: list[Clip]) -> PackedWindows:
        """All windows of all clips, on the device."""
        windows = [window for clip in clips for window in clip.windows]
        num_tokens = [count for clip in clips for count in clip.num_tokens]
        return self.packer.pack(windows, num_tokens, self.mel.taper.device)

    def embed(self, packed: PackedWindows) -> Tensor:
        """Packed windows to their audio tokens' embeddings (N, E)."""
        features = self.mel(packed.samples, packed.window, packed.bounds.numel() - 1)
        states = self.audio_tower(features.to(self.audio_tower.conv1.weight.dtype), packed)
        return self.multi_modal_projector(states, packed.token)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """(tokens,) ids to (tokens, E), the audio's embeddings where `is_multimodal` (tokens,) on the host says.

        vLLM's own indexes by that mask, for which the host waits until the device has done all work before.
        """
        embedded = self.language_model.embed_input_ids(input_ids)
        if not multimodal_embeddings:
            return embedded
        places = async_tensor_h2d(is_multimodal.cpu().nonzero()[:, 0], device=embedded.device)
        return embedded.index_copy_(0, places, torch.cat(list(multimodal_embeddings)))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | IntermediateTensors:
        """One decoder step over (tokens,) ids or (tokens, E) embeddings."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint of either layout.

        Raises:
            ValueError: with the name of a weight that is missing, unknown or of another shape
        """
        seen: list[str] = []

        def noted() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                seen.append(name)
                yield name, weight

        try:
            loaded = AutoWeightsLoader(self).load_weights(noted(), mapper=self.hf_to_vllm_mapper)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"checkpoint weight {seen[-1]!r} cannot be loaded: {error}") from error
        if self.quant_config is None and (missing := self._missing_weights(seen)):
            raise ValueError(f"the checkpoint lacks {len(missing)} weights: {', '.join(missing)}")
        return loaded

    def _missing_weights(self, seen: list[str]) -> list[str]:
        """Weights the model needs and the checkpoint did not bring, named as in its layout."""
        present = {self.hf_to_vllm_mapper.map_name(name) for name in seen}
        needed = set()
        for name, _ in self.named_parameters():
            packed = next((part for part in self.packed_modules_mapping if f".{part}." in name), None)
            parts = self.packed_modules_mapping[packed] if packed else [packed]
            needed |= {name.replace(f".{packed}.", f".{part}.") for part in parts}
        needed = {name for name in needed if not re.match(r"audio_tower\..*\.k_proj\.bias", name)}
        back = WeightsMapper(orig_to_new_regex=_rename((b, a) for a, b in LAYOUT_A_TO_B))
        layout_a = isinstance(self.config, GlmasrConfig)
        return sorted(back.map_name(name) if layout_a else name for name in needed - present)

    @classmethod
    def get_speech_to_text_config(cls, model_config: ModelConfig, task_type: str) -> SpeechToTextConfig:
        """Longer audio is cut where it is quietest in the second half of a window."""
        extractor = cached_feature_extractor_from_config(model_config)
        return SpeechToTextConfig(
            sample_rate=extractor.sampling_rate,
            max_audio_clip_s=extractor.chunk_length,
            overlap_chunk_second=extractor.chunk_length // 2,
            min_energy_split_window_size=int(PAUSE_S * extractor.sampling_rate),
        )

    @classmethod
    def get_num_audio_tokens(
        cls, audio_duration_s: float, stt_config: SpeechToTextConfig, model_config: ModelConfig
    ) -> int:
        settings = AudioSettings.from_config(model_config.hf_config)
        geometry = audio_geometry(cached_feature_extractor_from_config(model_config), settings)
        return geometry.num_tokens(int(audio_duration_s * stt_config.sample_rate))

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> PromptType:
        """The chat prompt of one audio, the request's prompt and the instruction the checkpoint was trained with.

        Raises:
            ValueError: the task is not transcription
        """
        if stt_params.task_type != "transcribe":
            raise ValueError(f"task is {stt_params.task_type!r}; this model only transcribes")
        model_config = stt_params.model_config
        instruction = INSTRUCTION_A
        if isinstance(model_config.hf_config, GlmAsrConfig):
            processor = cached_processor_from_config(model_config, processor_cls=GlmAsrProcessor)
            instruction = processor.default_transcription_prompt
        texts = [text for text in (stt_params.request_prompt, instruction) if text]
        content = [{"type": "audio"}, *({"type": "text", "text": text} for text in texts)]
        tokenizer = cached_tokenizer_from_config(model_config)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return TokensPrompt(
            prompt_token_ids=tokenizer.encode(prompt, add_special_tokens=False),
            multi_modal_data={"audio": stt_params.audio},
        )


class GlmasrForConditionalGeneration(GlmAsrForConditionalGeneration):
    """The same model under the name that layout-A checkpoints give it."""


def audio_geometry(extractor: WhisperFeatureExtractor, settings: AudioSettings) -> AudioGeometry:
    """The checkpoint's own frame, window and token sizes."""
    return AudioGeometry(
        extractor.sampling_rate, extractor.hop_length, extractor.chunk_length, settings.merge_factor,
        counts_partial_frames=settings.pad_windows,
    )  # fmt: skip


def _checked(clip: np.ndarray, geometry: AudioGeometry) -> np.ndarray:
    try:
        return check_waveform(clip, geometry.sampling_rate)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="audio") from error
