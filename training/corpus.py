"""The training speech: utterances kept on the device, and random batches of conversations made from them.

A batch names pieces of utterances and where they go; the device assembles, mixes and analyses them,
so that the processes which plan batches never touch a sample.
"""

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import tempfile
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from sentences import LANGUAGES, training_sentence
from speech import BACKGROUNDS, PACE_WPM, PITCH, SAMPLE_RATE, Voice, background, non_speech, sample_voice, synthesize_corpus
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

TOKEN_SAMPLES = 1280  # samples under one audio token
WINDOW_S = 30
MAX_ITEM_S = 75
MAX_REPEATS = 4  # of one sentence, each by another voice
SILENT_CLIPS, SILENT_S = 0.1, (0.3, 12)  # sounds without speech to a sentence, and their lengths
KEPT_ROUNDS = 4  # of what is spoken, older ones are forgotten: 30 GB on the device
NOISES_A_KIND = 24
TRANSCRIBE, DESCRIBE = "Please transcribe this audio.", "Please describe this audio."
LONG = 0.15  # share of those that need more than one window
POOL_ITEMS = 4000  # conversations planned at a time
IGNORED = -100  # label of positions without a loss
# What a window's voice is told apart by; None where nobody speaks.
VOICES = [None, *((language, gender, pace) for language in LANGUAGES for gender in PITCH for pace in PACE_WPM[language])]


@dataclass(frozen=True)
class Utterance:
    """One sentence as spoken; `voice` is None where nobody speaks and `text` is empty."""

    text: str
    voice: Voice | None
    start: int  # first sample in Corpus.samples
    length: int

    @property
    def manner(self) -> tuple[str, str, str] | None:
        """One of VOICES."""
        return (self.voice.language, self.voice.gender, self.voice.pace) if self.voice else None


@dataclass
class Corpus:
    """All utterances so far: `samples` (S,) int16 on the device, the rest on the host."""

    samples: Tensor
    utterances: list[Utterance]
    noise: Tensor  # (kinds × NOISES_A_KIND, WINDOW_S seconds) float16, unit RMS
    by_voice: dict = field(default_factory=dict)

    def __post_init__(self):
        for index, utterance in enumerate(self.utterances):
            self.by_voice.setdefault(utterance.manner, []).append(index)


def synthesize(num_sentences: int, seed: int, processes: int, folder: Path) -> None:
    """Writes `num_sentences` as spoken, half of each language, beside silence, noise and tones, into `folder`."""
    os.setpgrp()  # so that `close` ends this process and those it starts
    os.nice(10)  # the training comes first
    rng = random.Random(seed)
    jobs, drawn = [], Counter()
    while len(jobs) < num_sentences:
        language = LANGUAGES[len(jobs) % 2]
        text = training_sentence(language, rng)
        drawn[text] += 1
        if drawn[text] <= MAX_REPEATS:
            jobs.append((text, sample_voice(language, rng)))
    silent = [(rng.uniform(*SILENT_S), rng.getrandbits(63)) for _ in range(int(num_sentences * SILENT_CLIPS))]
    sounds = list(synthesize_corpus(jobs + silent, processes))
    starts = np.cumsum([0] + [len(sound) for sound in sounds])
    utterances = [
        Utterance(text, voice, int(start), len(sound))
        for (text, voice), start, sound in zip(jobs + [("", None)] * len(silent), starts, sounds, strict=False)
    ]
    np.save(folder / "samples.npy", np.concatenate(sounds))
    (folder / "utterances.pickle").write_bytes(pickle.dumps(utterances))


class GrowingCorpus:
    """A corpus that other processes go on speaking while it is trained on, so that little is heard often.

    Args:
        first, more: sentences of the first round, which is waited for, and of each later one
        processes: that synthesize
    """

    def __init__(self, first: int, more: int, processes: int, device: str):
        rng = np.random.default_rng(0)
        noise = [background(kind, WINDOW_S * SAMPLE_RATE, rng) for kind in BACKGROUNDS for _ in range(NOISES_A_KIND)]
        self.more, self.processes, self.round = more, processes, 0
        self.noise = torch.from_numpy(np.stack(noise)).half().to(device)
        self.rounds: deque[tuple[Tensor, list[Utterance]]] = deque(maxlen=KEPT_ROUNDS)
        self.folder = Path(tempfile.mkdtemp(prefix="corpus-"))
        self._start(first)

    def _start(self, num_sentences: int) -> None:
        arguments = (num_sentences, self.round, self.processes, self.folder)
        self.worker = multiprocessing.get_context("spawn").Process(target=synthesize, args=arguments)
        self.worker.start()

    @property
    def has_more(self) -> bool:
        return not self.worker.is_alive()

    def grow(self) -> Corpus:
        """Waits for the round under way, adds it, and starts the next one."""
        self.worker.join()
        if self.worker.exitcode:
            raise RuntimeError(f"synthesizing round {self.round} ended with {self.worker.exitcode}; its error is above")
        mapped = np.load(self.folder / "samples.npy", mmap_mode="c")  # the next round overwrites the file
        samples = torch.from_numpy(mapped).to(self.noise.device, copy=True)
        self.rounds.append((samples, pickle.loads((self.folder / "utterances.pickle").read_bytes())))
        self.round += 1
        self._start(self.more)

        utterances, start = [], 0
        for samples, spoken in self.rounds:
            utterances += [replace(utterance, start=utterance.start + start) for utterance in spoken]
            start += samples.numel()
        return Corpus(torch.cat([samples for samples, _ in self.rounds]), utterances, self.noise)

    def close(self) -> None:
        """Ends the round under way."""
        try:
            os.killpg(self.worker.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or has only just been started
            self.worker.kill()
        shutil.rmtree(self.folder)


def describe(voice: Voice | None, kind: str) -> str:
    """The answer to DESCRIBE."""
    if voice is None:
        return "Nobody speaks."
    who = {"male": "A man", "female": "A woman"}[voice.gender]
    language = {"en": "English", "zh": "Mandarin"}[voice.language]
    pace = {"slow": "slowly", "normal": "at a normal pace", "fast": "fast"}[voice.pace]
    where = {"quiet": "in a quiet place", "hiss": "over hiss", "rumble": "over rumble", "hum": "over a hum"}[kind]
    return f"{who} speaks {language} {pace}, {where}."


def join_texts(texts: list[str]) -> str:
    """Sentences as one text: a space between them, except beside Chinese punctuation."""
    joined = ""
    for text in filter(None, texts):
        joined += (" " if joined and joined[-1] not in "，。？" else "") + text
    return joined


@dataclass
class Item:
    """One conversation: windows of placed utterances, what is heard behind them, and the answer."""

    clips: list[list[list[tuple[int, int]]]]  # clips → windows → (utterance, first sample in the window)
    lengths: list[list[int]]  # samples of each window
    kind: str
    snr_db: float
    gain_db: float
    instruction: str
    answer: str

    @property
    def num_samples(self) -> int:
        return sum(map(sum, self.lengths))


@dataclass
class Batch:
    """A batch as arrays; W windows, P pieces, B conversations."""

    pieces: np.ndarray  # (4, P): source sample, window, first sample in the window, samples
    lengths: np.ndarray  # (W,) samples
    noise: np.ndarray  # (2, W): row of Corpus.noise, first sample there
    levels: np.ndarray  # (2, W): signal-to-noise ratio and gain, in dB
    input_ids: np.ndarray  # (B, length), padded on the right
    labels: np.ndarray  # (B, length), IGNORED but for the answer
    ctc_targets: np.ndarray  # (all windows' tokens,)
    ctc_lengths: np.ndarray  # (W,)
    manner: np.ndarray  # (2, W): indices of VOICES and BACKGROUNDS


@dataclass(frozen=True)
class Shares:
    """Of all conversations, those in which nobody speaks and those with several sentences."""

    silent: float
    several: float


class BatchPlanner(IterableDataset):
    """Endless random batches of similar length, at most `batch_items` long or `batch_seconds` of padded audio."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        batch_items: int,
        batch_seconds: float,
        shares: Shares,
        seed: int,
    ):
        self.utterances, self.by_voice = corpus.utterances, corpus.by_voice
        self.voiced = [i for i, utterance in enumerate(self.utterances) if utterance.voice]
        self.tokenizer = tokenizer
        self.batch_items, self.batch_seconds, self.shares, self.seed = batch_items, batch_seconds, shares, seed
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "{instruction}"}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        self.prompt_head, self.prompt_tail = prompt.split("<|audio|>")

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        while True:
            items = [self._item(rng) for _ in range(POOL_ITEMS)]
            items.sort(key=lambda item: item.num_samples * rng.uniform(0.9, 1.1))
            batches, batch, longest = [], [], 0
            for item in items:
                longest = max(longest, item.num_samples)
                full = longest * (len(batch) + 1) > self.batch_seconds * SAMPLE_RATE
                if batch and (full or len(batch) == self.batch_items):
                    batches.append(batch)
                    batch, longest = [], item.num_samples
                batch.append(item)
            batches.append(batch)
            rng.shuffle(batches)
            yield from map(self._batch, batches)

    def _item(self, rng: random.Random) -> Item:
        draw = rng.random()
        num_clips = 2 if rng.random() < 0.03 else 1
        describing = rng.random() < 0.15
        if draw < self.shares.silent:
            members = [[rng.choice(self.by_voice[None])] for _ in range(num_clips)]
        elif draw < 1 - self.shares.several:
            members = [[rng.choice(self.voiced)] for _ in range(num_clips)]
        else:  # of one manner of speaking, so that it can be described
            seconds = rng.uniform(5, 30) if draw < 1 - self.shares.several * LONG else rng.uniform(30, MAX_ITEM_S)
            members = [self._members(rng, seconds / num_clips) for _ in range(num_clips)]
        voice = self.utterances[members[0][0]].voice
        kind = rng.choice(BACKGROUNDS[1:]) if voice and rng.random() < (0.7 if describing else 0.6) else "quiet"
        placed = [self._place(clip, rng) if voice else self._whole(clip) for clip in members]
        describing = describing and num_clips == 1
        answer = describe(voice, kind) if describing else join_texts([self._text(clip) for clip in members])
        return Item(
            clips=[clip for clip, _ in placed],
            lengths=[lengths for _, lengths in placed],
            kind=kind,
            snr_db=rng.uniform(5, 22 if describing else 35),
            gain_db=rng.uniform(-26, 4),
            instruction=DESCRIBE if describing else TRANSCRIBE,
            answer=answer,
        )

    def _members(self, rng: random.Random, seconds: float) -> list[int]:
        """Utterances of one language, gender and pace, about `seconds` long together."""
        same = self.by_voice[rng.choice([key for key in self.by_voice if key])]
        members, total = [rng.choice(same)], 0.0
        while (total := total + self.utterances[members[-1]].length / SAMPLE_RATE + 0.5) < seconds:
            members.append(rng.choice(same))
        return members

    def _whole(self, members: list[int]) -> tuple[list[list[tuple[int, int]]], list[int]]:
        """A sound without speech as a window of its own, no silence around it that would give it away."""
        return [[(members[0], 0)]], [self.utterances[members[0]].length]

    def _place(self, members: list[int], rng: random.Random) -> tuple[list[list[tuple[int, int]]], list[int]]:
        """Sets utterances one behind the other with pauses, in as many windows as they need."""
        silence = lambda low, high: int(rng.uniform(low, high) * SAMPLE_RATE)  # noqa: E731
        windows, lengths, end = [[]], [], silence(0, 0.6)
        for member in members:
            length = self.utterances[member].length
            if windows[-1] and end + length > (WINDOW_S - 0.5) * SAMPLE_RATE:
                lengths.append(-(-end // TOKEN_SAMPLES) * TOKEN_SAMPLES)
                windows.append([])
                end = silence(0, 0.3)
            windows[-1].append((member, end))
            end += length + silence(0.1, 1.2 if rng.random() < 0.8 else 2.5)
        last, start = windows[-1][-1]
        lengths.append(start + self.utterances[last].length + silence(0.02, 0.6))
        return windows, [min(length, WINDOW_S * SAMPLE_RATE) for length in lengths]

    def _text(self, members: list[int]) -> str:
        return join_texts([self.utterances[member].text for member in members])

    def _batch(self, items: list[Item]) -> Batch:
        windows = [(item, window, length) for item in items for clip, lengths in zip(item.clips, item.lengths, strict=True)
                   for window, length in zip(clip, lengths, strict=True)]  # fmt: skip
        rng = np.random.default_rng(random.getrandbits(63))
        pieces = [
            (self.utterances[member].start, w, start, min(self.utterances[member].length, length - start))
            for w, (_, window, length) in enumerate(windows) for member, start in window
        ]  # fmt: skip
        rows = [BACKGROUNDS.index(item.kind) * NOISES_A_KIND + rng.integers(NOISES_A_KIND) for item, _, _ in windows]
        spoken = self._tokenize([self._text([member for member, _ in window]) for _, window, _ in windows])
        input_ids, labels = self._sequences(items)
        return Batch(
            pieces=np.array(pieces).T,
            lengths=np.array([length for _, _, length in windows]),
            noise=np.stack([rows, rng.integers(WINDOW_S * SAMPLE_RATE, size=len(rows))]),
            levels=np.array([(item.snr_db, item.gain_db) for item, _, _ in windows], np.float32).T,
            input_ids=input_ids,
            labels=labels,
            ctc_targets=np.array([token for tokens in spoken for token in tokens], np.int64),
            ctc_lengths=np.array([len(tokens) for tokens in spoken]),
            manner=np.array([self._manner(item, window) for item, window, _ in windows]).T,
        )

    def _manner(self, item: Item, window: list[tuple[int, int]]) -> tuple[int, int]:
        """Indices of the window's voice and background; IGNORED for a background that is all there is to hear."""
        voice = self.utterances[window[0][0]].manner
        return VOICES.index(voice), BACKGROUNDS.index(item.kind) if voice else IGNORED

    def _sequences(self, items: list[Item]) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer of each conversation, (B, length) ids and labels."""
        prompts = []
        for item in items:
            counts = [sum(-(-(length // 160) // 2) // 4 for length in lengths) for lengths in item.lengths]
            audio = "<|end_of_audio|>\n<|begin_of_audio|>".join("<|audio|>" * count for count in counts)
            prompts.append(self.prompt_head + audio + self.prompt_tail.format(instruction=item.instruction))
        prompts = self._tokenize(prompts)
        answers = [tokens + [self.tokenizer.eos_token_id] for tokens in self._tokenize([item.answer for item in items])]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        input_ids = np.full((len(items), longest), self.tokenizer.pad_token_id)
        labels = np.full((len(items), longest), IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            input_ids[row, :end] = prompt + answer
            labels[row, len(prompt) : end] = answer
        return input_ids, labels

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids


@torch.no_grad()
def assemble(batch: Batch, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Mixes a batch's windows on the device: samples (S,) float32, one window behind the other, and lengths (W,)."""
    device = corpus.samples.device
    source, window, first, length = torch.from_numpy(batch.pieces).to(device)
    lengths = torch.from_numpy(batch.lengths).to(device)
    longest = int(batch.lengths.max())

    piece = torch.repeat_interleave(length)
    offset = torch.arange(piece.numel(), device=device) - (length.cumsum(0) - length)[piece]
    samples = torch.zeros(len(batch.lengths), longest, device=device)
    samples.view(-1)[(window * longest + first)[piece] + offset] = corpus.samples[source[piece] + offset].float() / 32768

    # Like speech.mix, the level of speech is that of its active part, within 30 dB of the loudest.
    power = samples.square()
    active = power > power.amax(dim=1, keepdim=True) * 1e-3
    speech_power = (power * active).sum(dim=1) / active.sum(dim=1).clamp_min(1)  # (W,)
    snr_db, gain_db = torch.from_numpy(batch.levels).to(device)
    row, shift = torch.from_numpy(batch.noise).to(device)
    position = (shift[:, None] + torch.arange(longest, device=device)) % corpus.noise.shape[1]
    noise = corpus.noise[row].gather(1, position).float()
    samples = samples + noise * (speech_power * 10 ** (-snr_db / 10)).sqrt()[:, None]

    inside = torch.arange(longest, device=device) < lengths[:, None]
    samples = samples * (10 ** (gain_db / 20))[:, None] * inside
    samples = samples / samples.abs().amax(dim=1, keepdim=True).clamp_min(1.0)
    return samples[inside], lengths
