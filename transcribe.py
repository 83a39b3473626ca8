"""Transcribes recordings, folders of them and videos through a running server, or one that it starts for the time.

    python transcribe.py [options] PATH…

Writes text and subtitles beside each recording, or into --out. The same command again goes on where the last one was
interrupted. Exit status: 0 all succeeded, 1 something failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import av
import openai
import soundfile
from openai.types.audio import TranscriptionVerbose
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "server"))

from demo import LOG, stop, wait  # noqa: E402
from transcribe_files import FORMATS, SENDABLE, Job, plan, readable, render, shown, write  # noqa: E402

LOCAL = ("localhost", "127.0.0.1")
RETRIES = 16  # without a Retry-After they last some 100 s, in which a server restarts
CONNECT_S = 10


def one_line(text: Any) -> str:
    return " ".join(str(text).split())


def reason(error: Exception) -> str:
    """What went wrong: the server's message, where there is one."""
    told = error.body.get("message") if isinstance(error, openai.APIError) and isinstance(error.body, dict) else None
    return one_line(told or error) or type(error).__name__


class Batch:
    """Works through jobs, some at a time; afterwards `failures`, `warnings`, `audio_s` and `untried` say how it went."""

    def __init__(self, jobs: list[Job], model: str, args: argparse.Namespace):
        self.jobs, self.model, self.args = jobs, model, args
        self.pending = iter(jobs)
        self.failures: list[str] = []
        self.warnings: list[str] = []
        self.audio_s = 0.0
        self.untried = len(jobs)
        self.gone = False  # the server
        self.stopping = threading.Event()
        hours = sum(job.duration_s or 0 for job in jobs) / 3600
        shape = "{l_bar}{bar}| {n:.2f} of {total:.2f} h [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=max(hours, 1e-9), bar_format=shape, disable=None)

    async def run(self) -> None:
        async with openai.AsyncOpenAI(
            base_url=self.args.url, api_key=self.args.api_key, max_retries=RETRIES,
            timeout=openai.Timeout(None, connect=CONNECT_S),
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not is_local(self.args.url)),  # no proxy to ourselves
        ) as client:  # fmt: skip
            try:
                await asyncio.gather(*(self.work(client) for _ in range(self.args.concurrency)))
            finally:
                self.stopping.set()
                self.bar.close()

    async def work(self, client: openai.AsyncOpenAI) -> None:
        for job in self.pending:
            known_s = await self.attempt(client, job)
            self.untried -= 1
            if job.duration_s is None:
                self.bar.total += known_s / 3600
            self.bar.set_postfix_str(f", {len(self.jobs) - self.untried}/{len(self.jobs)} files, {len(self.failures)} failed")
            self.bar.update((job.duration_s or known_s) / 3600)
            if self.gone:
                return

    async def attempt(self, client: openai.AsyncOpenAI, job: Job) -> float:
        """Its seconds of audio, 0 if it failed."""
        try:
            async with asyncio.timeout(self.args.timeout):
                duration_s = await self.transcribe(client, job)
        except TimeoutError:
            why = f"not done after {self.args.timeout:g} s; --timeout gives it longer"
        except openai.APIConnectionError as error:
            why, self.gone = f"the server at {self.args.url} has stopped answering ({reason(error)})", True
        except (openai.OpenAIError, av.FFmpegError, soundfile.SoundFileError, OSError, ValueError) as error:
            why = reason(error)
        else:
            self.audio_s += duration_s
            return duration_s
        self.failures.append(f"{shown(job.path)}: {why}")
        return 0.0

    async def transcribe(self, client: openai.AsyncOpenAI, job: Job) -> float:
        """Asks the server, writes the outputs, and returns the seconds of audio."""
        mtime_ns = job.path.stat().st_mtime_ns
        with await asyncio.to_thread(readable, job, self.stopping) as file:
            answer = await self.ask(client, job, file)
            if job.path.stat().st_mtime_ns != mtime_ns:
                raise ValueError("it has changed while it was transcribed; run the same command again")
            embedded = None
            if self.args.embed and "html" in job.outputs:
                file.seek(0)
                embedded = await asyncio.to_thread(file.read)
        for kind, output in job.outputs.items():
            await asyncio.to_thread(write, output, render(kind, job, answer, embedded), mtime_ns)
        self.warnings += [f"{shown(job.path)}: {one_line(warning)}" for warning in answer.get("warnings") or ()]
        return answer["duration"]

    async def ask(self, client: openai.AsyncOpenAI, job: Job, file: BinaryIO) -> dict[str, Any]:
        """The server's verbose_json."""
        options = {name: value for name in ("language", "prompt") if (value := getattr(self.args, name))}
        answer = await client.audio.transcriptions.create(
            file=(f"audio.{SENDABLE[job.kind or 'FLAC'][0]}", file), model=self.model, response_format="verbose_json",
            timestamp_granularities=["segment"], extra_body={"hotwords": self.args.hotwords} if self.args.hotwords else None,
            **options,
        )  # fmt: skip
        found = answer.to_dict() if isinstance(answer, TranscriptionVerbose) else {}
        if missing := sorted({"text", "duration", "language", "segments"} - found.keys()):
            raise ValueError(f"the server has answered without {', '.join(missing)}; is it this project's, of this version?")
        return found | {"duration": float(answer.duration)}


# --- The server


def is_local(url: str) -> bool:
    return urlsplit(url).hostname in LOCAL


def served_model(url: str, api_key: str) -> str | None:
    """The name of the model that answers there; None if nothing listens.

    Raises:
        openai.OpenAIError: something else than an answer came, or none in time
    """
    http = openai.DefaultHttpxClient(trust_env=not is_local(url))
    with openai.OpenAI(base_url=url, api_key=api_key, max_retries=2, timeout=CONNECT_S, http_client=http) as client:
        try:
            return client.models.list().data[0].id
        except openai.APITimeoutError:
            raise
        except openai.APIConnectionError:
            return None


@contextmanager
def model_at(url: str, api_key: str) -> Iterator[str]:
    """The served model's name. Where nothing listens on this machine, a server is started, and stopped in the end.

    Raises:
        RuntimeError, openai.OpenAIError: there is no server
    """
    if model := served_model(url, api_key):
        yield model
        return
    if not is_local(url):
        raise RuntimeError(f"no server answers at {url}; start it there, or leave --url out and one is started here")
    port = urlsplit(url).port or 80
    print(f"no server answers at {url}: starting one (log: {LOG})", flush=True)
    settings = {"HOST": "127.0.0.1", "PORT": str(port), "API_KEY": "EMPTY"}  # nobody else reaches it: it needs no key
    with LOG.open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "server" / "serve.py")], env=os.environ | settings,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        if not wait(server, port):
            last = "\n".join(LOG.read_text(errors="replace").splitlines()[-5:])
            raise RuntimeError(f"the server did not start; the whole log is in {LOG}, and ends with\n{last}")
        yield served_model(url, api_key) or ""
    finally:
        stop(server)
        print("the server is stopped", flush=True)


# --- The command


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a recording, a video, or a folder of them")
    parser.add_argument("--formats", default="txt,srt", help=f"some of {','.join(FORMATS)} (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write into this folder, in the folders' structure")
    parser.add_argument("--embed", action="store_true", help="put the audio into the HTML page itself")
    parser.add_argument("--overwrite", action="store_true", help="transcribe again what is done")
    parser.add_argument("--language", help="what is spoken, such as en or zh")
    parser.add_argument("--prompt", help="text that goes before, for its names and its style")
    parser.add_argument("--hotwords", help="names and words to expect, apart by commas")
    parser.add_argument("--url", default="http://localhost:8300/v1", help="the server (default: %(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY") or "EMPTY", help="default: OPENAI_API_KEY")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="files at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="for one file (default: %(default)s s)")
    args = parser.parse_args()
    args.formats = args.formats.replace(",", " ").split()
    if unknown := set(args.formats) - set(FORMATS):
        parser.error(f"--formats: {', '.join(sorted(unknown))}; expected some of {','.join(FORMATS)}")
    if not args.formats or args.concurrency < 1 or args.timeout <= 0:
        parser.error("--formats needs a format, --concurrency a number from 1 on, --timeout one above 0")
    if args.embed and "html" not in args.formats:
        parser.error("--embed is for the HTML page; add html to --formats")
    if urlsplit(args.url).scheme not in ("http", "https"):
        parser.error(f"--url {args.url}: expected a URL such as http://localhost:8300/v1")
    try:
        args.jobs, args.done = plan(args.paths, args.out, args.formats, args.overwrite)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def report(batch: Batch, took_s: float) -> None:
    """What went wrong, a line each, and how fast it was."""
    for line in sorted(batch.warnings):
        print(f"warning  {line}")
    for line in sorted(batch.failures):
        print(f"FAILED   {line}", file=sys.stderr)
    if batch.untried:
        print(f"{batch.untried} more not tried; start the server and run the same command again", file=sys.stderr)
    right = len(batch.jobs) - batch.untried - len(batch.failures)
    speed = f"; {batch.audio_s / took_s:.1f} times real time" if batch.audio_s else ""
    print(f"{right} of {len(batch.jobs)} transcribed: {batch.audio_s / 3600:.2f} h of audio in {took_s:.1f} s{speed}")


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: a server it has started is stopped
    try:
        args = arguments()
        if args.done:
            print(f"{args.done} done already; --overwrite transcribes them again")
        if not args.jobs:
            return 0
        with model_at(args.url, args.api_key) as model:
            batch, began = Batch(args.jobs, model, args), time.monotonic()
            asyncio.run(batch.run())
            took_s = time.monotonic() - began
    except (RuntimeError, openai.OpenAIError) as error:
        print(f"transcribe: {args.url}: {reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    report(batch, took_s)
    return 1 if batch.failures or batch.untried else 0


if __name__ == "__main__":
    sys.exit(main())
