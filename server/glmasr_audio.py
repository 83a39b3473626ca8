"""GLM-ASR's audio encoder and adapter on vLLM's parallel layers, for clips packed one behind the other.

Both checkpoint layouts run through these lines; `AudioSettings` is all that tells them apart.

Shapes: W windows, T mel frames, P positions and N audio tokens of all windows, M mel bins, D encoder
width, H heads of this rank, E decoder width. "Packed" means the windows' rows one behind the other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GlmAsrConfig

from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.transformers_utils.configs.glmasr import GlmasrConfig

from .utils import AutoWeightsLoader, WeightsMapper
from .whisper import _create_fake_bias_for_k_proj


@dataclass(frozen=True)
class AudioSettings:
    """Sizes and rules of the audio half, read off a configuration of either layout.

    Attributes:
        rotary_dim: how many of a head's dimensions turn with the position.
        rotary_pairs: True where neighbouring dimensions turn together (layout A), False where
            the first half turns with the second (layout B).
        pad_windows: True where each window is filled up with silence first, as layout B's reference does.
    """

    num_mel_bins: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    activation: str
    rotary_base: float
    rotary_dim: int
    rotary_pairs: bool
    pad_windows: bool
    merge_factor: int
    adapter_activation: str
    output_width: int

    @classmethod
    def from_config(cls, config: GlmasrConfig | GlmAsrConfig) -> "AudioSettings":
        """Raises ValueError for a configuration of neither layout."""
        if isinstance(config, GlmasrConfig):
            return cls._from_layout_a(config)
        if isinstance(config, GlmAsrConfig):
            return cls._from_layout_b(config)
        raise ValueError(f"{type(config).__name__} is not a GLM-ASR configuration of either layout")

    @classmethod
    def _from_layout_a(cls, config: GlmasrConfig) -> "AudioSettings":
        encoder = config.whisper_config
        return cls(
            num_mel_bins=encoder.num_mel_bins,
            width=encoder.d_model,
            num_layers=encoder.encoder_layers,
            num_heads=encoder.encoder_attention_heads,
            ffn_width=encoder.encoder_ffn_dim,
            activation=encoder.activation_function,
            rotary_base=10000.0,  # not in the file
            rotary_dim=encoder.d_model // encoder.encoder_attention_heads // 2,
            rotary_pairs=True,
            pad_windows=config.to_dict().get("pad_windows", False),
            merge_factor=config.merge_factor,
            adapter_activation=config.mlp_adapter_act,
            output_width=config.lm_config.hidden_size,
        )

    @classmethod
    def _from_layout_b(cls, config: GlmAsrConfig) -> "AudioSettings":
        encoder = config.audio_config
        rotary = encoder.rope_parameters
        head_width = encoder.hidden_size // encoder.num_attention_heads
        return cls(
            num_mel_bins=encoder.num_mel_bins,
            width=encoder.hidden_size,
            num_layers=encoder.num_hidden_layers,
            num_heads=encoder.num_attention_heads,
            ffn_width=encoder.intermediate_size,
            activation=encoder.hidden_act,
            rotary_base=rotary["rope_theta"],
            rotary_dim=int(head_width * rotary["partial_rotary_factor"]),
            rotary_pairs=False,
            pad_windows=config.to_dict().get("pad_windows", True),
            merge_factor=encoder.intermediate_size // encoder.hidden_size,  # as the reference joins frames
            adapter_activation=config.projector_hidden_act,
            output_width=config.text_config.hidden_size,
        )


@dataclass(frozen=True)
class Packing:
    """Where each window's rows are, and what attention needs to keep the windows apart.

    Attributes:
        num_slots: frames of the convolutions' input, the windows with silence between them.
        frame_slots: (T,) slot of each frame.
        position_slots: (P,) output of the strided convolution for each position.
        cos, sin: (P, 1, rotary_dim / 2) rotation of each position within its window.
        attention: keyword arguments of MMEncoderAttention.
    """

    num_slots: int
    frame_slots: Tensor
    position_slots: Tensor
    cos: Tensor
    sin: Tensor
    attention: dict[str, Tensor | None]


class EncoderAttention(nn.Module):
    """Self-attention within each window."""

    def __init__(self, settings: AudioSettings, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        head_width = settings.width // settings.num_heads
        self.pair_dim = -1 if settings.rotary_pairs else -2
        self.pair_shape = (settings.rotary_dim // 2, 2) if settings.rotary_pairs else (2, settings.rotary_dim // 2)
        self.rotary_dim = settings.rotary_dim
        self.num_heads = settings.num_heads // get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            settings.width, head_width, settings.num_heads, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.attn = MMEncoderAttention(self.num_heads, head_width, prefix=f"{prefix}.attn")
        self.o_proj = RowParallelLinear(
            settings.width, settings.width, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(P, D) to (P, D)."""
        qkv, _ = self.qkv_proj(x)  # (P, 3 D / ranks)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # each (P, H, D / heads)
        q, k = self._rotate(q, packing), self._rotate(k, packing)
        x = self.attn(q[None], k[None], v[None], **packing.attention)  # (1, P, H, D / heads)
        x, _ = self.o_proj(x[0].flatten(1))
        return x

    def _rotate(self, x: Tensor, packing: Packing) -> Tensor:
        """Turns the first `rotary_dim` dimensions of each head of (P, H, D / heads)."""
        turned, kept = x.split([self.rotary_dim, x.shape[-1] - self.rotary_dim], dim=-1)
        a, b = turned.unflatten(-1, self.pair_shape).unbind(self.pair_dim)
        cos, sin = packing.cos, packing.sin
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=self.pair_dim)
        return torch.cat([turned.flatten(-2), kept], dim=-1)


class EncoderMLP(nn.Module):
    """Two layers with an activation between."""

    def __init__(self, settings: AudioSettings, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.fc1 = ColumnParallelLinear(
            settings.width, settings.ffn_width, quant_config=quant_config, prefix=f"{prefix}.fc1"
        )
        self.fc2 = RowParallelLinear(
            settings.ffn_width, settings.width, quant_config=quant_config, prefix=f"{prefix}.fc2"
        )
        self.activation = get_act_fn(settings.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(P, D) to (P, D)."""
        x, _ = self.fc1(x)
        x, _ = self.fc2(self.activation(x))
        return x


class EncoderLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, settings: AudioSettings, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(settings.width)
        self.self_attn = EncoderAttention(settings, quant_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = nn.LayerNorm(settings.width)
        self.mlp = EncoderMLP(settings, quant_config, f"{prefix}.mlp")

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(P, D) to (P, D)."""
        x = x + self.self_attn(self.input_layernorm(x), packing)
        return x + self.mlp(self.post_attention_layernorm(x))


class GlmAsrEncoder(nn.Module):
    """Two convolutions, transformer layers and a norm over packed windows; no window sees another."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={f".{name}_proj": (".qkv_proj", name) for name in ("q", "k", "v")}
    )

    def __init__(self, settings: AudioSettings, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        self.settings = settings
        self.conv1 = nn.Conv1d(settings.num_mel_bins, settings.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(settings.width, settings.width, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            EncoderLayer(settings, quant_config, f"{prefix}.layers.{i}") for i in range(settings.num_layers)
        )
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, features: Tensor, num_frames: list[int]) -> Tensor:
        """Packed log-mel frames (T, M), of which each window has its number, to packed states (P, D)."""
        packing = self._pack(np.array(num_frames), features)
        x = F.gelu(convolve(self.conv1, self._spread(features, packing)))  # (slots, D)
        x = self._spread(x[packing.frame_slots], packing)  # silence again between the windows
        x = F.gelu(convolve(self.conv2, x))[packing.position_slots]  # (P, D)
        for layer in self.layers:
            x = layer(x, packing)
        return self.norm(x)

    def _spread(self, rows: Tensor, packing: Packing) -> Tensor:
        """Packed rows (T, channels) to the convolutions' input (slots, channels), zero between the windows."""
        slots = rows.new_zeros(packing.num_slots, rows.shape[1])
        slots[packing.frame_slots] = rows
        return slots

    def _pack(self, num_frames: np.ndarray, features: Tensor) -> Packing:
        """Lays out windows of (W,) frames.

        Every window begins on an even slot, as the strided convolution needs, with at least one
        silent slot behind it: what the convolutions' own padding is at the end of a clip.
        """
        device, dtype = features.device, features.dtype
        num_positions = (num_frames + 1) // 2
        first_slots = np.cumsum(2 * num_positions + 2) - (2 * num_positions + 2)
        frame_slots = np.repeat(first_slots - _starts(num_frames), num_frames) + np.arange(num_frames.sum())
        positions = np.arange(num_positions.sum()) - np.repeat(_starts(num_positions), num_positions)
        position_slots = np.repeat(first_slots // 2, num_positions) + positions

        settings = self.settings
        frequency = settings.rotary_base ** (-np.arange(0, settings.rotary_dim, 2) / settings.rotary_dim)
        angles = positions[:, None].astype(np.float32) * frequency.astype(np.float32)
        angles = torch.from_numpy(angles).to(device)[:, None]
        return Packing(
            num_slots=int((2 * num_positions + 2).sum()),
            frame_slots=torch.from_numpy(frame_slots).to(device),
            position_slots=torch.from_numpy(position_slots).to(device),
            cos=angles.cos().to(dtype),
            sin=angles.sin().to(dtype),
            attention=self._attention_arguments(num_positions, device),
        )

    def _attention_arguments(self, num_positions: np.ndarray, device: torch.device) -> dict[str, Tensor | None]:
        """What the chosen attention backend needs to know of windows with (W,) positions."""
        backend = self.layers[0].self_attn.attn.attn_backend
        bounds = np.concatenate([[0], np.cumsum(num_positions)]).astype(np.int32)  # (W + 1,)
        return {
            "max_seqlen": torch.tensor(MMEncoderAttention.compute_max_seqlen(backend, bounds), dtype=torch.int32, device="cpu"),
            "sequence_lengths": MMEncoderAttention.maybe_compute_seq_lens(backend, bounds, device),
            "cu_seqlens": MMEncoderAttention.maybe_recompute_cu_seqlens(
                backend, bounds, self.settings.width, get_tensor_model_parallel_world_size(), device
            ),
        }

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads the encoder's weights; `k_proj` has no bias, so its part of the joint bias is zero."""
        weights = _create_fake_bias_for_k_proj(weights, ".k_proj.weight")
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class GlmAsrAdapter(nn.Module):
    """Joins neighbouring positions and maps them to the decoder's embeddings."""

    def __init__(self, settings: AudioSettings, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        hidden = 2 * settings.output_width
        self.merge_factor = settings.merge_factor
        self.linear_1 = ColumnParallelLinear(
            settings.width * settings.merge_factor, hidden, quant_config=quant_config, prefix=f"{prefix}.linear_1"
        )
        self.linear_2 = RowParallelLinear(
            hidden, settings.output_width, quant_config=quant_config, prefix=f"{prefix}.linear_2"
        )
        self.activation = get_act_fn(settings.adapter_activation)

    def forward(self, states: Tensor, num_positions: list[int], num_tokens: list[int]) -> Tensor:
        """Packed states (P, D), of which each window gives its number of tokens, to packed embeddings (N, E)."""
        begins = _starts(np.array(num_positions))
        counts = np.array(num_tokens)
        within = np.arange(counts.sum()) - np.repeat(_starts(counts), counts)  # token within its window
        first = np.repeat(begins, counts) + within * self.merge_factor  # (N,) first position of each token
        rows = torch.from_numpy(first).to(states.device)[:, None] + torch.arange(self.merge_factor, device=states.device)
        x, _ = self.linear_1(states[rows].flatten(1))
        x, _ = self.linear_2(self.activation(x))
        return x


def convolve(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution over the first dimension, (slots, channels) to (slots / stride, D), as a matrix product.

    cuDNN would plan anew at every number of slots it has not seen, and packed windows rarely repeat one.
    """
    (width,), (stride,), (padding,) = convolution.kernel_size, convolution.stride, convolution.padding
    windows = F.pad(x, (0, 0, padding, padding)).unfold(0, width, stride)  # (slots / stride, channels, width)
    return F.linear(windows.flatten(1), convolution.weight.flatten(1), convolution.bias)


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(W,) lengths to each one's first index."""
    return np.cumsum(lengths) - lengths
