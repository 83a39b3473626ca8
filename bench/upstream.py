"""vLLM as released, beside the patched one: the same files but those that server/registry.py has edited."""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "server"))
import registry  # noqa: E402


def released_vllm(folder: Path) -> Path:
    """Fills `folder` with a package vllm of links to the installed one, our edits undone; to go first on PYTHONPATH.

    Raises:
        registry.RegistryError: the installed vLLM is not the one that registry.py knows
    """
    installed, package = registry.find_vllm(), folder / "vllm"
    ours = [package / target for target in registry.FILES.values()]
    shutil.copytree(installed, package, copy_function=lambda source, target: Path(target).symlink_to(source),
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    for path in ours:
        path.unlink(missing_ok=True)
    for relative in {edit.path for edit in registry.EDITS}:
        text = (installed / relative).read_text()
        for edit in registry.EDITS:
            if edit.path == relative:
                text = text.replace(edit.new, edit.old)
        (package / relative).unlink()
        (package / relative).write_text(text)
    return folder
