"""Hotwords: where the model hesitates, the tokens that continue a listed word gain, so that names come out as listed.

A request lists words in its SamplingParams.extra_args, which vLLM's routes call vllm_xargs:
{"hotwords": ["Zhipu", ...], "hotword_bias": 30.0}. Requests without pay nothing. The words are a trie, kept as its edges:
what must have come right before, and the token that continues it. Works in both of vLLM 0.32's model runners.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as FirstRunnersProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondRunnersProcessor

MAX_HOTWORDS = 100
MAX_HOTWORD_CHARS = 40
DEFAULT_BIAS = 30.0  # logits, what a token gains at most
MAX_BIAS = 60.0
# How much of a word has come (bytes without a leading space) → share of the bias that the next token gains, and the logits
# between the model's best two tokens from which on it gains nothing: below, in proportion. Measured, see tests/test_hotwords.py.
BEGUN_BYTES = 3  # three letters, or one Chinese character: from here on the word has begun
UNBEGUN, HARDLY_BEGUN, BEGUN = (0.3, 4.0), (0.75, 10.0), (1.0, 24.0)
MAX_TOKENS = 8192  # of all spellings together
REACH = 16  # tokens looked back at
KEPT_LISTS = 64  # ready for the next request with the same words

ANYTHING, WORD_START, NO_TOKEN = -3, -2, -1
CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def parse_hotwords(text: str) -> list[str]:
    """The words of a form's field, separated by commas, 、 or newlines, each once.

    Raises:
        ValueError: too many words, or a word too long
    """
    words = list(dict.fromkeys(" ".join(word.split()) for word in re.split(r"[,，、\r\n]", text)))
    return check_hotwords([word for word in words if word])


def check_hotwords(words: Any) -> list[str]:
    """`words` as they are.

    Raises:
        ValueError: not a list of words, too many of them, or a word empty or too long
    """
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"hotwords is {str(words)[:80]!r}: expected a list of words")
    if len(words) > MAX_HOTWORDS:
        raise ValueError(f"hotwords has {len(words)} words: at most {MAX_HOTWORDS} are taken")
    for word in words:
        if len(word) > MAX_HOTWORD_CHARS:
            raise ValueError(f"the hotword {word[:20]!r}... has {len(word)} characters: at most {MAX_HOTWORD_CHARS} are taken")
    return words


def check_tokens(sequences: list[Any]) -> None:
    """Checks lists of token ids like those that `hotword_tokens` gives.

    Raises:
        ValueError: something else among them, or too many tokens
    """
    for sequence in sequences:
        ids = sequence[sequence[:1] == [WORD_START] :] if isinstance(sequence, list) else None
        if not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f"hotwords has {str(sequence)[:80]!r} beside lists of token ids: expected only such")
    if (total := sum(map(len, sequences))) > MAX_TOKENS:
        raise ValueError(f"hotwords has {total} tokens in all spellings: at most {MAX_TOKENS} are taken; list fewer or shorter")


def hotword_tokens(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each word's spellings: as written and with a capital first letter, each with a space before it, and
    without one after WORD_START, which stands for the text's beginning and whatever is no letter or digit. Chinese
    words start anywhere.

    Raises:
        ValueError: too many tokens
    """
    sequences = []
    for word in dict.fromkeys(spelling for word in words for spelling in (word, word[:1].upper() + word[1:])):
        bare = tokenizer.encode(word, add_special_tokens=False)
        if CHINESE.match(word):
            sequences.append(bare)
        else:
            sequences += [tokenizer.encode(" " + word, add_special_tokens=False), [WORD_START, *bare]]
    check_tokens(sequences)
    return sequences


@dataclass(frozen=True)
class Vocabulary:
    """What is to be known about tokens; V of them."""

    sizes: list[int]  # bytes of each, a leading space not counted
    begins_word: Tensor  # (V,) bool: True for tokens with a leading space
    ends_word: Tensor  # (V + 1,) bool: True where a word may start behind; the last is for NO_TOKEN

    @classmethod
    def read(cls, tokenizer: Any, size: int, device: torch.device) -> "Vocabulary":
        """That of a byte-level tokenizer; a model may have more tokens, `size` of them."""
        texts = tokenizer.convert_ids_to_tokens(range(len(tokenizer))) + [""] * (size - len(tokenizer))
        begins = [text.startswith("Ġ") for text in texts]
        ends = [not (text[-1:].isascii() and text[-1:].isalnum()) for text in [*texts, ""]]
        sizes = [len(text.removeprefix("Ġ")) for text in texts]
        return cls(sizes, *(async_tensor_h2d(flags, device, torch.bool) for flags in (begins, ends)))


@dataclass(frozen=True)
class Edges:
    """A trie's edges: E of them, to U different tokens, looking back at D tokens."""

    before: Tensor  # (E, D) int32: the tokens that lead here, the nearest first, or WORD_START or ANYTHING
    gains: Tensor  # (E, 2) float32: logits that the token behind them gains at most, and logits less for each of margin
    hardly: Tensor  # (E,) bool: True where the word is hardly begun
    goal: Tensor  # (E,) int64: the token's place in `tokens`
    tokens: Tensor  # (U,) int64

    @property
    def reach(self) -> int:
        """D."""
        return self.before.shape[1]


def build_edges(sequences: Sequence[Sequence[int]], bias: float, vocabulary: Vocabulary) -> Edges:
    """The edges of the trie of `sequences`, whose tokens gain `bias` logits at most."""
    device = vocabulary.begins_word.device
    stages = {}
    for sequence in sequences:
        matched = 0  # bytes
        for at, token in enumerate(sequence):
            if token != WORD_START:
                stage = UNBEGUN if not matched else HARDLY_BEGUN if matched < BEGUN_BYTES else BEGUN
                stages[tuple(sequence[max(0, at - REACH) : at]), token] = stage
                matched += vocabulary.sizes[token]
    reach = max(len(before) for before, _ in stages)
    before = [[*reversed(before), *[ANYTHING] * (reach - len(before))] for before, _ in stages]
    tokens, goal = np.unique([token for _, token in stages], return_inverse=True)
    return Edges(
        async_tensor_h2d(np.array(before, np.int32).reshape(len(stages), reach), device),
        async_tensor_h2d([(bias * share, bias * share / certain) for share, certain in stages.values()], device, torch.float32),
        async_tensor_h2d([stage is HARDLY_BEGUN for stage in stages.values()], device, torch.bool),
        async_tensor_h2d(goal, device, torch.int64),
        async_tensor_h2d(tokens, device, torch.int64),
    )


def add_gains(logits: Tensor, tails: Tensor, edges: Edges, vocabulary: Vocabulary, chosen: Tensor | None = None) -> None:
    """Adds to `logits`, in place, what the tokens gain that continue a word; a word hardly begun ends where the model's
    best token begins another.

    Args:
        logits: (R, V) float32
        tails: (R, D or more) the last tokens of each output, the nearest first, NO_TOKEN before its first
        chosen: (R,) bool: the rows that gain; by default all
    """
    tails = tails[:, : edges.reach]  # (R, D)
    starts = torch.where(vocabulary.ends_word[tails.long()], WORD_START, ANYTHING)  # (R, D)
    before = edges.before[None]  # (1, E, D)
    reached = ((before == tails[:, None]) | (before == starts[:, None]) | (before == ANYTHING)).all(-1)  # (R, E)
    best = logits.topk(2)  # (R, 2)
    reached &= ~(vocabulary.begins_word[best.indices[:, :1]] & edges.hardly)
    if chosen is not None:
        reached &= chosen[:, None]
    margin = best.values[:, :1] - best.values[:, 1:]  # (R, 1)
    gains = (edges.gains[:, 0] - edges.gains[:, 1] * margin).clamp(min=0) * reached  # (R, E)
    most = logits.new_zeros(len(logits), len(edges.tokens))  # (R, U)
    most.scatter_reduce_(1, edges.goal.expand(len(logits), -1), gains, "amax")
    logits.index_add_(1, edges.tokens, most)


class HotwordBias(FirstRunnersProcessor, SecondRunnersProcessor):
    """vLLM's custom logits processor. Each of the two runners takes only classes of its own kind, and one name is given
    for both: the first calls `update_state` and `apply(logits)`, the second `add_request` and `apply(logits, context)`."""

    def __init__(self, vllm_config: VllmConfig, place: torch.device | LogitsProcRequestState, _pin_memory: bool = False):
        self.model_config = vllm_config.model_config
        self.edges_of = lru_cache(KEPT_LISTS)(self._edges_of)
        self.vocabulary: Vocabulary | None = None
        self.outputs: dict[int, tuple[Edges, list[int]]] = {}  # row → edges, output; first runner
        if isinstance(place, torch.device):
            self.device = place
        else:
            self.state, self.device = place, place.device
            self.edges: dict[int, Edges] = {}  # by slot; second runner
            self.listed = np.zeros(place.max_num_reqs, bool)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """
        Raises:
            ValueError: what `check_hotwords` or `check_tokens` refuses, or a bias out of range
        """
        extra = sampling_params.extra_args or {}
        hotwords, bias = extra.get("hotwords", []), extra.get("hotword_bias", DEFAULT_BIAS)
        if type(bias) not in (int, float) or not 0 <= bias <= MAX_BIAS:
            raise ValueError(f"hotword_bias is {bias!r}: expected a number from 0 to {MAX_BIAS:g}")
        if hotwords and isinstance(hotwords, list) and isinstance(hotwords[0], list):
            check_tokens(hotwords)
        else:
            check_hotwords(hotwords)

    def is_argmax_invariant(self) -> bool:
        return False

    def find_edges(self, sampling_params: SamplingParams) -> Edges | None:
        """The edges of a request's hotwords; None where it has none."""
        extra = sampling_params.extra_args
        if not extra or not extra.get("hotwords") or not (bias := extra.get("hotword_bias", DEFAULT_BIAS)):
            return None
        return self.edges_of(tuple(word if isinstance(word, str) else tuple(word) for word in extra["hotwords"]), bias)

    def _edges_of(self, hotwords: tuple[str | tuple[int, ...], ...], bias: float) -> Edges | None:
        tokenizer, vocab_size = cached_tokenizer_from_config(self.model_config), self.model_config.get_vocab_size()
        if self.vocabulary is None:
            self.vocabulary = Vocabulary.read(tokenizer, vocab_size, self.device)
        if isinstance(hotwords[0], str):
            hotwords = hotword_tokens(hotwords, tokenizer)
        known = [sequence for sequence in hotwords if max(sequence) < vocab_size]
        return build_edges(known, bias, self.vocabulary) if known else None

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """First runner: who came, moved and left. Outputs are lists that grow by themselves."""

        def output_of(params: SamplingParams, _prompt: list[int] | None, output: list[int]) -> tuple[Edges, list[int]] | None:
            return (edges, output) if (edges := self.find_edges(params)) else None

        process_dict_updates(self.outputs, batch_update, output_of)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Second runner: a request comes to a slot. True if its logits are to be changed."""
        edges = self.find_edges(sampling_params)
        self.listed[req_idx] = edges is not None
        if edges:
            self.edges[req_idx] = edges
        else:
            self.edges.pop(req_idx, None)
        return edges is not None

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """(rows, vocabulary) float32, changed in place."""
        if ctx is None:
            if self.outputs:
                self._apply_to_rows(logits)
        else:
            slots = ctx.idx_mapping_np[self.listed[ctx.idx_mapping_np]]
            if slots.size:
                self._apply_to_slots(logits, slots.tolist(), ctx)
        return logits

    def _apply_to_rows(self, logits: Tensor) -> None:
        for edges, rows in group({row: edges for row, (edges, _) in self.outputs.items()}):
            outputs = [self.outputs[row][1][: -edges.reach - 1 : -1] for row in rows]
            tails = [output + [NO_TOKEN] * (edges.reach - len(output)) for output in outputs]
            some = logits[rows]
            add_gains(some, async_tensor_h2d(tails, self.device, torch.int32).view(len(rows), -1), edges, self.vocabulary)
            logits[rows] = some

    def _apply_to_slots(self, logits: Tensor, slots: list[int], ctx: LogitsContext) -> None:
        for edges, some in group({slot: self.edges[slot] for slot in slots}):
            chosen = np.zeros(self.state.max_num_reqs, bool)
            chosen[some] = True
            chosen = async_tensor_h2d(chosen, self.device)[ctx.expanded_idx_mapping.long()]  # (rows,)
            add_gains(logits, self._tails(ctx, edges.reach), edges, self.vocabulary, chosen)

    def _tails(self, ctx: LogitsContext, length: int) -> Tensor:
        """(rows, length) int32: on the device, which alone knows them; draft tokens lie in the rows above."""
        slot, back = ctx.expanded_idx_mapping.long()[:, None], torch.arange(length, device=self.device)
        position = ctx.pos[:, None] - back
        written = self.state.all_token_ids.gpu[slot, position.clamp(min=0)]
        row = torch.arange(len(slot), device=self.device)[:, None] - back
        drafted = ctx.input_ids[row.clamp(min=0)].int()
        tokens = torch.where(back < ctx.expanded_local_pos[:, None], drafted, written)
        return torch.where(position >= self.state.prompt_len.gpu[slot], tokens, NO_TOKEN)


def group(edges: dict[int, Edges]) -> list[tuple[Edges, list[int]]]:
    """Each edges with the keys that share them."""
    shared: dict[int, tuple[Edges, list[int]]] = {}
    for key, some in edges.items():
        shared.setdefault(id(some), (some, []))[1].append(key)
    return list(shared.values())
