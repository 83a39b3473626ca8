"""Trains the bundled checkpoint from nothing on one GPU, in under 25 minutes: `python training/train.py`.

Speech is synthesized first; an auxiliary CTC loss on the encoder, dropped at the end, brings alignment early.
"""

import argparse
import functools
import math
import os
import sys
import time
from pathlib import Path

import checkpoint
import held_out
import torch
import torch.nn.functional as F
from corpus import DESCRIBE, IGNORED, TRANSCRIBE, Batch, BatchPlanner, Corpus, GrowingCorpus, assemble
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "server"))
from glmasr_mel import LogMelSpectrogram  # noqa: E402

PEAK_RATE = 1e-3
WARM_UP_STEPS = 500
CTC_WEIGHT = 0.5
MASKED_BINS = 16  # each of two frequency masks hides up to this many mel bins
SEVERAL, EASY_SEVERAL = 0.3, 0.06  # share of conversations with several sentences: at last, and at first
EASY_SHARE = 0.25  # of the time, in which alignment is learned
REPORT_S = 20


def new_model(path: Path) -> nn.Module:
    """The reference model at the checkpoint's sizes, with random weights."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for residual in [layer.fc2 for layer in model.audio_encoder.whisper.layers]:
        nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * config.whisper_config.encoder_layers))
    for convolution in (model.audio_encoder.whisper.conv1, model.audio_encoder.whisper.conv2):
        nn.init.kaiming_normal_(convolution.weight)
        convolution.forward = functools.partial(convolve, convolution)
    return model


def convolve(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """The convolution as a matrix product: cuDNN would plan anew, for 0.3 s, at every shape it has not seen.

    (C, channels, F) to (C, D, F / stride)
    """
    (width,), (stride,), (padding,) = convolution.kernel_size, convolution.stride, convolution.padding
    windows = F.pad(x, (padding, padding)).unfold(2, width, stride)  # (C, channels, F / stride, width)
    return F.linear(windows.transpose(1, 2).flatten(2), convolution.weight.flatten(1), convolution.bias).transpose(1, 2)


def losses(model: nn.Module, ctc_head: nn.Module, mel: LogMelSpectrogram, batch: Batch, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers and CTC loss of the encoder."""
    device = corpus.samples.device
    samples, lengths = assemble(batch, corpus)
    frames, num_frames = mel(samples, lengths)
    features = mask_frequencies(pad(frames, num_frames))
    input_ids = torch.from_numpy(batch.input_ids).to(device)
    labels = torch.from_numpy(batch.labels).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        states = model.audio_encoder.encode(features, num_frames)
        audio = model.audio_encoder.adapt(states, num_frames)
        embeds = model.model.embed_tokens(input_ids)
        embeds = embeds.masked_scatter((input_ids == model.config.audio_token_id)[..., None], audio.to(embeds.dtype))
        hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        kept = labels[:, 1:] != IGNORED
        answer_loss = F.cross_entropy(model.lm_head(hidden[kept]).float(), labels[:, 1:][kept])
        log_probabilities = F.log_softmax(ctc_head(states).float(), dim=-1).transpose(0, 1)  # (P, W, vocabulary)
    ctc_loss = F.ctc_loss(
        log_probabilities,
        torch.from_numpy(batch.ctc_targets).to(device),
        (num_frames + 1) // 2,
        torch.from_numpy(batch.ctc_lengths).to(device),
        blank=model.config.pad_token_id,
        zero_infinity=True,
    )
    return answer_loss, ctc_loss


def pad(frames: Tensor, num_frames: Tensor) -> Tensor:
    """Packed frames (T, M) of clips with (C,) frames to (C, M, F), zero behind each clip."""
    clip = torch.repeat_interleave(num_frames)
    position = torch.arange(clip.numel(), device=frames.device) - (num_frames.cumsum(0) - num_frames)[clip]
    features = frames.new_zeros(len(num_frames), int(num_frames.max()), frames.shape[1])
    features[clip, position] = frames
    return features.transpose(1, 2)


def mask_frequencies(features: Tensor) -> Tensor:
    """Hides two random bands of mel bins of each clip (C, M, F)."""
    bins = torch.arange(features.shape[1], device=features.device)[:, None]
    for _ in range(2):
        width = torch.randint(0, MASKED_BINS, (features.shape[0], 1, 1), device=features.device)
        start = torch.randint(0, features.shape[1], (features.shape[0], 1, 1), device=features.device)
        features = features.masked_fill((bins >= start) & (bins < start + width), 0.0)
    return features


class Trainer:
    """The model, the CTC head that goes in the end, their optimizer, and the losses since the last report."""

    def __init__(self, model: nn.Module, processor):
        extractor, vocabulary = processor.feature_extractor, len(processor.tokenizer)
        self.model = model
        self.ctc_head = nn.Linear(model.config.whisper_config.d_model, vocabulary).to(model.device)
        self.mel = LogMelSpectrogram(torch.from_numpy(extractor.mel_filters), extractor.n_fft, extractor.hop_length)
        self.mel.to(model.device)
        self.parameters = [*model.parameters(), *self.ctc_head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=model.device.type == "cuda"
        )
        self.steps, self.heard_s = 0, 0.0
        self.totals = torch.zeros(3, device=model.device)  # answer loss, CTC loss, batches

    def step(self, batch: Batch, corpus: Corpus, progress: float) -> None:
        """One update, at `progress` from 0 to 1 of the schedule: a warm-up, then a cosine to zero."""
        self.steps += 1
        rate = PEAK_RATE * min(1, self.steps / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        answer_loss, ctc_loss = losses(self.model, self.ctc_head, self.mel, batch, corpus)
        (answer_loss + CTC_WEIGHT * ctc_loss).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.totals += torch.stack([answer_loss.detach(), ctc_loss.detach(), torch.ones_like(ctc_loss)])
        self.heard_s += batch.lengths.sum() / 16000

    def report(self, elapsed: float) -> str:
        """A line on the batches since the last report."""
        answer, ctc, count = self.totals.tolist()
        self.totals.zero_()
        return (
            f"{elapsed:5.0f} s  step {self.steps:6d}  loss {answer / count:.4f}  ctc {ctc / count:.4f}  "
            f"{self.steps / elapsed:.1f} steps/s  {self.heard_s / 3600:.0f} h heard"
        )


def train(model: nn.Module, corpus: GrowingCorpus, processor, args: argparse.Namespace) -> None:
    """Trains for `args.minutes`, the rate falling to zero by then; takes in what is newly spoken as it comes."""
    trainer, seconds = Trainer(model, processor), args.minutes * 60
    spoken = corpus.grow()
    bar = tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s")
    began, reports = time.monotonic(), 0
    while (elapsed := time.monotonic() - began) < seconds:
        several = SEVERAL if elapsed > EASY_SHARE * seconds else EASY_SEVERAL
        planner = BatchPlanner(spoken, processor.tokenizer, args.batch_items, args.batch_seconds, several, seed=corpus.round)
        for batch in DataLoader(planner, batch_size=None, num_workers=args.planners, prefetch_factor=8):
            elapsed = time.monotonic() - began
            trainer.step(batch, spoken, min(1, elapsed / seconds))
            if elapsed // REPORT_S > reports:
                reports = elapsed // REPORT_S
                bar.update(round(elapsed) - bar.n)
                bar.write(f"{trainer.report(elapsed)} of {len(spoken.utterances)} utterances")
                save(model, args.out)
            if elapsed >= seconds or corpus.has_more:
                break
        if corpus.has_more and elapsed < seconds:
            spoken = corpus.grow()
    bar.close()
    save(model, args.out)
    corpus.close()


def save(model: nn.Module, path: Path) -> None:
    """Writes the weights in bfloat16; the CTC head is not among them."""
    weights = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    partial = path / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, path / "model.safetensors")


@torch.inference_mode()
def answer(model: nn.Module, processor, waveforms: list, instruction: str, batch_size: int = 50) -> list[str]:
    """Greedy answers of the reference model."""
    texts = []
    for i in tqdm(range(0, len(waveforms), batch_size), desc=instruction, unit="batch"):
        conversations = [
            [{"role": "user", "content": [{"type": "audio", "audio": waveform}, {"type": "text", "text": instruction}]}]
            for waveform in waveforms[i : i + batch_size]
        ]
        inputs = processor.apply_chat_template(conversations).to(model.device)
        output = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        texts += processor.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def evaluate(model: nn.Module, processor, count: int) -> None:
    """Prints the scores on held-out speech and on sounds without speech, at the saved precision."""
    model.to(torch.bfloat16).float().eval()
    clips, sounds = held_out.speech_clips(count), held_out.non_speech_clips(count // 4)
    waveforms = [clip.waveform for clip in clips]
    texts = answer(model, processor, waveforms, TRANSCRIBE)
    for noisy in (False, True):
        chosen = [i for i, clip in enumerate(clips) if clip.noisy == noisy]
        rates = held_out.error_rates([clips[i] for i in chosen], [texts[i] for i in chosen])
        print("noisy" if noisy else "clean", {name: f"{rate:.2f} %" for name, rate in rates.items()})
    print("all", {name: f"{rate:.2f} %" for name, rate in held_out.error_rates(clips, texts).items()})
    wrong = [(clip.text, text) for clip, text in zip(clips, texts, strict=True)
             if held_out.normalize(clip.text) != held_out.normalize(text)]  # fmt: skip
    print(f"{len(wrong)} of {count} clips with an error, among them:")
    for wanted, got in wrong[:20]:
        print(f"  wanted {wanted!r}\n     got {got!r}")
    accuracy = held_out.attribute_accuracy(clips, answer(model, processor, waveforms, DESCRIBE))
    print("described rightly", {name: f"{share:.1f} %" for name, share in accuracy.items()})
    silent = answer(model, processor, [clip.waveform for clip in sounds], TRANSCRIBE)
    print(f"no text for {sum(not text for text in silent)} of {len(silent)} sounds without speech")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoint")
    parser.add_argument("--minutes", type=float, default=19, help="of training")
    parser.add_argument("--first-sentences", type=int, default=30_000, help="spoken before the training begins")
    parser.add_argument("--sentences", type=int, default=60_000, help="spoken in each round while it goes on")
    parser.add_argument("--batch-items", type=int, default=288)
    parser.add_argument("--batch-seconds", type=float, default=1500)
    parser.add_argument("--planners", type=int, default=8, help="processes that plan batches")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that synthesize")
    parser.add_argument("--held-out", type=int, default=400, help="clips to evaluate on; 0 for none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it too would plan anew for every shape
    if not (args.out / "tokenizer.json").exists():
        checkpoint.create(args.out)
    processor = AutoProcessor.from_pretrained(args.out, trust_remote_code=True)
    model = new_model(args.out).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    train(model, GrowingCorpus(args.first_sentences, args.sentences, args.processes, args.device), processor, args)
    if args.held_out:
        evaluate(model, processor, args.held_out)


if __name__ == "__main__":
    main()
