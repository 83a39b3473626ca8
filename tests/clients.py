"""Asking the server and the reference the same thing, for tests of either."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from conftest import CHECKPOINT, ROOT, Server
from transformers import AutoModelForCausalLM, AutoProcessor

MODEL = "glm-asr-eligant"
TRANSCRIBE, DESCRIBE = "Please transcribe this audio.", "Please describe this audio."
MAX_TOKENS = 300
WAVS = sorted((ROOT / "wavs").glob("*.wav"))


def expected_text(wav: Path) -> str:
    return wav.with_suffix(".txt").read_text(encoding="utf-8").strip()


def wav_bytes(waveform: np.ndarray, rate: int = 16000) -> bytes:
    """(samples,) or (samples, channels) as a float WAV, which keeps every bit."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def audio_part(data: bytes, audio_format: str = "wav") -> dict:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": audio_format}}


def chat(server: Server, content: list[dict], **options):
    """One user turn's completion, greedy, with the ids of prompt and answer."""
    return server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=MAX_TOKENS,
        extra_body={"return_token_ids": True}, **options,
    )  # fmt: skip


def ask(server: Server, waveform: np.ndarray, instruction: str = TRANSCRIBE) -> str:
    """The server's answer about one clip."""
    content = [audio_part(wav_bytes(waveform)), {"type": "text", "text": instruction}]
    return chat(server, content).choices[0].message.content


def ask_all(server: Server, waveforms: list[np.ndarray], instruction: str = TRANSCRIBE, in_flight: int = 64) -> list[str]:
    """The server's answers, so many requests at a time."""
    with ThreadPoolExecutor(in_flight) as pool:
        return list(pool.map(lambda waveform: ask(server, waveform, instruction), waveforms))


class Reference:
    """The Hugging Face model on the bundled checkpoint, in float32, loaded as hf_demo.py loads it."""

    def __init__(self):
        self.processor = AutoProcessor.from_pretrained(CHECKPOINT, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, trust_remote_code=True, dtype=torch.float32)
        self.model = model.eval()

    def prompt_ids(self, content: list[dict]) -> list[int]:
        return self.processor.apply_chat_template([{"role": "user", "content": content}])["input_ids"][0].tolist()

    @torch.inference_mode()
    def ask_all(self, clips: list, instruction: str = TRANSCRIBE, batch_size: int = 20) -> list[str]:
        """Greedy answers, batches of clips of similar length."""
        order = sorted(range(len(clips)), key=lambda i: getattr(clips[i], "size", 0))
        texts = [""] * len(clips)
        for first in range(0, len(clips), batch_size):
            members = order[first : first + batch_size]
            conversations = [
                [{"role": "user", "content": [{"type": "audio", "audio": clips[i]}, {"type": "text", "text": instruction}]}]
                for i in members
            ]
            inputs = self.processor.apply_chat_template(conversations)
            output = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
            answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(members, answers, strict=True):
                texts[i] = text
        return texts
