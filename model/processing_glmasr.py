"""Processor of GLM-ASR: conversations with audio to `input_ids` and log-mel windows, and ids back to text."""

import base64
import binascii
import io
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch
from transformers import BatchFeature, ProcessorMixin

from .waveform_glmasr import AudioGeometry, check_waveform, split_windows

AUDIO_PARTS = ("audio", "audio_url", "input_audio")


class GlmasrProcessor(ProcessorMixin):
    """Tokenizer, feature extractor and chat template behind one call.

    Args:
        merge_factor: encoder positions to an audio token, as in the model's configuration.
        audio_token: the placeholder; the text has one for each clip, `input_ids` one for each audio token.
    """

    def __init__(self, feature_extractor, tokenizer, chat_template=None, merge_factor=4, audio_token="<|audio|>"):
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.merge_factor = merge_factor
        self.audio_token = audio_token

    @property
    def geometry(self) -> AudioGeometry:
        extractor = self.feature_extractor
        return AudioGeometry(
            extractor.sampling_rate, extractor.hop_length, extractor.chunk_length, merge_factor=self.merge_factor
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "input_features", "num_frames"]

    def apply_chat_template(
        self, conversation, tokenize=True, add_generation_prompt=True, sampling_rate=None, return_tensors="pt"
    ) -> BatchFeature | list[str] | str:
        """Model inputs for one conversation (a list of messages) or for a batch of them.

        Args:
            conversation: messages `{"role", "content"}`; a content part is `{"type": "text", "text"}` or
                `{"type": "audio", "audio" | "path" | "base64" | "url": source}`, the source as in `load_audio`
            tokenize: False returns the prompt text, one placeholder to a clip
            sampling_rate: of sources that are arrays, in Hz; None means the model's own

        Raises:
            ValueError: a source that is not audio, or placeholders that do not match the audios
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        prompts = [
            self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            for messages in conversations
        ]
        if not tokenize:
            return prompts if batched else prompts[0]
        sources = [source for messages in conversations for source in _audio_sources(messages)]
        return self(text=prompts, audio=sources, sampling_rate=sampling_rate, return_tensors=return_tensors)

    def __call__(self, text, audio=None, sampling_rate=None, return_tensors="pt") -> BatchFeature:
        """Tokenizes prompts and computes their clips' features; nothing is truncated.

        Args:
            text: a prompt or a list of prompts, with one `audio_token` for each clip
            audio: a source as in `load_audio`, or a list of them for all prompts, in order
            sampling_rate: of sources that are arrays, in Hz; None means the model's own

        Returns:
            input_ids and attention_mask (batch, length), padded on the left; with audio also
            input_features (windows, mel bins, frames), padded on the right, and num_frames (windows,)
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only 'pt' is supported")
        texts = [text] if isinstance(text, str) else list(text)
        sources = [] if audio is None else list(audio) if isinstance(audio, list | tuple) else [audio]
        clips = [load_audio(source, self.feature_extractor.sampling_rate, sampling_rate) for source in sources]
        if (written := sum(prompt.count(self.audio_token) for prompt in texts)) != len(clips):
            raise ValueError(f"the text has {written} {self.audio_token} placeholders for {len(clips)} audios")

        counts = iter(self.geometry.num_tokens(clip.size) for clip in clips)
        prompts = [self._expand(prompt, counts) for prompt in texts]
        inputs = self.tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
        return BatchFeature({**inputs, **(self._features(clips) if clips else {})})

    def _expand(self, prompt: str, counts) -> str:
        """Repeats each placeholder as often as its clip has audio tokens."""
        head, *tails = prompt.split(self.audio_token)
        return head + "".join(self.audio_token * next(counts) + tail for tail in tails)

    def _features(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """Log-mel frames of all windows, each computed over its own length."""
        geometry = self.geometry
        windows = [window for clip in clips for window in split_windows(clip, geometry)]
        features = [
            self.feature_extractor(
                window, sampling_rate=geometry.sampling_rate, padding=False, truncation=False, return_tensors="pt"
            ).input_features[0]
            for window in windows
        ]  # each (mel bins, frames)
        num_frames = torch.tensor([feature.shape[1] for feature in features])
        padded = torch.nn.utils.rnn.pad_sequence([feature.T for feature in features], batch_first=True)
        return {"input_features": padded.transpose(1, 2), "num_frames": num_frames}

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def load_audio(source, sampling_rate: int, source_rate: int | None = None) -> np.ndarray:
    """Loads one clip as float32 (samples,) at `sampling_rate`, mixed down to one channel.

    Args:
        source: a file's path, base64 text, a `data:` URL, encoded bytes, or (samples,) as array or tensor
        source_rate: rate of an array in Hz; None means `sampling_rate`

    Raises:
        ValueError: the source is not audio, is too short, or holds NaN or infinite samples
    """
    if isinstance(source, str | Path | bytes):
        waveform, source_rate = _decode(source if isinstance(source, bytes) else _read(str(source)))
    else:
        waveform = source.detach().cpu().float().numpy() if isinstance(source, torch.Tensor) else source
    source_rate = source_rate or sampling_rate
    waveform = check_waveform(waveform, source_rate)
    if source_rate != sampling_rate:
        waveform = librosa.resample(waveform, orig_sr=source_rate, target_sr=sampling_rate)
    return waveform


def _read(source: str) -> bytes:
    """The encoded bytes behind a path, a data: URL or base64 text."""
    is_data_url = source.startswith("data:")
    if not is_data_url and len(source) < 4096 and Path(source).is_file():
        return Path(source).read_bytes()
    try:
        return base64.b64decode(source.partition(",")[2] if is_data_url else source, validate=True)
    except binascii.Error as error:
        raise ValueError(f"audio source {source[:60]!r} is neither a file nor base64") from error


def _decode(data: bytes) -> tuple[np.ndarray, int]:
    """Encoded bytes to (samples,) float32, channels averaged, and the rate in Hz."""
    try:
        waveform, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{len(data)} bytes are not audio that can be read: {error}") from error
    return waveform.mean(axis=1), rate


def _audio_sources(messages: list[dict]) -> list:
    """The audio sources of a conversation, in order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    sources = []
    for part in parts:
        if part["type"] in AUDIO_PARTS:
            found = [part[key] for key in ("audio", "path", "base64", "url") if key in part]
            if len(found) != 1:
                raise ValueError(f"an audio part has keys {sorted(part)}; expected one of audio, path, base64, url")
            sources.append(found[0])
    return sources


__all__ = ["GlmasrProcessor"]
