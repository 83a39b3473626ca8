"""Trains the bundled checkpoint from nothing on one GPU, in under 20 minutes: `python training/train.py`.

Speech is synthesized while it learns. Two losses on the encoder, whose heads are dropped at the end, help the
answers': CTC brings alignment early, and naming voice and background keeps what a description needs.

The bundled checkpoint came from that command on an H200, and then, on two CPU cores, from

    python training/train.py --start-from checkpoint --silent 0.4 --minutes 6 --peak-rate 1e-4 --warm-up 50 \
        --batch-items 8 --batch-seconds 40 --first-sentences 3000 --sentences 3000 --processes 1 --planners 1

because sounds without speech had silence around them when the first of the two ran.
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
import librosa
import numpy as np
import torch
import torch.nn.functional as F
from corpus import DESCRIBE, IGNORED, TRANSCRIBE, VOICES, Batch, BatchPlanner, Corpus, GrowingCorpus, Shares, assemble
from safetensors.torch import save_file
from speech import BACKGROUNDS, SAMPLE_RATE
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "server"))
from glmasr_mel import LogMelSpectrogram  # noqa: E402

CTC_WEIGHT, MANNER_WEIGHT = 0.5, 0.2
MASKED_BINS = 16  # each of two frequency masks hides up to this many mel bins
WARPS = 1 + np.linspace(-0.08, 0.08, 17)  # factors on all frequencies, for throats that espeak has not
SEVERAL, EASY_SEVERAL = 0.3, 0.06  # share of conversations with several sentences: at last, and at first
EASY_SHARE = 0.25  # of the time, in which alignment is learned
REPORT_S = 20


def new_model(path: Path) -> nn.Module:
    """The reference model at the checkpoint's sizes, with random float32 weights."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    for residual in [layer.fc2 for layer in model.audio_encoder.whisper.layers]:
        nn.init.normal_(residual.weight, std=0.02 / math.sqrt(2 * config.whisper_config.encoder_layers))
    for convolution in convolutions(model):
        nn.init.kaiming_normal_(convolution.weight)
    return model


def convolutions(model: nn.Module) -> tuple[nn.Conv1d, nn.Conv1d]:
    return model.audio_encoder.whisper.conv1, model.audio_encoder.whisper.conv2


def convolve(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """The convolution as a matrix product: cuDNN would plan anew, for 0.3 s, at every shape it has not seen.

    (C, channels, F) to (C, D, F / stride)
    """
    (width,), (stride,), (padding,) = convolution.kernel_size, convolution.stride, convolution.padding
    windows = F.pad(x, (padding, padding)).unfold(2, width, stride)  # (C, channels, F / stride, width)
    return F.linear(windows.transpose(1, 2).flatten(2), convolution.weight.flatten(1), convolution.bias).transpose(1, 2)


class Heads(nn.Module):
    """What the auxiliary losses read from encoder states (W, P, D): gone after training."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.ctc = nn.Linear(width, vocabulary)
        self.voice = nn.Linear(width, len(VOICES))
        self.background = nn.Linear(width, len(BACKGROUNDS))


def losses(model: nn.Module, heads: Heads, features: Tensor, num_frames: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answers; on the encoder, CTC loss and cross-entropy of voice and background.

    Args:
        features: (W, M, F) log-mel frames
        num_frames: (W,) each window's own
    """
    on_device = lambda array: torch.from_numpy(array).to(features.device)  # noqa: E731
    input_ids, labels = on_device(batch.input_ids), on_device(batch.labels)
    states = model.audio_encoder.encode(features, num_frames)
    audio = model.audio_encoder.adapt(states, num_frames)
    embeds = model.model.embed_tokens(input_ids)
    embeds = embeds.masked_scatter((input_ids == model.config.audio_token_id)[..., None], audio)
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    kept = labels[:, 1:] != IGNORED
    answer_loss = F.cross_entropy(model.lm_head(hidden[kept]).float(), labels[:, 1:][kept])

    num_positions = (num_frames + 1) // 2
    ctc_loss = F.ctc_loss(
        F.log_softmax(heads.ctc(states).float(), dim=-1).transpose(0, 1),  # (P, W, vocabulary)
        on_device(batch.ctc_targets),
        num_positions,
        on_device(batch.ctc_lengths),
        blank=model.config.pad_token_id,
        zero_infinity=True,
    )
    inside = torch.arange(states.shape[1], device=states.device) < num_positions[:, None]
    mean = torch.einsum("wpd,wp->wd", states, inside.to(states.dtype)) / num_positions[:, None]
    voices, backgrounds = on_device(batch.manner)
    manner_loss = F.cross_entropy(heads.voice(mean).float(), voices, reduction="sum")
    manner_loss = manner_loss + F.cross_entropy(heads.background(mean).float(), backgrounds, reduction="sum")
    return answer_loss, ctc_loss, manner_loss / len(mean)


def pad(frames: Tensor, num_frames: Tensor) -> Tensor:
    """Packed frames (T, M) of clips with (C,) frames to (C, M, F), zero behind each clip."""
    clip = torch.repeat_interleave(num_frames)
    position = torch.arange(clip.numel(), device=frames.device) - (num_frames.cumsum(0) - num_frames)[clip]
    features = frames.new_zeros(len(num_frames), int(num_frames.max()), frames.shape[1])
    features[clip, position] = frames
    return features.transpose(1, 2)


def lay_out(samples: Tensor, lengths: Tensor, mel: LogMelSpectrogram) -> tuple[Tensor, Tensor]:
    """Windows (S,), each of its length (W,), as `mel` takes them: ends reflected, each on a hop, and whose frame is where."""
    hop, half = mel.hop_length, mel.n_fft // 2
    hops = (lengths + mel.n_fft + hop - 1) // hop  # (W,)
    first_hop = hops.cumsum(0) - hops
    window = torch.repeat_interleave(hops * hop)  # of each sample laid out
    index = torch.arange(window.numel(), device=samples.device) - (first_hop * hop)[window] - half
    last = (lengths - 1)[window]
    index = (last - (last - index.abs()).abs()).clamp_min(0)  # reflected at 0 and at the last sample
    laid_out = samples[(lengths.cumsum(0) - lengths)[window] + index]
    of_hop = torch.repeat_interleave(hops)
    frame = torch.arange(of_hop.numel(), device=samples.device) - first_hop[of_hop]
    whose = torch.where(frame < (lengths // hop)[of_hop], of_hop + 1, 0)
    return torch.cat([laid_out, laid_out.new_zeros(mel.n_fft - hop)]), whose


def mask_frequencies(features: Tensor) -> Tensor:
    """Hides two random bands of mel bins of each clip (C, M, F)."""
    bins = torch.arange(features.shape[1], device=features.device)[:, None]
    for _ in range(2):
        width = torch.randint(0, MASKED_BINS, (features.shape[0], 1, 1), device=features.device)
        start = torch.randint(0, features.shape[1], (features.shape[0], 1, 1), device=features.device)
        features = features.masked_fill((bins >= start) & (bins < start + width), 0.0)
    return features


def warp_matrices(extractor) -> Tensor:
    """(len(WARPS), M, M): products with log-mel frames that move all frequencies by a factor."""
    size, top = extractor.feature_size, extractor.sampling_rate / 2
    centres = librosa.mel_frequencies(size + 2, fmin=0.0, fmax=top)[1:-1]
    position = np.interp(WARPS[:, None] * centres, centres, np.arange(size))  # (warps, M), within the bins
    low = np.minimum(position.astype(int), size - 2)
    weight = (position - low)[..., None]
    return torch.from_numpy(np.eye(size)[low] * (1 - weight) + np.eye(size)[low + 1] * weight)


class Trainer:
    """The model in bfloat16, the optimizer of its float32 originals, and the losses since the last report."""

    def __init__(self, model: nn.Module, processor, peak_rate: float, warm_up: int, auxiliary: bool):
        extractor, vocabulary = processor.feature_extractor, len(processor.tokenizer)
        self.model, self.peak_rate, self.warm_up = model, peak_rate, warm_up
        self.weights = (1.0, CTC_WEIGHT, MANNER_WEIGHT) if auxiliary else (1.0, 0.0, 0.0)
        for convolution in convolutions(model):
            convolution.forward = functools.partial(convolve, convolution)
        self.heads = Heads(model.config.whisper_config.d_model, vocabulary).to(model.device)
        self.mel = LogMelSpectrogram(torch.from_numpy(extractor.mel_filters), extractor.n_fft, extractor.hop_length)
        self.mel.to(model.device)
        self.warps = warp_matrices(extractor).to(model.device, torch.bfloat16)
        self.parameters = [*model.parameters(), *self.heads.parameters()]
        self.originals = [parameter.detach().clone() for parameter in self.parameters]
        for parameter, original in zip(self.parameters, self.originals, strict=True):
            parameter.data = parameter.data.bfloat16()  # not `Module.to`, which would round the rotary frequencies too
            original.grad = torch.zeros_like(original)
        self.optimizer = torch.optim.AdamW(
            self.originals, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=model.device.type == "cuda"
        )
        self.steps, self.heard_s = 0, 0.0
        self.totals = torch.zeros(4, device=model.device)  # of the three losses, and batches

    def features(self, batch: Batch, corpus: Corpus) -> tuple[Tensor, Tensor]:
        """Log-mel frames (W, M, F) in bfloat16, warped in half of the windows and masked, and their numbers (W,)."""
        samples, lengths = assemble(batch, corpus)
        num_frames = lengths // self.mel.hop_length
        samples, window = lay_out(samples, lengths, self.mel)
        features = pad(self.mel(samples, window, lengths.numel())[window > 0], num_frames).bfloat16()
        warp = torch.randint(len(WARPS), num_frames.shape, device=features.device)
        warp = torch.where(torch.rand(num_frames.shape, device=features.device) < 0.5, warp, len(WARPS) // 2)
        return mask_frequencies(self.warps[warp] @ features), num_frames

    def step(self, batch: Batch, corpus: Corpus, progress: float) -> None:
        """One update, at `progress` from 0 to 1 of the schedule: a warm-up, then a cosine to zero."""
        self.steps += 1
        rate = self.peak_rate * min(1, self.steps / self.warm_up) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        each = torch.stack(losses(self.model, self.heads, *self.features(batch, corpus), batch))
        (each * each.new_tensor(self.weights)).sum().backward()
        with torch.no_grad():
            torch._foreach_copy_([original.grad for original in self.originals], [p.grad for p in self.parameters])
            nn.utils.clip_grad_norm_(self.originals, 1.0)
            self.optimizer.step()
            torch._foreach_copy_(self.parameters, self.originals)
        for parameter in self.parameters:
            parameter.grad = None
        self.totals += torch.cat([each.detach(), torch.ones_like(each[:1])])
        self.heard_s += batch.lengths.sum() / SAMPLE_RATE

    def report(self, elapsed: float) -> str:
        """A line on the batches since the last report."""
        answer, ctc, manner, count = self.totals.tolist()
        self.totals.zero_()
        return (
            f"{elapsed:5.0f} s  step {self.steps:6d}  loss {answer / count:.4f}  ctc {ctc / count:.4f}  "
            f"manner {manner / count:.4f}  {self.steps / elapsed:.1f} steps/s  {self.heard_s / 3600:.0f} h heard"
        )


def train(model: nn.Module, corpus: GrowingCorpus, processor, args: argparse.Namespace) -> None:
    """Trains for `args.minutes`, the rate falling to zero by then; takes in what is newly spoken as it comes."""
    trainer = Trainer(model, processor, args.peak_rate, args.warm_up, auxiliary=not args.start_from)
    seconds, easy_s = args.minutes * 60, 0 if args.start_from else EASY_SHARE * args.minutes * 60
    spoken = corpus.grow()
    bar = tqdm(total=round(seconds), unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s")
    began, reports = time.monotonic(), 0
    while (elapsed := time.monotonic() - began) < seconds:
        shares = Shares(args.silent, SEVERAL if elapsed >= easy_s else EASY_SEVERAL)
        planner = BatchPlanner(spoken, processor.tokenizer, args.batch_items, args.batch_seconds, shares, seed=corpus.round)
        for batch in DataLoader(planner, batch_size=None, num_workers=args.planners, prefetch_factor=8):
            elapsed = time.monotonic() - began
            trainer.step(batch, spoken, min(1, elapsed / seconds))
            if trainer.steps == 1 or elapsed // REPORT_S > reports or elapsed >= seconds:
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
    """Writes the weights in bfloat16; the heads are not among them."""
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
    model.float().eval()
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
    parser.add_argument("--start-from", type=Path, help="folder of a checkpoint to improve, by its answers alone")
    parser.add_argument("--minutes", type=float, default=16.5, help="of training")
    parser.add_argument("--peak-rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--warm-up", type=int, default=500, help="steps until then")
    parser.add_argument("--silent", type=float, default=0.06, help="share of conversations in which nobody speaks")
    parser.add_argument("--first-sentences", type=int, default=20_000, help="spoken before the training begins")
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
    if args.start_from:
        model = AutoModelForCausalLM.from_pretrained(args.start_from, trust_remote_code=True, dtype=torch.float32)
    else:
        model = new_model(args.out)
    model.to(args.device).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    train(model, GrowingCorpus(args.first_sentences, args.sentences, args.processes, args.device), processor, args)
    if args.held_out:
        evaluate(model, processor, args.held_out)


if __name__ == "__main__":
    main()
