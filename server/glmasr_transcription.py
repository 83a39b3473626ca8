"""POST /v1/audio/transcriptions as OpenAI's client knows it, for audio of any length; takes the place of vLLM's route.

A vLLM endpoint plugin (`TranscriptionPlugin`): same port, same key. Audio is decoded as a stream, cut at pauses, and its
segments are transcribed side by side and answered in order.
"""

import asyncio
import json
import math
import re
from argparse import Namespace
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import State, UploadFile

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.entrypoints.speech_to_text.transcription.serving import OpenAIServingTranscription
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.outputs import CompletionOutput
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import RequestOutputKind, SamplingParams

from .glmasr_decode import decode_blocks
from .glmasr_guard import MIN_SPEECH_S, Decoded, Guarded, compression_ratio, max_tokens, transcribe
from .glmasr_hotwords import parse_hotwords
from .glmasr_names import Token, with_hotwords
from .glmasr_segments import Cutting, Segment, Segmenter, halves
from .glmasr_subtitles import cues, srt, vtt
from .glmasr_upload import TooLarge, fetch, limits, read_form

PATH = "/v1/audio/transcriptions"
SIDE_BY_SIDE = 16  # segments of one request that the engine has at a time
EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
SUBTITLES = {"srt": (srt, "application/x-subrip"), "vtt": (vtt, "text/vtt")}
CJK = r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]"
LANGUAGES = {"zh": "chinese", "en": "english", "yue": "cantonese"}


class ServerVad(BaseModel, extra="forbid"):
    """OpenAI's `chunking_strategy` of this type."""

    type: Literal["server_vad"]
    threshold: float = Cutting.threshold
    prefix_padding_ms: int = Cutting.prefix_padding_ms
    silence_duration_ms: int = Cutting.silence_ms


class Form(TranscriptionRequest):
    """The form's fields: OpenAI's, vLLM's sampling fields, and `url` in the place of `file`."""

    file: Any = None
    url: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.0
    include: Annotated[list[Literal["logprobs"]], Field(alias="include[]")] = []
    chunking_strategy: Literal["auto"] | ServerVad | None = None
    hotword_bias: float | None = None

    @property
    def cutting(self) -> Cutting | None:
        """How to cut at pauses; None where audio that fits is to be taken whole.

        Raises:
            ValueError: a value is out of range
        """
        if isinstance(self.chunking_strategy, ServerVad):
            chosen = self.chunking_strategy
            return Cutting(chosen.threshold, chosen.prefix_padding_ms, chosen.silence_duration_ms)
        if self.chunking_strategy or self.response_format in ("srt", "vtt", "verbose_json"):
            return Cutting()
        return None


@dataclass
class Progress:
    """What is known of the whole recording so far."""

    seconds: float = 0.0  # decoded
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """One segment's text, when it is said, and its tokens' logprobs where they were asked for. Does not hold its audio."""

    start_s: float
    end_s: float
    guarded: Guarded
    token_ids: list[int]
    logprobs: list[dict] = field(default_factory=list)


def segments(file: BinaryIO, form: Form, rate: int, max_s: float, whole_s: float, progress: Progress) -> Iterator[Segment]:
    """Decodes and cuts. Up to `whole_s` of audio are one segment, unless the form asks for cuts.

    Raises:
        ValueError: what is wrong with the audio
    """
    cutting, held = form.cutting, []
    segmenter = Segmenter(cutting) if cutting else None
    for block in decode_blocks(file, rate, max_s):
        progress.seconds += block.size / rate
        if segmenter is None and progress.seconds > whole_s:
            segmenter = Segmenter(Cutting())
            for earlier in held:
                yield from segmenter.feed(earlier)
        if segmenter is None:
            held.append(block)
        else:
            yield from segmenter.feed(block)
    if segmenter is not None:
        yield from segmenter.finish()
    else:
        yield Segment.whole(held)


class Transcriber:
    """Has vLLM's engine transcribe the segments of one request."""

    def __init__(self, serving: OpenAIServingTranscription, form: Form, request_id: str, progress: Progress):
        self.serving, self.form, self.request_id, self.progress = serving, form, request_id, progress
        self.tokenizer = serving.renderer.get_tokenizer()
        self.asked = 0
        self.hotwords = [] if form.hotword_bias == 0 else parse_hotwords(form.hotwords or "")
        self.bias: dict[str, Any] = {"hotwords": self.hotwords}
        if form.hotword_bias is not None:
            self.bias["hotword_bias"] = form.hotword_bias
        if self.hotwords and not serving.model_config.logits_processors:
            raise VLLMValidationError("hotwords need a server started with --logits-processors; see README", parameter="hotwords")

    async def answers(self, cut: Iterator[Segment]) -> AsyncIterator[Answer]:
        """In the recording's order, each as soon as it and all before it are there.

        One segment at first, then one more side by side with each answer: so the first one comes soon.
        """
        running: deque[asyncio.Task[Answer]] = deque()
        room = 1
        try:
            more = True
            while more or running:
                if more and len(running) < room:
                    segment = await asyncio.to_thread(next, cut, None)
                    more = segment is not None
                    if more:
                        running.append(asyncio.create_task(self.answer(segment)))
                if running and (running[0].done() or not more or len(running) == room):
                    yield await running.popleft()
                    room = min(room + 1, SIDE_BY_SIDE)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def answer(self, segment: Segment) -> Answer:
        """Decodes one segment, again where the guard doubts it; a client's own limit is no reason to doubt."""
        outputs: dict[str, CompletionOutput] = {}

        async def decode(samples: np.ndarray, temperature: float) -> Decoded:
            is_doubtful = bool(outputs) or segment.speech_s < MIN_SPEECH_S  # then it counts how sure the model is
            output = await self._generate(samples, max(temperature, self.form.temperature), logprobs=is_doubtful)
            outputs[output.text] = output
            count = max(1, len(output.token_ids))
            logprob = (output.cumulative_logprob or 0.0) / count
            ended = "stop" if len(output.token_ids) == self.form.max_completion_tokens else output.finish_reason
            return Decoded(output.text.strip(), list(output.token_ids), logprob, ended)

        rate = self.serving.asr_config.sample_rate
        guarded = await transcribe(segment.samples, segment.samples.size / rate, segment.speech_s, decode, halves)
        output = next((output for text, output in outputs.items() if text.strip() == guarded.text), None)
        if output and output.finish_reason == "length" and "cut_off" not in guarded.warnings:
            guarded = replace(guarded, warnings=[*guarded.warnings, "cut_off"])
        if self.hotwords and output and guarded.text:
            guarded, output = await self._with_hotwords(segment.samples, guarded, output)
        logprobs = self._logprobs(output) if output and self.form.include else []
        token_ids = list(output.token_ids) if output else self.tokenizer.encode(guarded.text, add_special_tokens=False)
        return Answer(segment.start_s, segment.end_s, guarded, token_ids, logprobs)

    async def _with_hotwords(
        self, samples: np.ndarray, guarded: Guarded, output: CompletionOutput
    ) -> tuple[Guarded, CompletionOutput | None]:
        """Decodes once more, with the bias, and takes over the hotwords that belong in the answer; it has no output then."""
        biased = await self._generate(samples, guarded.temperature, self.bias)
        text = with_hotwords(guarded.text, self._places(output), biased.text, self.hotwords)
        if text == guarded.text:
            return guarded, output
        return replace(guarded, text=text, compression_ratio=compression_ratio(text)), None

    def _places(self, output: CompletionOutput) -> list[Token]:
        """Where each token is in the stripped text, with its logprob."""
        ends = [len(self.tokenizer.decode(output.token_ids[: i + 1], skip_special_tokens=True)) for i in range(len(output.token_ids))]
        led = len(output.text) - len(output.text.lstrip())
        chosen = zip([0, *ends], ends, output.token_ids, output.logprobs)  # noqa: B905 - the first begins at 0
        return [(begin - led, end - led, of_token[token_id].logprob) for begin, end, token_id, of_token in chosen]

    async def _generate(
        self, samples: np.ndarray, temperature: float, bias: dict[str, Any] | None = None, logprobs: bool = False
    ) -> CompletionOutput:
        serving, form = self.serving, self.form
        stt = form.build_stt_params(samples, serving.asr_config, serving.model_config, "transcribe")
        prompt = parse_model_prompt(serving.model_config, serving.model_cls.get_generation_prompt(stt))
        (engine_input,) = await serving.renderer.render_cmpl_async([prompt])
        params: SamplingParams = form.to_sampling_params(self._most_tokens(samples), serving.default_sampling_params)
        params.temperature = temperature
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.extra_args = {**(form.vllm_xargs or {}), **(bias or {})} or None
        wanted = logprobs or form.include or form.response_format == "verbose_json" or self.hotwords
        params.logprobs = 0 if wanted else None
        self.asked += 1
        generator = serving.engine_client.generate(engine_input, params, f"{self.request_id}-{self.asked}")
        async with aclosing(generator):
            async for result in generator:
                pass
        self.progress.prompt_tokens += len(result.prompt_token_ids)
        self.progress.answer_tokens += len(result.outputs[0].token_ids)
        return result.outputs[0]

    def _most_tokens(self, samples: np.ndarray) -> int:
        most = max_tokens(samples.size / self.serving.asr_config.sample_rate)
        return min(most, self.form.max_completion_tokens or most)

    def _logprobs(self, output: CompletionOutput) -> list[dict]:
        listed = []
        for token_id, of_token in zip(output.token_ids, output.logprobs, strict=True):
            text = self.tokenizer.decode([token_id], skip_special_tokens=True)
            if text:
                listed.append({"token": text, "bytes": list(text.encode()), "logprob": of_token[token_id].logprob})
        return listed


def joined(before: str, text: str) -> str:
    """What to put behind `before`: the text, with a space where neither side is Chinese, Japanese or Korean."""
    if before and text and not re.search(f"{CJK}$", before) and not re.match(CJK, text):
        return " " + text
    return text


def language_of(form: Form, text: str) -> str:
    """The language asked for, else the one that the text is written in."""
    if form.language:
        return LANGUAGES[form.language]
    letters = re.findall(r"\w", text)
    return "chinese" if len(re.findall(CJK, text)) > len(letters) / 2 else "english"


def verbose(answer: Answer, index: int) -> dict:
    """OpenAI's TranscriptionSegment, with what the guard still doubts."""
    guarded = answer.guarded
    return {
        "id": index,
        "seek": int(100 * answer.start_s),
        "start": round(answer.start_s, 3),
        "end": round(answer.end_s, 3),
        "text": guarded.text,
        "tokens": answer.token_ids,
        "temperature": guarded.temperature,
        "avg_logprob": guarded.avg_logprob,
        "compression_ratio": guarded.compression_ratio,
        "no_speech_prob": guarded.no_speech_prob,
        "warnings": guarded.warnings,
    }


def render(form: Form, answers: list[Answer], text: str, progress: Progress) -> Response:
    """The whole answer in the format asked for."""
    usage = {"type": "duration", "seconds": math.ceil(progress.seconds)}
    spoken = [answer for answer in answers if answer.guarded.text]
    if form.response_format == "text":
        return PlainTextResponse(text + "\n")
    if form.response_format in SUBTITLES:
        write, media_type = SUBTITLES[form.response_format]
        shown = [cue for one in spoken for cue in cues(one.start_s, one.end_s, one.guarded.text)]
        return Response(write(shown), media_type=media_type)
    if form.response_format == "json":
        found: dict[str, Any] = {"text": text, "usage": usage}
        if form.include:
            found["logprobs"] = [logprob for answer in answers for logprob in answer.logprobs]
        return JSONResponse(found)
    return JSONResponse(
        {
            "task": "transcribe",
            "language": language_of(form, text),
            "duration": round(progress.seconds, 3),
            "text": text,
            "segments": [verbose(answer, i) for i, answer in enumerate(spoken)],
            "usage": usage,
            "warnings": sorted({warning for answer in answers for warning in answer.guarded.warnings}),
        }
    )


def segment_event(answer: Answer, index: int) -> dict:
    """OpenAI's event for a segment, whose speaker is unknown, with what verbose_json says of it and its subtitle cues."""
    shown = cues(answer.start_s, answer.end_s, answer.guarded.text)
    rounded = [{"start": round(cue.start_s, 3), "end": round(cue.end_s, 3), "text": cue.text} for cue in shown]
    return {"type": "transcript.text.segment", **verbose(answer, index), "id": str(index), "speaker": "", "cues": rounded}


async def events(form: Form, first: Answer | None, answers: AsyncIterator[Answer], progress: Progress) -> AsyncIterator[str]:
    """OpenAI's server-sent events: a delta for each segment, with verbose_json also the segment, then the whole text."""
    text, logprobs, count, warnings = "", [], 0, set()

    def delta(answer: Answer) -> Iterator[str]:
        nonlocal text, count
        warnings.update(answer.guarded.warnings)
        if added := joined(text, answer.guarded.text):
            text += added
            logprobs.extend(answer.logprobs)
            event: dict[str, Any] = {"type": "transcript.text.delta", "delta": added}
            yield _event(event | ({"logprobs": answer.logprobs} if form.include else {}))
            if form.response_format == "verbose_json":
                yield _event(segment_event(answer, count))
            count += 1

    try:
        if first is not None:
            for one in delta(first):
                yield one
        async for answer in answers:
            for one in delta(answer):
                yield one
    except (ValueError, VLLMError) as error:  # what was said before has been sent
        yield _event({"type": "error", "error": {"message": str(error), "type": "BadRequestError", "param": "file", "code": 400}})
        return
    tokens = {"input_tokens": progress.prompt_tokens, "output_tokens": progress.answer_tokens}
    usage = {"type": "tokens", **tokens, "total_tokens": sum(tokens.values())}
    done: dict[str, Any] = {"type": "transcript.text.done", "text": text, "usage": usage}
    if form.response_format == "verbose_json":
        done |= {"language": language_of(form, text), "duration": round(progress.seconds, 3), "warnings": sorted(warnings)}
    yield _event(done | ({"logprobs": logprobs} if form.include else {}))


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def parsed(fields: dict[str, Any]) -> Form:
    """The form's fields as `Form`.

    Raises:
        VLLMValidationError: names the field and what came
    """
    try:
        form = Form(**fields)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "request"
        came = problem["input"] if name != "file" else "…"
        raise VLLMValidationError(f"{name} is {came!r}: {problem['msg']}", parameter=name) from error
    if (form.file is None) == (form.url is None):
        raise VLLMValidationError("send the audio as `file` (an upload) or as `url`, one of the two", parameter="file")
    if "word" in form.timestamp_granularities:
        raise VLLMValidationError("timestamp_granularities[]: word times are not available yet; use segment",
                                  parameter="timestamp_granularities")  # fmt: skip
    if form.timestamp_granularities and form.response_format != "verbose_json":
        raise VLLMValidationError(
            f"timestamp_granularities[] needs response_format=verbose_json, not {form.response_format}",
            parameter="timestamp_granularities",
        )
    if form.include and form.response_format != "json":
        raise VLLMValidationError(f"include[]=logprobs needs response_format=json, not {form.response_format}", parameter="include")
    if form.include and form.hotwords:
        raise VLLMValidationError("include[]=logprobs is not available with hotwords", parameter="include")
    if form.stream and form.response_format in SUBTITLES:
        raise VLLMValidationError(f"stream works with json, text and verbose_json, not with {form.response_format}", parameter="stream")
    if form.use_beam_search or form.n != 1:
        raise VLLMValidationError("beam search is not available in transcription: leave use_beam_search and n", parameter="n")
    try:
        form.cutting  # noqa: B018
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="chunking_strategy") from error
    try:
        form.to_sampling_params(1)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error
    return form


@with_cancellation
@load_aware_call
async def create_transcription(fields: dict[str, Any], raw_request: Request) -> Response:
    """Transcribes one upload or URL."""
    serving: OpenAIServingTranscription = raw_request.app.state.openai_serving_transcription
    form = parsed(fields)
    form.model = form.model or serving.models.model_name()
    if (refused := await serving._check_model(form)) is not None:
        return JSONResponse(refused.model_dump(), status_code=refused.error.code)
    form.language = known_language(form.language)
    file = form.file.file if isinstance(form.file, UploadFile) else await fetch(form.url, raw_request.app.state.args)
    rate, progress = int(serving.asr_config.sample_rate), Progress()
    request_id = f"transcribe-{serving._base_request_id(raw_request)}"
    try:
        transcriber = Transcriber(serving, form, request_id, progress)
        cut = segments(file, form, rate, limits().audio_s, serving.asr_config.max_audio_clip_s, progress)
        answers = transcriber.answers(cut)
        if not form.stream:
            found, text = [], ""
            async with aclosing(answers):
                async for answer in answers:
                    found.append(answer)
                    text += joined(text, answer.guarded.text)
            return render(form, found, text, progress)
        first = await anext(answers, None)  # so that audio which cannot be read is a 4xx
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="file") from error
    return StreamingResponse(events(form, first, answers, progress), headers=EVENTS)


def known_language(language: str | None) -> str | None:
    """Raises VLLMValidationError for a language that the model does not know."""
    if not language:
        return None
    known = {name: code for code, name in LANGUAGES.items()} | {code: code for code in LANGUAGES}
    code = known.get(language.lower()) or known.get(language.lower().partition("-")[0])
    if code is None:
        listed = ", ".join(f"{code} ({name})" for code, name in LANGUAGES.items())
        raise VLLMValidationError(f"language is {language!r}; this model knows {listed}", parameter="language")
    return code


class TranscriptionPlugin:
    """vLLM's EndpointPlugin: attaches the route."""

    name = "glmasr"
    required_tasks = ("transcription",)

    def attach_router(self, app: FastAPI) -> None:
        @app.post(PATH)
        async def route(raw_request: Request) -> Response:
            try:
                return await create_transcription(await read_form(raw_request), raw_request=raw_request)
            except TooLarge as error:
                refused = create_error_response(str(error), "BadRequestError", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "file")
                return JSONResponse(refused.model_dump(), status_code=refused.error.code)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keeps the arguments: they name the hosts of URLs that may be fetched."""
        state.args = args
