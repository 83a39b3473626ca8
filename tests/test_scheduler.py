"""Answers held in the engine until they are whole: nothing is lost, and what must be read token by token still is."""

from types import SimpleNamespace

import pytest
from clients import MAX_TOKENS, MODEL, TRANSCRIBE, WAVS, audio_part, chat, expected_text
from conftest import Server

from vllm.model_executor.models.glmasr_scheduler import WholeAnswers, is_read_whole
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

WHOLE = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY)


class Steps:
    """Gives out one step's outputs after another, as vLLM's schedulers do."""

    def __init__(self, steps: list[dict[int, EngineCoreOutputs]], **params: SamplingParams):
        self.steps = iter(steps)
        self.requests = {name: SimpleNamespace(request_id=name, sampling_params=chosen) for name, chosen in params.items()}

    def update_from_output(self, scheduler_output, model_runner_output) -> dict[int, EngineCoreOutputs]:
        return next(self.steps)

    def finish_requests(self, request_ids: list[str], finished_status) -> list[SimpleNamespace]:
        return [self.requests.pop(name) for name in request_ids]


class Held(WholeAnswers, Steps):
    def sent(self) -> dict[int, list[tuple[str, list[int]]]]:
        """Of the next step: request and tokens, by client."""
        due = self.update_from_output(None, None)
        return {client: [(one.request_id, one.new_token_ids) for one in outputs.outputs] for client, outputs in due.items()}


def answer(name: str, *tokens: int, finish: FinishReason | None = None) -> EngineCoreOutput:
    return EngineCoreOutput(request_id=name, new_token_ids=list(tokens), finish_reason=finish)


def made(*answers: EngineCoreOutput, finished: set[str] | None = None) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=list(answers), finished_requests=finished)


def test_the_first_token_goes_at_once_and_the_others_with_the_last():
    steps = [answer("a", 1), answer("a", 2), answer("a", 3, 4), answer("a", 5, finish=FinishReason.STOP)]
    held = Held([{0: made(step)} for step in steps], a=WHOLE)
    assert [held.sent() for _ in steps] == [{0: [("a", [1])]}, {}, {}, {0: [("a", [2, 3, 4, 5])]}]


def test_an_answer_of_one_token_goes_once():
    assert Held([{0: made(answer("a", 1, finish=FinishReason.LENGTH))}], a=WHOLE).sent() == {0: [("a", [1])]}


def test_streamed_ones_beside_it_go_token_by_token():
    steps = [{0: made(answer("a", 1), answer("b", 7))}, {0: made(answer("a", 2), answer("b", 8)), 1: made(answer("c", 9))}]
    held = Held(steps, a=WHOLE, b=SamplingParams(output_kind=RequestOutputKind.DELTA), c=WHOLE)
    assert [held.sent() for _ in steps] == [{0: [("a", [1]), ("b", [7])]}, {0: [("b", [8])], 1: [("c", [9])]}]


def test_of_a_request_whose_client_has_left_nothing_is_kept():
    held = Held([{0: made(answer("a", 1))}, {0: made(answer("a", 2))}], a=WHOLE)
    held.sent(), held.sent()
    held.finish_requests(["a"], None)
    assert not held._held


def test_news_of_finished_requests_goes_without_an_answer_too():
    held = Held([{0: made(answer("a", 1))}, {0: made(answer("a", 2), finished={"b"})}], a=WHOLE)
    held.sent()
    due = held.update_from_output(None, None)
    assert [(client, outputs.outputs, outputs.finished_requests) for client, outputs in due.items()] == [(0, [], {"b"})]


@pytest.mark.parametrize("needed", [{"stop": ["x"]}, {"logprobs": 0}, {"output_kind": RequestOutputKind.CUMULATIVE}])
def test_what_must_be_read_token_by_token_is_not_held(needed: dict):
    params = SamplingParams(**{"output_kind": RequestOutputKind.FINAL_ONLY} | needed)
    assert not is_read_whole(SimpleNamespace(sampling_params=params))


# --- through the server -----------------------------------------------------------------------------


def test_a_stop_string_ends_an_answer_that_is_not_streamed(server: Server):
    text = expected_text(WAVS[0])
    word = text.split()[2]
    content = [audio_part(WAVS[0].read_bytes()), {"type": "text", "text": TRANSCRIBE}]
    choice = chat(server, content, stop=[word]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", text.partition(word)[0])


def test_an_answer_whole_streamed_and_with_logprobs_is_the_same(server: Server):
    content = [audio_part(WAVS[0].read_bytes()), {"type": "text", "text": TRANSCRIBE}]
    whole, probable = chat(server, content), chat(server, content, logprobs=True)
    stream = server.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=MAX_TOKENS, stream=True
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == whole.choices[0].message.content == probable.choices[0].message.content == expected_text(WAVS[0])
    assert len(probable.choices[0].logprobs.content) == probable.usage.completion_tokens == whole.usage.completion_tokens
