"""OpenAI's Realtime API for transcription, as GA: what clients send, checked, and what the server sends.

Mirrors the types of the openai package (openai/types/realtime). A session is `Settings`; an event is a dict with `type`.
"""

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

TRANSCRIPTION = "conversation.item.input_audio_transcription"
# semantic_vad here waits for so long a silence, in milliseconds; no model judges what was said.
EAGERNESS_MS = {"low": 2000, "medium": 1000, "auto": 1000, "high": 500}


class Refused(ValueError):
    """What is wrong with a client's event, as the fields of an `error` event."""

    def __init__(self, message: str, code: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


class _Strict(BaseModel, extra="forbid"):
    pass


class Pcm(_Strict):
    """16 bits, little-endian, mono. OpenAI's rate is 24000."""

    type: Literal["audio/pcm"]
    rate: Literal[16000, 24000, 48000] = 24000


class G711(_Strict):
    """8 bits at 8000 Hz."""

    type: Literal["audio/pcmu", "audio/pcma"]

    @property
    def rate(self) -> int:
        return 8000


class NoiseReduction(_Strict):
    """Taken and reported, but nothing is filtered: the model was trained with noise."""

    type: Literal["near_field", "far_field"]


class Transcription(_Strict):
    model: str | None = None
    language: str | None = None
    prompt: Annotated[str | None, Field(max_length=4000)] = None


class _Vad(_Strict):
    create_response: bool | None = None  # these two belong to conversations; they are taken and do nothing
    interrupt_response: bool | None = None


class ServerVad(_Vad):
    type: Literal["server_vad"]
    threshold: Annotated[float, Field(ge=0.01, le=0.99)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=1000)] = 300
    silence_duration_ms: Annotated[int, Field(ge=100, le=10_000)] = 500
    idle_timeout_ms: None = None

    @property
    def silence_ms(self) -> int:
        return self.silence_duration_ms


class SemanticVad(_Vad):
    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"

    threshold = property(lambda self: 0.5)
    prefix_padding_ms = property(lambda self: 300)

    @property
    def silence_ms(self) -> int:
        return EAGERNESS_MS[self.eagerness]


class Input(_Strict):
    format: Annotated[Pcm | G711, Field(discriminator="type")] = Pcm(type="audio/pcm")
    noise_reduction: NoiseReduction | None = None
    transcription: Transcription = Transcription()
    turn_detection: Annotated[ServerVad | SemanticVad, Field(discriminator="type")] | None = ServerVad(type="server_vad")


class Audio(_Strict):
    input: Input = Input()


class Settings(_Strict):
    """A session's configuration."""

    type: Literal["transcription"]
    audio: Audio = Audio()
    include: list[str] | None = None

    def updated(self, changes: Any) -> "Settings":
        """With the fields that `session.update` names.

        Raises:
            Refused: a field is unknown, missing or has a wrong value
        """
        if not isinstance(changes, dict):
            raise Refused("session.update needs `session`, an object", "missing_required_parameter", "session")
        if "type" not in changes:
            raise Refused("session.type is missing; expected 'transcription'", "missing_required_parameter", "session.type")
        known = self.model_dump(exclude_none=True)
        known["audio"]["input"].setdefault("turn_detection", None)
        try:
            settings = Settings.model_validate(_merged(known, changes))
        except ValidationError as error:
            raise _refusal(error, "session") from error
        if settings.include:
            raise Refused("include: log probabilities are not available in live transcription", "invalid_value", "session.include")
        return settings

    def shown(self, session_id: str, expires_at: int) -> dict:
        """As in `session.created`; a rate other than 24000, which the client's type does not know, as `x_rate`."""
        settings = self.model_dump(exclude_none=True)
        heard = settings["audio"]["input"]
        heard.setdefault("turn_detection", None)
        heard.setdefault("noise_reduction", None)
        if heard["format"].get("rate", 24000) != 24000:
            heard["format"]["x_rate"] = heard["format"].pop("rate")
        return {"id": session_id, "object": "realtime.transcription_session", "expires_at": expires_at, **settings}


def _merged(known: Any, changes: Any) -> Any:
    """`changes` within `known`; a format or turn detection of another type replaces the old one."""
    if not isinstance(changes, dict) or not isinstance(known, dict):
        return changes
    if "type" in changes and changes["type"] != known.get("type"):
        return changes
    return known | {name: _merged(known.get(name), value) for name, value in changes.items()}


def _refusal(error: ValidationError, where: str) -> Refused:
    problem = error.errors()[0]
    loc = [str(part) for part in problem["loc"] if part not in ("audio/pcm", "audio/pcmu", "audio/pcma", "server_vad", "semantic_vad")]
    name = ".".join([where, *loc])
    if problem["type"] == "extra_forbidden":
        return Refused(f"unknown parameter: {name}", "unknown_parameter", name)
    if problem["type"] in ("missing", "union_tag_not_found"):
        return Refused(f"missing parameter: {name}: {problem['msg']}", "missing_required_parameter", name)
    return Refused(f"{name} is {str(problem['input'])[:100]!r}: {problem['msg']}", "invalid_value", name)


# Client event → its fields beside type and event_id, and whether they must be there.
CLIENT_EVENTS = {
    "session.update": ("session",),
    "input_audio_buffer.append": ("audio",),
    "input_audio_buffer.commit": (),
    "input_audio_buffer.clear": (),
}


def parse(message: str | bytes) -> dict:
    """A client's message as a JSON object; `check` says whether it is an event.

    Raises:
        Refused: it is none
    """
    try:
        event = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the message is not JSON: {error}", "invalid_json") from error
    if not isinstance(event, dict):
        raise Refused(f"the message is JSON, but no object: {str(event)[:100]!r}", "invalid_json")
    return event


def check(event: dict) -> str:
    """The type of a client's event.

    Raises:
        Refused: the type is not known here, or a field is missing or unknown
    """
    name = event.get("type")
    if name is None:
        raise Refused("the event has no type", "missing_required_parameter", "type")
    if name == "transcription_session.update":
        raise Refused("transcription_session.update was the beta's; send session.update with session.type 'transcription'",
                      "invalid_value", "type")  # fmt: skip
    if not isinstance(name, str) or name not in CLIENT_EVENTS:
        expected = ", ".join(CLIENT_EVENTS)
        raise Refused(f"unknown event type {str(name)[:100]!r}; a transcription session takes {expected}", "invalid_value", "type")
    for field in CLIENT_EVENTS[name]:
        if field not in event:
            raise Refused(f"{name} needs `{field}`", "missing_required_parameter", field)
    for field in event:
        if field not in ("type", "event_id", *CLIENT_EVENTS[name]):
            raise Refused(f"unknown parameter: {str(field)[:100]}", "unknown_parameter", str(field)[:100])
    return name


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


def event(kind: str, **fields: Any) -> str:
    """A server event as JSON."""
    return json.dumps({"type": kind, "event_id": new_id("event"), **fields}, ensure_ascii=False)


def error(message: str, code: str, param: str | None = None, event_id: Any = None, kind: str = "invalid_request_error") -> str:
    """An `error` event; `event_id` is the client's, if it sent one."""
    told = event_id if isinstance(event_id, str) else None
    return event("error", error={"type": kind, "code": code, "message": message, "param": param, "event_id": told})


def item(item_id: str, transcript: str | None = None) -> dict:
    """A turn as an item of the conversation."""
    content = {"type": "input_audio", **({"transcript": transcript} if transcript is not None else {})}
    return {"id": item_id, "object": "realtime.item", "type": "message", "status": "completed", "role": "user", "content": [content]}
