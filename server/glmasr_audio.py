"""GLM-ASR's audio encoder and adapter on vLLM's parallel layers, for clips packed one behind the other.

Both checkpoint layouts run through these lines; `AudioSettings` is all that tells them apart.

Shapes: W windows; S slots, P positions and N audio tokens of all of them (see glmasr_packing.py); M mel bins,
D encoder width, H heads of this rank, E decoder width. "Packed" means the windows' rows one behind the other.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .glmasr_kernels import add_and_norm, rotate
from .glmasr_packing import PackedWindows
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
class Attending:
    """What every layer's attention needs to know of the packed windows.

    Attributes:
        cos, sin: (P, rotary_dim / 2) rotation of each position within its window.
        bounds: (W + 1,) int32, the first position of each window, and the end of the last.
        longest: positions of the longest possible window, a scalar on the host.
    """

    cos: Tensor
    sin: Tensor
    bounds: Tensor
    longest: Tensor


class AddLayerNorm(nn.LayerNorm):
    """A LayerNorm that first adds the residual, in one kernel."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(P, D), and the residual if there is one yet, to the norm of their sum, and the sum."""
        if residual is None:
            return super().forward(x), x
        return add_and_norm(x, residual, self.weight, self.bias, self.eps)


class EncoderAttention(nn.Module):
    """Self-attention within each window."""

    def __init__(self, settings: AudioSettings, quant_config: QuantizationConfig | None, prefix: str):
        super().__init__()
        head_width = settings.width // settings.num_heads
        self.rotary_pairs = settings.rotary_pairs
        self.num_heads = settings.num_heads // get_tensor_model_parallel_world_size()
        self.qkv_proj = QKVParallelLinear(
            settings.width, head_width, settings.num_heads, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.attn = MMEncoderAttention(self.num_heads, head_width, prefix=f"{prefix}.attn")
        if self.attn.attn_backend == AttentionBackendEnum.FLASHINFER:
            raise ValueError("GLM-ASR's encoder takes --mm-encoder-attn-backend FLASH_ATTN, TRITON_ATTN or TORCH_SDPA")
        self.o_proj = RowParallelLinear(
            settings.width, settings.width, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )

    def forward(self, x: Tensor, attending: Attending) -> Tensor:
        """(P, D) to (P, D)."""
        qkv, _ = self.qkv_proj(x)  # (P, 3 D / ranks)
        heads = qkv.unflatten(-1, (3 * self.num_heads, -1))  # those of the queries, of the keys and of the values
        turned = rotate(heads[:, : 2 * self.num_heads], attending.cos, attending.sin, self.rotary_pairs)
        q, k = turned.split(self.num_heads, dim=1)  # each (P, H, D / heads)
        v = heads[:, 2 * self.num_heads :]
        x = self.attn(q[None], k[None], v[None], cu_seqlens=attending.bounds, max_seqlen=attending.longest)
        x, _ = self.o_proj(x[0].flatten(1))
        return x


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
        self.input_layernorm = AddLayerNorm(settings.width)
        self.self_attn = EncoderAttention(settings, quant_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = AddLayerNorm(settings.width)
        self.mlp = EncoderMLP(settings, quant_config, f"{prefix}.mlp")

    def forward(self, x: Tensor, residual: Tensor | None, attending: Attending) -> tuple[Tensor, Tensor]:
        """(P, D) and what is to be added to it, to the same of the next layer."""
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, attending), residual)
        return self.mlp(x), residual


class GlmAsrEncoder(nn.Module):
    """Two convolutions, transformer layers and a norm over packed windows; no window sees another."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={f".{name}_proj": (".qkv_proj", name) for name in ("q", "k", "v")}
    )

    def __init__(
        self, settings: AudioSettings, max_positions: int, quant_config: QuantizationConfig | None, prefix: str
    ):
        """`max_positions` is how many the longest window has."""
        super().__init__()
        self.conv1 = nn.Conv1d(settings.num_mel_bins, settings.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(settings.width, settings.width, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            EncoderLayer(settings, quant_config, f"{prefix}.layers.{i}") for i in range(settings.num_layers)
        )
        self.norm = AddLayerNorm(settings.width)
        dimension = torch.arange(0, settings.rotary_dim, 2, dtype=torch.float32)
        frequency = settings.rotary_base ** (-dimension / settings.rotary_dim)
        angle = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos", angle.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angle.sin().to(torch.get_default_dtype()), persistent=False)
        self.longest = torch.tensor(max_positions, dtype=torch.int32, device="cpu")

    def forward(self, features: Tensor, packed: PackedWindows) -> Tensor:
        """Log-mel frames (S, M), zero where there is silence between windows, to packed states (P, D)."""
        silent = (packed.window == 0)[:, None]
        x = F.gelu(convolve(self.conv1, features)).masked_fill(silent, 0.0)  # (S, D)
        x = F.gelu(convolve(self.conv2, x))[packed.slot]  # (P, D)
        attending = Attending(self.cos[packed.place], self.sin[packed.place], packed.bounds, self.longest)
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, attending)
        x, _ = self.norm(x, residual)
        return x

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

    def forward(self, states: Tensor, token: Tensor) -> Tensor:
        """Packed states (P, D) to embeddings (N, E), each of the positions from `token` (N,) on."""
        joined = token[:, None] + torch.arange(self.merge_factor, device=states.device)
        x, _ = self.linear_1(states[joined].flatten(1))
        x, _ = self.linear_2(self.activation(x))
        return x


def convolve(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """A convolution over the first dimension, (slots, channels) to (slots / stride, D), as a matrix product.

    cuDNN would plan anew at every number of slots it has not seen, and packed windows rarely repeat one.
    """
    (width,), (stride,), (padding,) = convolution.kernel_size, convolution.stride, convolution.padding
    windows = F.pad(x, (0, 0, padding, padding)).unfold(0, width, stride)  # (slots / stride, channels, width)
    weight = convolution.weight.transpose(1, 2).flatten(1)  # as the rows lie in memory
    return F.linear(windows.transpose(1, 2).flatten(1), weight, convolution.bias)
