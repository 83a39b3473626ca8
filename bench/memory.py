"""How far a process's memory rises, by Linux's own mark, so that no moment is missed."""

from pathlib import Path


class Peak:
    """Resident memory of a process above what it is at the beginning."""

    def __init__(self, pid: int):
        self.status = Path(f"/proc/{pid}/status")
        self.idle = self._read("VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # sets the mark to the present

    def _read(self, name: str) -> int:
        line = next(line for line in self.status.read_text().splitlines() if line.startswith(f"{name}:"))
        return 1024 * int(line.split()[1])

    @property
    def rise(self) -> int:
        """Bytes, of the highest since then."""
        return self._read("VmHWM") - self.idle
