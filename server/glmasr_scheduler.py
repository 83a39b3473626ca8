"""A scheduler that hands an answer over in two messages where nobody reads it as it grows: its first token, then the rest.

vLLM sends every token of every request through a message queue to the API process, which keeps the text of one that is not
streamed to itself until the end. With hundreds of requests in flight that work holds up the steps. vLLM's --scheduler-cls
names `whole_answers_scheduler`.
"""

from collections.abc import Iterable

from vllm.config import VllmConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus


def is_read_whole(request: Request) -> bool:
    """Whether the API process needs no token of it before the last.

    It needs each one to stream it, to look for stop strings, and to send it with its logprobs.
    """
    params = request.sampling_params
    return (
        params is not None
        and params.output_kind == RequestOutputKind.FINAL_ONLY
        and not params.stop
        and params.logprobs is None
        and params.prompt_logprobs is None
    )


class WholeAnswers:
    """To be mixed into a scheduler of vLLM's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._held: dict[str, list[int]] = {}  # request → its tokens behind the first

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        due = {}
        for client, outputs in super().update_from_output(scheduler_output, model_runner_output).items():
            outputs.outputs = [output for output in outputs.outputs if self._is_due(output)]
            if outputs.outputs or outputs.finished_requests or outputs.scheduler_stats is not None:
                due[client] = outputs
        return due

    def _is_due(self, output: EngineCoreOutput) -> bool:
        """Whether to send it now; the tokens of one that is not are sent with the last."""
        held = self._held.get(output.request_id)
        if output.finish_reason is not None:
            if held is not None:
                output.new_token_ids = self._held.pop(output.request_id) + output.new_token_ids
            return True
        if held is not None:
            held += output.new_token_ids
            return False
        if is_read_whole(self.requests[output.request_id]):
            self._held[output.request_id] = []
        return True

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """Those that end without an answer of their own: the client has left, or they failed."""
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._held.pop(request.request_id, None)
        return finished


class WholeAnswersScheduler(WholeAnswers, Scheduler):
    """For an engine that schedules a step when the one before has ended."""


class AsyncWholeAnswersScheduler(WholeAnswers, AsyncScheduler):
    """For an engine that schedules a step while the one before runs."""


def whole_answers_scheduler(vllm_config: VllmConfig, **kwargs) -> WholeAnswers:
    """The one that the engine's configuration asks for."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (AsyncWholeAnswersScheduler if is_async else WholeAnswersScheduler)(vllm_config=vllm_config, **kwargs)
