"""README.md and README_CN.md: what they tell users to run runs, or it says where it does; both say the same."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import serve
from clients import MODEL, TRANSCRIBE, WAVS, audio_part, expected_text, wav_bytes
from conftest import CHECKPOINT, ROOT, Server, free_port
from safetensors import safe_open

READMES = [ROOT / "README.md", ROOT / "README_CN.md"]
LIMIT_S = 240  # of one block
SERVER_URL, FILES_URL = "http://localhost:8300", "http://localhost:8000"

# Commands that do not run here → the file that runs them and how, or None with the reason why nothing does.
DOCKER_TEST = "tests/docker/run.sh"
ELSEWHERE = {
    "make demo": None,  # needs port 8300 and makes an environment: by hand, from a fresh clone
    "make test": (".ci/run", "for stage in test docker-test"),
    "make serve": None,  # does not end; tests/conftest.py starts the same server/serve.py
    "MODEL=./model make serve": None,  # the full weights are to be had on the hub only
    "MODEL=./GLM-ASR-Nano-2512 make serve": None,
    "source .venv/bin/activate": None,  # the tests run in that environment
    "python server/server_ws.py --upstream http://localhost:8300 --port 8301": None,  # does not end; tests/test_live_limits.py
    "python -m http.server 8000 --directory wavs": None,  # does not end; `served_files` runs it on a free port
    "docker build -t vllm-glmasr:latest .": (DOCKER_TEST, "docker build"),
    "docker-compose up -d": (DOCKER_TEST, "$compose config --quiet"),  # itself only on a machine with a GPU
    "docker-compose --profile cpu up -d": (DOCKER_TEST, "$compose --profile cpu up -d"),
    # only on a machine with a GPU; the docker test's compose starts the same image
    "docker run -d --name vllm-glmasr --gpus all --ipc host --shm-size 8gb -p 8300:8300 vllm-glmasr:latest": None,
}


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def is_elsewhere(line: str) -> bool:
    """True for lines that do not run in `test_a_command_gives_the_expected_text`."""
    return line in ELSEWHERE or line.startswith("hf download ") or "server/serve.py" in line


def rows(path: Path, *first_cells: str) -> list[list[str]]:
    """The cells of the table whose first heading is one of `first_cells`, without the heading."""
    text = path.read_text(encoding="utf-8")
    heading = "|".join(first_cells)
    table = re.search(rf"^\| (?:{heading}) \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, f"{path.name} has no table that begins with {heading}"
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table[1].splitlines()]


LINES = [line for block in blocks(READMES[0], "bash") for line in block.splitlines()]
RUNNABLE = [block for block in blocks(READMES[0], "bash") if not any(map(is_elsewhere, block.splitlines()))]
SNIPPETS = blocks(READMES[0], "python")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served_files() -> Iterator[str]:
    """The samples as README's http.server serves them, on a free port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", "wavs"],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not listens(port):
            assert process.poll() is None and time.monotonic() < deadline, "http.server does not answer"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def run(arguments: list[str], text: str | None = None) -> str:
    """What a command prints, run from the root with this interpreter's environment active."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "no_proxy": "localhost,127.0.0.1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        arguments, input=text, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=LIMIT_S
    )
    assert done.returncode == 0, f"{text}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def answer(printed: str) -> str:
    """The text in a server's answer to curl: JSON of chat or transcription, or a stream."""
    if printed.startswith("data: "):
        events = [line.removeprefix("data: ") for line in printed.splitlines() if line]
        assert events[-1] == "[DONE]", printed
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    body = json.loads(printed)
    return body["text"] if "text" in body else body["choices"][0]["message"]["content"]


def expected_answer(block: str) -> str:
    """What a block's request must bring: the texts beside the samples it names, or the description that README quotes."""
    if "Please describe" in block:
        return re.search(r"`((?:A man|A woman) speaks .*)`", READMES[0].read_text(encoding="utf-8"))[1]
    named = re.findall(r"(\w+)\.wav", block)
    assert named, f"no sample is named in:\n{block}"
    return " ".join(expected_text(ROOT / "wavs" / f"{name}.wav") for name in named)


def words(text: str) -> str:
    """Letters alone: where a recording is cut decides on full stops and spaces."""
    return re.sub(r"\W", "", text.lower())


def title(block: str) -> str:
    return next(line for line in block.splitlines() if not line.startswith(("from", "import", "#")) and line)[:70]


@pytest.mark.parametrize("block", RUNNABLE, ids=title)
def test_a_command_gives_the_expected_text(block: str, server: Server) -> None:
    with served_files() as files_url:
        script = block.replace("test_vllm_api.py\n", f"test_vllm_api.py --base-url {SERVER_URL}/v1\n")  # its default
        script = script.replace("transcribe.py ", f"transcribe.py --overwrite --url {SERVER_URL}/v1 ")
        script = script.replace(SERVER_URL, server.url).replace(FILES_URL, files_url)
        printed = run(["bash", "-euo", "pipefail"], script)
    if block.startswith("curl "):
        assert answer(printed) == expected_answer(block)
    elif "test_vllm_api.py" in block:
        assert f"{len(WAVS)} of {len(WAVS)} right" in printed and "1 of 1 right" in printed
        assert all(expected_text(wav) in printed for wav in WAVS)
    elif "live_captions.py" in block:
        assert printed.strip() == expected_answer(block)
    elif "transcribe.py" in block:
        for wav in WAVS:
            written = Path("/tmp/transcripts", wav.stem)
            assert words(written.with_suffix(".txt").read_text()) == words(expected_text(wav))
            assert written.with_suffix(".srt").is_file() and written.with_suffix(".html").is_file()
    elif "hf_demo.py" in block:
        assert f"    {expected_answer(block)}\n" in printed and "0 answers differ" in printed
    else:
        assert "registry.py --check" in block and "registry: GLM-ASR is in" in printed


@pytest.mark.parametrize("snippet", SNIPPETS, ids=title)
def test_a_python_snippet_prints_the_expected_text(snippet: str, server: Server) -> None:
    script = snippet.replace(SERVER_URL, server.url)
    assert run([sys.executable, "-"], script).strip() == expected_answer(snippet)


def test_every_kind_of_use_has_a_command_that_runs() -> None:
    for part in ("input_audio", "data:audio/wav", "/en_french.wav\"}}", "<|audio|><|audio|>", "describe", '"stream": true',
                 "/v1/audio/transcriptions", "test_vllm_api.py", "transcribe.py", "live_captions.py", "hf_demo.py", "registry.py --check"):  # fmt: skip
        assert any(part in block for block in RUNNABLE), f"no command of README's that runs here has {part!r}"
    for part in ("chat.completions", "audio.transcriptions", "AutoModelForCausalLM"):
        assert any(part in snippet for snippet in SNIPPETS), f"no snippet of README's has {part!r}"


def test_commands_that_do_not_run_here_are_known_and_run_where_they_should() -> None:
    skipped = [block for block in blocks(READMES[0], "bash") if block not in RUNNABLE]
    assert all(is_elsewhere(line) for block in skipped for line in block.splitlines()), "a block mixes both kinds"
    for command, place in ELSEWHERE.items():
        assert command in LINES, f"{command!r} is no longer in README.md"
        if place:
            path, piece = place
            assert piece in (ROOT / path).read_text(), f"{path} does not run {command!r}"
    targets = re.findall(r"\bmake (?:[A-Z]+=\S+ )?([a-z-]+)", "\n".join(LINES))
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_server_commands_have_options_that_vllm_knows() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    commands = [line for line in LINES if "server/serve.py" in line]
    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = [parser.parse_args(shlex.split(command.partition("server/serve.py")[2])) for command in commands]
    assert parsed[0].allowed_media_domains == ["localhost", "media.example.com"]
    assert (parsed[1].port, parsed[1].max_model_len) == (8400, 8192)
    assert parsed[2].hf_overrides == {"pad_windows": False}
    assert len(parsed) == 3


def test_downloads_use_flags_that_hf_knows_and_overwrite_nothing_of_ours() -> None:
    commands = [shlex.split(line) for line in LINES if line.startswith("hf download ")]
    known = run(["hf", "download", "--help"])
    assert len(commands) == 2
    for command in commands:
        flags = {word for word in command if word.startswith("--")}
        assert all(flag in known for flag in flags), flags
    full, other = commands
    patterns = [full[i + 1] for i, word in enumerate(full) if word == "--include"]
    assert full[full.index("--local-dir") + 1] == "model"
    ours = [path.name for path in CHECKPOINT.iterdir() if path.is_symlink()] + ["config.json", "processor_config.json",
            "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"]  # fmt: skip
    assert not [name for name in ours for pattern in patterns if Path(name).match(pattern)]
    assert {"tokenizer.json", "model.safetensors.index.json", "model*.safetensors"} == set(patterns)
    assert not (ROOT / other[other.index("--local-dir") + 1]).is_file()


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_configuration_table_is_serve_pys(path: Path) -> None:
    table = {row[0].strip("`"): (row[2].strip("`"), row[1].strip("`")) for row in rows(path, "Setting", "设置")}
    assert {name: table[name] for name in serve.SETTINGS} == serve.SETTINGS
    assert {name for name, (option, _) in table.items() if option} == set(serve.SETTINGS)
    assert table["VLLM_CPU_KVCACHE_SPACE"][1] == serve.CPU_ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"]
    in_compose = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (ROOT / "docker-compose.yaml").read_text()))
    assert set(in_compose) == set(table)
    assert {name: default for name, (_, default) in table.items()} == in_compose


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_layout_names_what_is_in_the_tree(path: Path) -> None:
    layout = blocks(path, "text")[0]
    named = re.findall(r"[\w./-]+\.(?:py|sh|yaml|txt)|[\w/]+/(?=\s|$)|^Makefile|^dockerfile|^\.env|^LICENSE", layout, re.MULTILINE)
    assert len(named) > 15
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "server" / name).exists(), name


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = [re.sub(r"\W+", "-", heading.lower()) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


def test_both_languages_have_the_same_commands_and_structure() -> None:
    english, chinese = READMES
    for language in ("bash", "python", "json"):
        assert blocks(english, language) == blocks(chinese, language)
    text, other = (path.read_text(encoding="utf-8") for path in READMES)
    outlines = [re.findall(r"^(#+ |\||- |```\w*)", re.sub(r"(?m)^  .*\n", "", t), re.MULTILINE) for t in (text, other)]
    assert outlines[0] == outlines[1]
    words = [sorted(set(re.findall(r"`[^`\n]+`|\{\{\w+\}\}", re.sub(r"(?ms)^```.*?^```$", "", t)))) for t in (text, other)]
    assert words[0] == words[1]


def send(server: Server, content: list[dict]) -> str:
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": content}])
    return refused.value.body["message"]


def test_errors_say_what_readme_says(server: Server) -> None:
    def silence(seconds: float) -> bytes:
        return wav_bytes(np.zeros(round(seconds * 16000), np.float32))

    not_base64 = {"type": "input_audio", "input_audio": {"data": "!!!", "format": "wav"}}
    two = {"type": "text", "text": f"<|audio|><|audio|>{TRANSCRIBE}"}
    requests = [
        [audio_part(silence(0.05))],
        [audio_part(wav_bytes(np.zeros(330 * 8000, np.float32), 8000))],
        [not_base64],
        [audio_part(silence(1), "flac")],
        [audio_part(silence(1), "m4a")],
        [audio_part(silence(1)), two],
        [audio_part(silence(0.1))] * 65,
    ]
    for path in READMES:
        quoted = [row[1].strip("`").replace("\\|", "|") for row in rows(path, "Input", "输入")]
        for message, content in zip(quoted, requests, strict=True):
            assert message in send(server, content)
    example = json.loads(blocks(READMES[0], "json")[0])["error"]["message"]
    assert example == send(server, requests[0])


def test_the_size_of_the_bundled_checkpoint_is_right() -> None:
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        count = sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    assert all(f"{count / 1e6:.1f} M" in path.read_text(encoding="utf-8") for path in READMES)
