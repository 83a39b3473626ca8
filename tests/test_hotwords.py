"""server/glmasr_hotwords.py: what gains, in either of vLLM's runners, and what that does to names and to other speech."""

import random
from types import SimpleNamespace

import glmasr_hotwords as hotwords
import numpy as np
import pytest
import torch
from conftest import CHECKPOINT
from glmasr_hotwords import (
    BEGUN, BEGUN_BYTES, DEFAULT_BIAS, HARDLY_BEGUN, MAX_BIAS, MAX_HOTWORD_CHARS, MAX_HOTWORDS, MAX_TOKENS, NO_TOKEN, UNBEGUN,
    WORD_START, HotwordBias, Vocabulary, add_gains, build_edges, hotword_tokens, parse_hotwords,
)  # fmt: skip
from transformers import AutoTokenizer

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

CPU = torch.device("cpu")
V = 12
LETTERS = frozenset(range(6))  # of that small vocabulary: tokens after which no word starts
SIZES = [1, 2, 3, 1, 2, 0, 1, 2, 1, 1, 1, 1]
SMALL = Vocabulary(SIZES, torch.zeros(V, dtype=torch.bool), torch.tensor([*(token not in LETTERS for token in range(V)), True]))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_a_field_is_cut_at_commas_and_newlines_and_keeps_each_word_once():
    assert parse_hotwords(" Zhipu, New  York、智谱，Zhipu\r\nOkonkwo,\n") == ["Zhipu", "New York", "智谱", "Okonkwo"]
    assert parse_hotwords(" ,\n") == []


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"hotwords": ["a"] * (MAX_HOTWORDS + 1)}, f"has {MAX_HOTWORDS + 1} words: at most {MAX_HOTWORDS}"),
        ({"hotwords": ["a" * (MAX_HOTWORD_CHARS + 1)]}, f"has {MAX_HOTWORD_CHARS + 1} characters: at most {MAX_HOTWORD_CHARS}"),
        ({"hotwords": "Zhipu"}, "expected a list of words"),
        ({"hotwords": ["Zhipu", 1]}, "expected a list of words"),
        ({"hotwords": [" "]}, "expected a list of words"),
        ({"hotwords": [[1, 2], [WORD_START]]}, "beside lists of token ids"),
        ({"hotwords": [[1, -2]]}, "beside lists of token ids"),
        ({"hotwords": [[1] * (MAX_TOKENS + 1)]}, f"has {MAX_TOKENS + 1} tokens in all spellings: at most {MAX_TOKENS}"),
        ({"hotwords": ["Zhipu"], "hotword_bias": MAX_BIAS + 1}, f"from 0 to {MAX_BIAS:g}"),
        ({"hotwords": ["Zhipu"], "hotword_bias": True}, f"from 0 to {MAX_BIAS:g}"),
        ({"hotword_bias": float("nan")}, f"from 0 to {MAX_BIAS:g}"),
    ],
)
def test_what_is_not_taken_is_named(extra, message):
    with pytest.raises(ValueError, match=message):
        HotwordBias.validate_params(SamplingParams(extra_args=extra))


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {"hotwords": []}, {"hotwords": ["智谱"]}, {"hotwords": [[WORD_START, 3]]}])
def test_what_is_in_order_passes(extra):
    HotwordBias.validate_params(SamplingParams(extra_args=extra))


def test_a_word_is_spelled_with_and_without_a_space_and_with_a_capital(tokenizer):
    spelled = [tokenizer.decode(sequence[sequence[0] == WORD_START :]) for sequence in hotword_tokens(["van Dyk"], tokenizer)]
    assert spelled == [" van Dyk", "van Dyk", " Van Dyk", "Van Dyk"]
    assert hotword_tokens(["智谱"], tokenizer) == [tokenizer.encode("智谱", add_special_tokens=False)]
    vocabulary = Vocabulary.read(tokenizer, len(tokenizer) + 5, CPU)
    ends = vocabulary.ends_word
    assert (len(vocabulary.sizes), len(vocabulary.begins_word), len(ends)) == (len(tokenizer) + 5, len(tokenizer) + 5, len(tokenizer) + 6)
    assert sum(vocabulary.sizes[token] for token in tokenizer.encode(" Zhipu 智谱")) == len("Zhipu智谱".encode())
    assert [bool(ends[tokenizer.encode(text)[-1]]) for text in ("I will", "I,", "谱", " ")] == [False, True, True, True]


def expected_gains(sequences: list[list[int]], output: list[int], bias: float) -> dict[int, float]:
    """Token → what it gains, by trying each word at each place of the output's end."""
    gains = {}
    for sequence in sequences:
        tokens = sequence[sequence[0] == WORD_START :]
        for matched in range(min(len(tokens) - 1, len(output)) + 1):
            begin = len(output) - matched
            free = sequence[0] != WORD_START or begin == 0 or output[begin - 1] not in LETTERS
            if free and output[begin:] == tokens[:matched]:
                size = sum(SIZES[token] for token in tokens[:matched])
                share, _ = BEGUN if size >= BEGUN_BYTES else HARDLY_BEGUN if size else UNBEGUN
                gains[tokens[matched]] = max(bias * share, gains.get(tokens[matched], 0))
    return gains


def draw(rng: random.Random, tokens: int) -> list[int]:
    return [rng.randrange(tokens) for _ in range(rng.randint(1, 5))]


def random_words(rng: random.Random) -> list[list[int]]:
    return [[WORD_START] * rng.randint(0, 1) + draw(rng, 8) for _ in range(6)]


def test_the_tokens_that_continue_a_word_gain_and_no_others():
    rng, bias = random.Random(0), 7.0
    for _ in range(100):
        sequences = random_words(rng)
        edges = build_edges(sequences, bias, SMALL)
        outputs = [draw(rng, 8) + draw(rng, 8) if rng.random() < 0.9 else [] for _ in range(8)]
        tails = torch.tensor([(output[::-1] + [NO_TOKEN] * 9)[:9] for output in outputs])
        logits = torch.zeros(len(outputs), V)  # nothing is certain: all of the bias is given
        add_gains(logits, tails, edges, SMALL)
        for row, output in zip(logits, outputs, strict=True):
            gains = {token: gain for token, gain in enumerate(row.tolist()) if gain}
            assert gains == pytest.approx(expected_gains(sequences, output, bias))


def test_nothing_is_gained_where_the_model_is_certain():
    share, certain = UNBEGUN
    edges = build_edges([[1, 2]], 7.0, SMALL)
    logits = torch.zeros(3, V)
    logits[:, 5] = torch.tensor([0, certain / 2, certain])
    add_gains(logits, torch.full((3, 1), NO_TOKEN), edges, SMALL)
    assert logits[:, 1].tolist() == pytest.approx([7 * share, 3.5 * share, 0])


def test_a_word_hardly_begun_ends_where_another_begins():
    """"I agree" and the hotword "Iglesias": the model hesitates after "I", but its best token has a space before it."""
    spaced = Vocabulary(SIZES, torch.arange(V) == 9, SMALL.ends_word)
    edges = build_edges([[0, 2, 3]], 7.0, spaced)
    logits = torch.zeros(3, V)
    logits[0, 8] = logits[1:, 9] = 0.1
    add_gains(logits, torch.tensor([[0, NO_TOKEN], [0, NO_TOKEN], [2, 0]]), edges, spaced)
    assert [float(logits[0, 2]) > 0, float(logits[1, 2]) > 0, float(logits[2, 3]) > 0] == [True, False, True]


def processor(place) -> HotwordBias:
    """One whose requests bring token ids, so that it needs no tokenizer."""
    made = HotwordBias(SimpleNamespace(model_config=None), place)
    made.vocabulary = SMALL
    made._edges_of = lambda sequences, bias: build_edges(sequences, bias, SMALL)
    made.edges_of = made._edges_of
    return made


def test_both_runners_give_each_request_its_own_gains():
    """Eight requests, of which five have hotwords, two the same ones; in the second runner one has two draft tokens."""
    rng = random.Random(1)
    words = [random_words(rng) for _ in range(4)]
    asked = [words[0], None, words[1], words[2], None, words[0], words[3], None]
    outputs = [draw(rng, 8) + draw(rng, 8) for _ in asked]
    params = [SamplingParams(extra_args={"hotwords": some} if some else None) for some in asked]
    expected = torch.zeros(len(asked), V)
    for row, some, output in zip(expected, asked, outputs, strict=True):
        for token, gain in expected_gains(some or [], output, DEFAULT_BIAS).items():
            row[token] = gain

    first = processor(CPU)
    first.update_state(None)
    added = [(row, params[row], [], outputs[row]) for row in range(len(asked))]
    first.update_state(BatchUpdate(batch_size=8, removed=[], added=added, moved=[(0, 1, MoveDirectionality.SWAP)]))
    order = [1, 0, *range(2, 8)]
    assert torch.allclose(first.apply(torch.zeros(8, V)), expected[order])
    first.update_state(BatchUpdate(batch_size=8, removed=list(range(8)), added=[], moved=[]))
    untouched = torch.zeros(8, V)
    assert first.apply(untouched) is untouched and not untouched.any()

    prompt = [1, 2, 3]
    slots = [9, 3, 0, 7, 5, 1, 2, 8]
    drafts = 2
    all_tokens = torch.zeros(10, 32, dtype=torch.int32)
    prompt_len = torch.full((10,), len(prompt), dtype=torch.int32)
    rows = []  # slot, place among its request's rows, position, token fed there
    for index, (slot, output) in enumerate(zip(slots, outputs, strict=True)):
        kept = len(output) - (drafts if index == 0 else 0)
        tokens = prompt + output
        all_tokens[slot, : len(prompt) + kept] = torch.tensor(tokens[: len(prompt) + kept])
        rows += [(slot, i, len(prompt) + kept - 1 + i, tokens[len(prompt) + kept - 1 + i]) for i in range(len(output) - kept + 1)]
    slot, local, position, fed = (torch.tensor(column) for column in zip(*rows, strict=True))
    state = SimpleNamespace(
        device=CPU, max_num_reqs=10, all_token_ids=SimpleNamespace(gpu=all_tokens), prompt_len=SimpleNamespace(gpu=prompt_len)
    )
    context = SimpleNamespace(
        idx_mapping_np=np.array(slots), expanded_idx_mapping=slot.int(), expanded_local_pos=local.int(), pos=position, input_ids=fed.int()
    )
    second = processor(state)
    assert [second.add_request(index, some) for index, some in zip(slots, params, strict=True)] == [bool(some) for some in asked]
    logits = second.apply(torch.zeros(len(rows), V), context)
    assert torch.allclose(logits[drafts:], expected)
    for index in slots:
        assert not second.add_request(index, SamplingParams())
    assert second.apply(untouched, context) is untouched and not untouched.any()
