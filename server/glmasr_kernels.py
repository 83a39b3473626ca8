"""What the encoder does between its matrix products, one pass over memory each on an NVIDIA GPU, plain torch elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The LayerNorm of the sum of two contiguous (P, D), and the sum."""
    if not current_platform.is_cuda():
        total = x + residual
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total
    rows, width = x.shape
    normed, total = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _add_and_norm_row[(rows,)](x, residual, weight, bias, normed, total, width, eps, BLOCK=block, num_warps=4)
    return normed, total


@triton.jit
def _add_and_norm_row(x, residual, weight, bias, normed, total, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    added = tl.load(x + row + column, inside, 0.0).to(tl.float32) + tl.load(residual + row + column, inside, 0.0).to(tl.float32)
    tl.store(total + row + column, added, inside)
    centred = tl.where(inside, added - tl.sum(added) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / width + eps)
    scaled = centred * scale * tl.load(weight + column, inside, 0.0) + tl.load(bias + column, inside, 0.0)
    tl.store(normed + row + column, scaled, inside)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, in_pairs: bool) -> Tensor:
    """Turns the first dimensions of each head of (P, heads, width), on a GPU in place.

    Args:
        cos, sin: (P, turned dimensions / 2)
        in_pairs: whether neighbouring dimensions turn together, else the first half of them with the second
    """
    if current_platform.is_cuda():
        from vllm.vllm_flash_attn.ops.triton.rotary import apply_rotary  # is not in builds for other devices

        return apply_rotary(heads[None], cos, sin, interleaved=in_pairs, inplace=True)[0]
    half = cos.shape[1]
    turned, kept = heads.split([2 * half, heads.shape[-1] - 2 * half], dim=-1)
    a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if in_pairs else turned.unflatten(-1, (2, half)).unbind(-2)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1 if in_pairs else -2)
    return torch.cat([turned.flatten(-2), kept], dim=-1)
