"""GET / and GET /page/NAME: the page that server/page/ holds, as a vLLM endpoint plugin; the page's own calls carry the key.

Everything is read once and served from memory. Nothing but this server may give the page code or styles.
"""

import hashlib
from argparse import Namespace
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.datastructures import State

import vllm.envs as envs
from vllm.engine.protocol import EngineClient
from vllm.utils.mem_constants import MiB_bytes

from .glmasr_upload import limits

FOLDER = Path(__file__).with_name("glmasr_page_files")
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "worker-src 'self'",
        "media-src blob: http: https:",  # the user's own recordings: dropped, or behind a pasted address
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for again each time, and answered 304 while it is the same
}


def page_files() -> dict[str, bytes]:
    """Each file's content by its name; the page is told how large a file may be, to transcribe and in chat."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    most = {b"max_file_bytes": limits().file_bytes, b"max_clip_bytes": envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB * MiB_bytes}
    for name, count in most.items():
        files["index.html"] = files["index.html"].replace(b"{{%s}}" % name, b"%d" % count)
    return files


class PagePlugin:
    """vLLM's EndpointPlugin: attaches the routes."""

    name = "glmasr_page"
    required_tasks = ("transcription",)

    def attach_router(self, app: FastAPI) -> None:
        files = page_files()
        tags = {name: f'"{hashlib.sha256(content).hexdigest()[:32]}"' for name, content in files.items()}

        def answer(request: Request, name: str) -> Response:
            if name not in files:
                return Response(status_code=404)
            headers = HEADERS | {"ETag": tags[name]}
            if request.headers.get("if-none-match") == tags[name]:
                return Response(status_code=304, headers=headers)
            return Response(files[name], media_type=MEDIA_TYPES[Path(name).suffix], headers=headers)

        @app.get("/", include_in_schema=False)
        async def index(request: Request) -> Response:
            return answer(request, "index.html")

        @app.get("/page/{name}", include_in_schema=False)
        async def part(request: Request, name: str) -> Response:
            return answer(request, name)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Keeps nothing: the page needs no engine."""
