"""GLM-ASR's encoder as CUDA graphs, through vLLM's SupportsEncoderCudaGraph.

A graph is captured for each size that server/serve.py lists; vLLM's manager divides a step's clips over them and
runs what is larger than the largest without a graph. Sizes count audio tokens (`Packer.token_places`).
"""

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm.config import VllmConfig
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from .glmasr_packing import PackedWindows
from .interfaces import SupportsEncoderCudaGraph

SMALLEST, LARGEST = 32, 2048  # sizes where the command line gives none


@dataclass(frozen=True)
class Clip:
    """One clip's windows, each (samples,) float32, the audio tokens of each, and the room they take up together."""

    windows: list[np.ndarray]
    num_tokens: list[int]
    token_places: int


def _fill_bounds(buffer: Tensor, bounds: Tensor) -> None:
    """(W + 1,) bounds into a larger buffer, so that the windows that are not there are empty."""
    buffer.copy_(bounds[-1].expand_as(buffer))
    buffer[: bounds.numel()] = bounds


class EncoderGraphs(SupportsEncoderCudaGraph):
    """What vLLM asks of a model with `geometry`, `packer`, `clips`, `pack` and `embed`."""

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        return EncoderCudaGraphConfig(
            modalities=["audio"],
            buffer_keys=[field.name for field in dataclasses.fields(PackedWindows)],
            out_hidden_size=self.settings.output_width,
            padding_logics={"bounds": _fill_bounds},
        )

    def get_input_modality(self, mm_kwargs: Mapping[str, Any]) -> str:
        return "audio"

    def get_max_frames_per_video(self) -> int:
        return 0

    def get_encoder_cudagraph_budget_range(self, vllm_config: VllmConfig) -> tuple[int, int]:
        return SMALLEST, LARGEST

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: Mapping[str, Any]) -> list[EncoderItemSpec]:
        return [
            EncoderItemSpec(sum(window.size for window in clip.windows), clip.token_places)
            for clip in self.clips(mm_kwargs)
        ]

    def select_encoder_cudagraph_items(self, mm_kwargs: Mapping[str, Any], indices: list[int]) -> dict[str, Any]:
        return {name: [values[i] for i in indices] for name, values in mm_kwargs.items()}

    def prepare_encoder_cudagraph_capture_inputs(
        self,
        token_budget: int,
        max_batch_size: int,
        max_frames_per_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        path: str = "default",
        axis_keys: tuple[Hashable, ...] | None = None,
    ) -> EncoderCudaGraphCaptureInputs:
        half_a_window = self.packer.token_places(self.geometry.window_samples // 2)  # no window but a last is shorter
        num_windows = max_batch_size + token_budget // half_a_window
        return EncoderCudaGraphCaptureInputs(vars(self.packer.blank(token_budget, num_windows, device)))

    def prepare_encoder_cudagraph_replay_buffers(
        self, mm_kwargs: Mapping[str, Any], max_batch_size: int, max_frames_per_batch: int, path: str = "default"
    ) -> EncoderCudaGraphReplayBuffers:
        return EncoderCudaGraphReplayBuffers(vars(self.pack(self.clips(mm_kwargs))))

    def encoder_cudagraph_forward(self, inputs: dict[str, Tensor], path: str = "default") -> Tensor:
        return self.embed(PackedWindows(**inputs))

    def encoder_eager_forward(self, mm_kwargs: Mapping[str, Any], path: str = "default") -> Tensor:
        return self.embed(self.pack(self.clips(mm_kwargs)))

    def postprocess_encoder_output(
        self,
        outputs: dict[str, Tensor],
        indices: list[int],
        per_item_out_tokens: list[int],
        dest: dict[int, Tensor] | list[Tensor | None],
        clone: bool = False,
        batch_mm_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Gives each clip its embeddings; a graph's output is overwritten by its next run, hence the copy."""
        num_tokens = [sum(clip.num_tokens) for clip in self.clips(batch_mm_kwargs)]
        embeddings = outputs["default"][: sum(num_tokens)].clone()
        for i, embedded in zip(indices, embeddings.split(num_tokens), strict=True):
            dest[i] = embedded
