"""More requests than the server takes: server/glmasr_admission.py alone, under uvicorn, and in the real server."""

import asyncio
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from clients import MODEL, TRANSCRIBE, WAVS, audio_part, expected_text
from conftest import Server, free_port, run_server

import glmasr_admission
import serve
from glmasr_admission import PLACE_BYTES, Admission, Message, Receive, Send

HEALTH_LIMIT_S = 1.0
REQUESTS, PLACES = 300, 8

# --- the middleware alone ---------------------------------------------------------------------------


def admission(monkeypatch: pytest.MonkeyPatch, places: int, app: Callable[..., Awaitable[None]]) -> Admission:
    monkeypatch.setenv("MAX_IN_FLIGHT", str(places))
    return Admission(app)


def scope(method: str = "POST", processes: int | None = None, body_bytes: int | None = None) -> Message:
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_server_count=processes)))
    headers = [] if body_bytes is None else [(b"content-length", str(body_bytes).encode())]
    return {"type": "http", "method": method, "headers": headers, "app": app}


async def one_body() -> Message:
    return {"type": "http.request", "body": b"{}", "more_body": False}


class Answer(list[Message]):
    """What was sent to a client."""

    async def send(self, message: Message) -> None:
        self.append(message)

    @property
    def status(self) -> int | None:
        return self[0]["status"] if self else None

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self[0]["headers"])


class Gate:
    """An application whose requests stay until they are let go."""

    def __init__(self):
        self.open = asyncio.Event()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        await self.open.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def statuses_when_full(middleware: Admission, scopes: list[Message], gate: Gate) -> list[int | None]:
    """The answers to requests sent in this order, none of which has ended: None where it was let in."""

    async def send_all() -> list[int | None]:
        answers = [Answer() for _ in scopes]
        tasks = []
        for request, answer in zip(scopes, answers, strict=True):
            tasks.append(asyncio.create_task(middleware(request, one_body, answer.send)))
            await settle()
        found = [answer.status for answer in answers]
        gate.open.set()
        await asyncio.gather(*tasks)
        assert middleware.taken == 0
        return found

    return asyncio.run(send_all())


def test_requests_beyond_the_places_are_refused(monkeypatch):
    gate = Gate()
    assert statuses_when_full(admission(monkeypatch, 2, gate), [scope()] * 4, gate) == [None, None, 503, 503]


def test_places_come_back_when_requests_end_fail_or_are_cancelled(monkeypatch):
    async def run() -> None:
        async def fails(*_) -> None:
            raise ConnectionResetError

        failing = admission(monkeypatch, 1, fails)
        with pytest.raises(ConnectionResetError):
            await failing(scope(), one_body, Answer().send)
        assert failing.taken == 0

        staying = admission(monkeypatch, 1, Gate())
        task = asyncio.create_task(staying(scope(), one_body, Answer().send))
        await settle()
        assert staying.taken == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert staying.taken == 0

    asyncio.run(run())


def test_only_posts_take_places(monkeypatch):
    gate = Gate()
    others = [scope("GET"), scope("HEAD"), scope("OPTIONS"), {"type": "websocket"}, {"type": "lifespan"}]
    found = statuses_when_full(admission(monkeypatch, 1, gate), [scope(), *others, scope()], gate)
    assert found == [None] * 6 + [503]


def test_the_places_are_divided_over_the_api_processes(monkeypatch):
    for processes, share in ((None, 7), (1, 7), (2, 4), (3, 3), (9, 1)):
        gate = Gate()
        found = statuses_when_full(admission(monkeypatch, 7, gate), [scope(processes=processes)] * 8, gate)
        assert found.count(None) == share


@pytest.mark.parametrize(
    ("places", "body_bytes", "found"),
    [
        (4, (2 * PLACE_BYTES, PLACE_BYTES - 1, PLACE_BYTES - 1), [None, None, 503]),
        (4, (0, 0, 2 * PLACE_BYTES, 0), [None, None, 503, None]),
        (4, (2**40, 0), [None, 503]),  # takes all places, and is let in where nothing else is there
        (4, (0, 2**40), [None, 503]),
    ],
)
def test_a_large_body_takes_several_places(monkeypatch, places, body_bytes, found):
    gate = Gate()
    scopes = [scope(body_bytes=size) for size in body_bytes]
    assert statuses_when_full(admission(monkeypatch, places, gate), scopes, gate) == found


def test_a_refusal_says_why_and_when_to_come_back(monkeypatch):
    for took_s, retry_after_s in ((0.0, 1), (0.4, 1), (6.2, 7), (4000.0, 60)):
        middleware = admission(monkeypatch, 5, Gate())
        middleware.taken, middleware.last_took_s = 5, took_s
        answer = Answer()
        asyncio.run(middleware(scope(), one_body, answer.send))
        said = f"the server is full: it takes 5 requests at once (MAX_IN_FLIGHT); try again in {retry_after_s} s"
        assert answer.headers[b"retry-after"] == str(retry_after_s).encode()
        error = {"message": said, "type": "ServiceUnavailableError", "param": None, "code": 503}
        assert json.loads(answer[1]["body"]) == {"error": error}


def test_a_refused_client_has_its_answer_before_its_body_is_read(monkeypatch):
    middleware, answer, had = admission(monkeypatch, 1, Gate()), Answer(), []
    middleware.taken = 1

    async def receive() -> Message:
        had.append(len(answer))
        return {"type": "http.request", "body": b"x" * 65536, "more_body": len(had) < 9}

    asyncio.run(middleware(scope(), receive, answer.send))
    assert had == [2] * 9  # head and body of the answer, and only then the nine parts
    assert [message.get("more_body", False) for message in answer[1:]] == [True, False]


def test_bodies_that_arrive_together_leave_time_for_others(monkeypatch):
    async def parse(scope: Message, receive: Receive, send: Send) -> None:
        await receive()
        time.sleep(0.005)

    async def run() -> float:
        middleware, longest = admission(monkeypatch, 200, parse), 0.0
        requests = asyncio.gather(*(middleware(scope(), one_body, Answer().send) for _ in range(200)))
        while not requests.done():
            began = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - began)
        return longest

    assert asyncio.run(run()) < 0.2  # a second where nothing divides it


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_number_of_places_that_is_none_is_named(value: str):
    with pytest.raises(ValueError, match=f"^MAX_IN_FLIGHT={value}: expected a number of requests, 1 or more$"):
        serve.check_limits(serve.LIMITS | {"MAX_IN_FLIGHT": value})


# --- under uvicorn ----------------------------------------------------------------------------------


@contextmanager
def full_uvicorn(monkeypatch: pytest.MonkeyPatch, protocol: str) -> Iterator[int]:
    """The port of a server without a free place."""
    middleware = admission(monkeypatch, 1, Gate())
    middleware.taken = 1

    async def app(request: Message, receive: Receive, send: Send) -> None:
        await middleware(request | {"app": scope()["app"]}, receive, send)

    config = uvicorn.Config(app, port=free_port(), http=protocol, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield config.port
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("protocol", ["httptools", "h11"])
def test_clients_in_the_midst_of_sending_get_their_refusal(monkeypatch, protocol):
    with full_uvicorn(monkeypatch, protocol) as port:
        for headers in ({}, {"Connection": "close"}):
            for _ in range(10):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
                for _ in range(1 if headers else 3):  # on one connection, where it is kept
                    connection.request("POST", "/v1/chat/completions", b"x" * 8_000_000, headers)
                    response = connection.getresponse()
                    assert response.status == 503 and json.load(response)["error"]["code"] == 503
                connection.close()


# --- the real server --------------------------------------------------------------------------------

# Asks for /health every 100 ms until its input ends; then says how long the answers took. A process of its own, so that
# it does not wait for the threads that send.
POLL = """
import http.client, sys, threading, time
took, ended = [], threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
while not ended.wait(0.1):
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    took.append(time.monotonic() - began)
    connection.close()
print(*took)
"""


@pytest.fixture(scope="module")
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of eight places, with so many API processes."""
    log = tmp_path_factory.mktemp("overload") / "server.log"
    with run_server(log, "--api-server-count", str(request.param), DTYPE="float32", MAX_IN_FLIGHT=str(PLACES)) as running:
        yield running


@contextmanager
def health_polled(server: Server) -> Iterator[list[float]]:
    """Fills the list, in the end, with the seconds that each answer of /health took meanwhile."""
    took: list[float] = []
    command = [sys.executable, "-c", POLL, server.url.rpartition(":")[2]]
    poller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield took
    output, _ = poller.communicate()
    assert poller.returncode == 0
    took += map(float, output.split())


def requests(number: int) -> list[tuple[str, dict, str]]:
    """So many requests, chat and transcription in turn: the route, what httpx sends, and the expected text."""
    wavs = [wav for wav in WAVS if wav.stem in ("en_french", "zh_birthday")]
    made = []
    for i in range(number):
        wav = wavs[i // 2 % len(wavs)]
        if i % 2:
            form = {"files": {"file": (wav.name, wav.read_bytes())}, "data": {"model": MODEL, "temperature": "0"}}
            made.append(("/v1/audio/transcriptions", form, expected_text(wav)))
        else:
            content = [audio_part(wav.read_bytes()), {"type": "text", "text": TRANSCRIBE}]
            body = {"model": MODEL, "temperature": 0, "messages": [{"role": "user", "content": content}]}
            made.append(("/v1/chat/completions", {"json": body}, expected_text(wav)))
    return made


def text_of(response: httpx.Response) -> str:
    answer = response.json()
    return (answer["text"] if "text" in answer else answer["choices"][0]["message"]["content"]).strip()


async def post_at_once(server: Server, wanted: list[tuple[str, dict, str]]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=300) as client:
        return await asyncio.gather(*(client.post(route, **sent) for route, sent, _ in wanted))


@pytest.mark.parametrize("small", [1, 2], indirect=True, ids=["one API process", "two API processes"])
def test_a_burst_is_answered_or_refused_and_health_goes_on(small: Server):
    wanted = requests(REQUESTS)
    with health_polled(small) as health_s:
        responses = asyncio.run(post_at_once(small, wanted))
    for response, (_, _, text) in zip(responses, wanted, strict=True):
        if response.status_code == 200:
            assert text_of(response) == text
        else:
            assert response.status_code == 503
            assert 1 <= int(response.headers["retry-after"]) <= glmasr_admission.MAX_RETRY_AFTER_S
            assert f"it takes {PLACES} requests at once" in response.json()["error"]["message"]
    answered = sum(response.status_code == 200 for response in responses)
    print(f"{answered} of {REQUESTS} answered; /health took {max(health_s):.3f} s at most, of {len(health_s)} times")
    assert PLACES <= answered < REQUESTS
    assert max(health_s) < HEALTH_LIMIT_S

    assert [text_of(response) for response in asyncio.run(post_at_once(small, wanted[:4]))] == [w[2] for w in wanted[:4]]


@pytest.mark.parametrize("small", [1], indirect=True, ids=["one API process"])
def test_openais_client_comes_back_until_it_is_answered(small: Server):
    wav = next(wav for wav in WAVS if wav.stem == "en_french")
    messages = [{"role": "user", "content": [audio_part(wav.read_bytes())]}]

    async def ask_all() -> list:
        async with openai.AsyncOpenAI(base_url=f"{small.url}/v1", api_key="EMPTY", max_retries=50) as client:
            create = client.chat.completions.with_raw_response.create
            return await asyncio.gather(*(create(model=MODEL, messages=messages, temperature=0) for _ in range(3 * PLACES)))

    answers = asyncio.run(ask_all())
    assert {answer.parse().choices[0].message.content for answer in answers} == {expected_text(wav)}
    assert sum(answer.retries_taken > 0 for answer in answers) >= PLACES


@pytest.mark.parametrize("small", [1], indirect=True, ids=["one API process"])
def test_clients_that_leave_free_their_places(small: Server):
    async def leave() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post_at_once(small, requests(8 * PLACES)), 0.3)

    asyncio.run(leave())
    deadline = time.monotonic() + 10
    wanted = requests(2)
    while 503 in (found := [response.status_code for response in asyncio.run(post_at_once(small, wanted))]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert found == [200, 200]
