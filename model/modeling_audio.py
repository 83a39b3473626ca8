"""The audio half of GLM-ASR: a Whisper-like encoder with rotary positions, and the MLP adapter.

Shapes: C clips (windows), F mel frames of the longest, P = (F + 1) // 2 positions, D encoder width,
H heads, M mel bins, N audio tokens of all clips together, E decoder width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperConfig
from transformers.activations import ACT2FN

from .configuration_glmasr import GlmasrConfig

ROTARY_BASE = 10000.0


def rotary_angles(num_positions: int, rotary_dim: int, device: torch.device) -> Tensor:
    """Angles of rotary positions 0 … num_positions - 1: (P, rotary_dim / 2), float32."""
    frequency = ROTARY_BASE ** (-torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim)
    return torch.arange(num_positions, device=device, dtype=torch.float32)[:, None] * frequency


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of the first half of each head; the second half stays.

    Args:
        x: (C, H, P, D / H)
        cos, sin: (P, D / H / 4)
    """
    turned, kept = x.chunk(2, dim=-1)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([turned.flatten(-2), kept], dim=-1)


class EncoderAttention(nn.Module):
    """Self-attention within each clip; like Whisper's, `k_proj` has no bias."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.num_heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x: (C, P, D); cos, sin: (P, D / H / 4); mask: (C, 1, 1, P), True where attended; returns (C, P, D)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (C, H, P, D / H)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.self_attn = EncoderAttention(config)
        self.final_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.activation = ACT2FN[config.activation_function]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), cos, sin, mask)
        return x + self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))


class WhisperSpecialEncoder(nn.Module):
    """Whisper's encoder with rotary instead of absolute positions and without its final norm."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.rotary_dim = config.d_model // config.encoder_attention_heads // 2

    def forward(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """Encodes each clip as if it were alone; what stands behind a clip's end is undefined.

        Args:
            features: (C, M, F) log-mel frames, padded behind each clip's end
            num_frames: (C,) each clip's own number of frames

        Returns:
            (C, P, D)
        """
        num_positions = (num_frames + 1) // 2
        padded = bool((num_frames < features.shape[2]).any())
        frame_mask = _mask(num_frames, features.shape[2]) if padded else None  # (C, F)
        x = features if frame_mask is None else features * frame_mask[:, None]
        x = F.gelu(self.conv1(x))  # (C, D, F)
        if frame_mask is not None:  # the second convolution must see zeros there, as at a clip's end
            x = x * frame_mask[:, None]
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (C, P, D)
        mask = _mask(num_positions, x.shape[1])[:, None, None] if padded else None

        angles = rotary_angles(x.shape[1], self.rotary_dim, x.device)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return x


class AudioMLPAdapter(nn.Module):
    """Encoder, norm, and two layers that turn joined frames into the decoder's embeddings."""

    def __init__(self, config: GlmasrConfig):
        super().__init__()
        width, hidden = config.whisper_config.d_model, config.lm_config.hidden_size
        self.merge_factor = config.merge_factor
        self.whisper = WhisperSpecialEncoder(config.whisper_config)
        self.layer_norm = nn.LayerNorm(width)
        self.adapting = nn.Sequential(
            nn.Linear(width * config.merge_factor, hidden * 2),
            ACT2FN[config.mlp_adapter_act],
            nn.Linear(hidden * 2, hidden),
        )

    def encode(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """(C, M, F) log-mel frames, of which (C,) count, to normed encoder states (C, P, D)."""
        return self.layer_norm(self.whisper(features, num_frames))

    def adapt(self, states: Tensor, num_frames: Tensor) -> Tensor:
        """Encoder states (C, P, D) of clips with (C,) frames to audio embeddings (N, E), clip after clip."""
        num_tokens = (num_frames + 1) // 2 // self.merge_factor
        longest = states.shape[1] // self.merge_factor
        joined = states[:, : longest * self.merge_factor].unflatten(1, (longest, self.merge_factor)).flatten(2)
        return self.adapting(joined[_mask(num_tokens, longest)])

    def forward(self, features: Tensor, num_frames: Tensor) -> Tensor:
        """(C, M, F) log-mel frames, of which (C,) count, to audio embeddings (N, E), clip after clip."""
        return self.adapt(self.encode(features, num_frames), num_frames)


def _mask(lengths: Tensor, longest: int) -> Tensor:
    """(C,) lengths to (C, longest), True before each length."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]
