"""A transcription request's form and file, as an upload or behind a URL, within named limits and never whole in memory."""

import ipaddress
import json
import os
import re
import socket
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.types import Message

from vllm.exceptions import VLLMValidationError
from vllm.utils.mem_constants import MiB_bytes

MAX_FIELDS = 100
MAX_FIELD_BYTES = 2**20
IN_MEMORY_BYTES = 2**20  # of a file behind a URL; more goes to disk, as starlette does with uploads
MAX_REDIRECTS = 5
FETCH_SILENCE_S = 30  # without a byte
LISTS = {"include": "include[]", "timestamp_granularities": "timestamp_granularities[]"}


@dataclass(frozen=True)
class Limits:
    """Largest file in bytes, longest audio in seconds."""

    file_bytes: int
    audio_s: float


def limits() -> Limits:
    """From MAX_UPLOAD_MB and MAX_AUDIO_HOURS, which server/serve.py sets."""
    return Limits(int(float(os.environ["MAX_UPLOAD_MB"]) * MiB_bytes), float(os.environ["MAX_AUDIO_HOURS"]) * 3600)


class TooLarge(Exception):
    """A file over the limit."""

    def __init__(self, size: int | None):
        most = limits().file_bytes / MiB_bytes
        came = "more" if size is None else f"{size / MiB_bytes:.1f} MiB"
        super().__init__(f"the audio file has {came}; at most {most:.0f} MiB are taken (MAX_UPLOAD_MB)")


async def read_form(request: Request) -> dict[str, Any]:
    """A multipart request's fields by name, lists under their name with [], the file as UploadFile.

    Raises:
        VLLMValidationError: the body is no such form
        TooLarge: it is larger than a file may be, found before it is read whole
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        came = request.headers.get("content-type")
        raise VLLMValidationError(f"the body is {came!r}; expected multipart/form-data with the audio as `file`", parameter="file")
    most = limits().file_bytes + MAX_FIELD_BYTES
    announced = int(request.headers.get("content-length", 0))
    if announced > most:
        await _discard(request, most)
        raise TooLarge(announced)
    read = 0

    async def receive() -> Message:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > most:
            raise TooLarge(None)
        return message

    try:
        form = await Request(request.scope, receive).form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except MultiPartException as error:
        raise VLLMValidationError(f"the form cannot be read: {error.message}", parameter="file") from error
    return _fields(form)


async def _discard(request: Request, most: int) -> None:
    """Reads on for a while: a connection closed at once would take the refusal along with it."""
    read = 0
    async for chunk in request.stream():
        if (read := read + len(chunk)) > most:
            return


def _fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    strategy: dict[str, Any] = {}
    for name in form:
        if inside := re.fullmatch(r"chunking_strategy\[(\w+)\]", name):
            strategy[inside[1]] = form[name]
        elif name.removesuffix("[]") in LISTS:
            fields[LISTS[name.removesuffix("[]")]] = form.getlist(name)
        else:
            fields[name] = form[name]
    if str(fields.get("chunking_strategy", "")).startswith("{"):
        try:
            strategy = json.loads(fields["chunking_strategy"])
        except json.JSONDecodeError as error:
            raise VLLMValidationError(f"chunking_strategy is not JSON: {error}", parameter="chunking_strategy") from error
    if strategy:
        fields["chunking_strategy"] = strategy
    if (file := fields.get("file")) is not None and not isinstance(file, UploadFile):
        raise VLLMValidationError("file is a text field; expected an uploaded audio file", parameter="file")
    return fields


class _PublicResolver(AbstractResolver):
    """Finds a host's addresses and refuses private ones, so that no name leads into the server's own network."""

    def __init__(self):
        self.inner = aiohttp.ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self.inner.resolve(host, port, family)
        if private := [one["host"] for one in found if not ipaddress.ip_address(one["host"]).is_global and host != "localhost"]:
            raise VLLMValidationError(f"url leads to {host}, which is at the private address {private[0]}", parameter="url")
        return found

    async def close(self) -> None:
        await self.inner.close()


async def fetch(url: str, args: Namespace) -> BinaryIO:
    """The file behind a URL whose host `--allowed-media-domains` names, and so with all hosts it redirects to.

    Raises:
        VLLMValidationError: names what is wrong with the URL
        TooLarge: the file is larger than the limit
    """
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=FETCH_SILENCE_S, sock_read=FETCH_SILENCE_S)
    connector = aiohttp.TCPConnector(resolver=_PublicResolver())
    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            for _ in range(MAX_REDIRECTS + 1):
                _check_host(url, args.allowed_media_domains or [])
                async with session.get(url, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, response.headers.get("Location", ""))
                        continue
                    if response.status != 200:
                        raise VLLMValidationError(f"url {url[:200]!r} answered {response.status}", parameter="url")
                    return await _spooled(response)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise VLLMValidationError(f"cannot fetch url {url[:200]!r}: {error or type(error).__name__}", parameter="url") from error
    raise VLLMValidationError(f"url redirects more than {MAX_REDIRECTS} times", parameter="url")


def _check_host(url: str, allowed: list[str]) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise VLLMValidationError(f"url begins with {url[:32]!r}; expected http:// or https://", parameter="url")
    if parts.hostname not in allowed:
        raise VLLMValidationError(
            f"url leads to {parts.hostname}, which the server's --allowed-media-domains does not name", parameter="url"
        )


async def _spooled(response: aiohttp.ClientResponse) -> BinaryIO:
    most = limits().file_bytes
    if (response.content_length or 0) > most:
        raise TooLarge(response.content_length)
    file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES)  # noqa: SIM115 - lives as long as the request
    async for chunk in response.content.iter_chunked(2**16):
        file.write(chunk)
        if file.tell() > most:
            raise TooLarge(None)
    file.seek(0)
    return file
