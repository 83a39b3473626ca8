"""Makes the pictures of the page that the READMEs show: a real server, a real browser, and wavs/ for its microphone.

    python docs/screenshots.py      (Chinese letters need a font for them, such as Debian's fonts-noto-cjk)
"""

import base64
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import Page, browse  # noqa: E402
from conftest import run_server  # noqa: E402

DESKTOP, PHONE = (960, 720), (390, 760)
SPOKEN, RECORDING = ROOT / "wavs" / "zh_birthday.wav", ROOT / "wavs" / "en_long.wav"
MAX_BYTES = 200_000


def save(page: Page, name: str) -> None:
    shot = page.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    picture = base64.b64decode(shot["data"])
    assert len(picture) < MAX_BYTES, f"{name} has {len(picture)} bytes"
    (ROOT / "docs" / name).write_bytes(picture)
    print(f"docs/{name}: {len(picture)} bytes")


def dark(page: Page) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def live(folder: Path, url: str, name: str, wav: Path, language: str, sentences: int, phone: bool) -> None:
    """While words are being heard after so many sentences."""
    with browse(folder, microphone=wav, language=language) as page:
        page.resize(*(PHONE if phone else DESKTOP), scale=2 if phone else 1, mobile=phone)
        if phone:
            dark(page)
        page.open(url)
        page.click("#microphone")
        page.wait(lambda: len(page.texts("#firm p")) >= sentences and any(page.texts("#pending span")), "words being heard")
        time.sleep(0.3)
        save(page, name)


def recording(folder: Path, url: str) -> None:
    with browse(folder) as page:
        page.resize(*DESKTOP)
        page.open(url)
        page.drop(RECORDING)
        page.wait(lambda: page.text("#work-state").startswith("Done"), "the transcript")
        page.click("#segments li:nth-child(4) button")
        time.sleep(1)
        save(page, "page-recording.png")


def main() -> None:
    with tempfile.TemporaryDirectory() as name, run_server(Path(name) / "server.log", DTYPE="float32") as server:
        folder = Path(name)
        live(folder, server.url, "page-live.png", RECORDING, "en-US", sentences=4, phone=False)
        live(folder, server.url, "page-phone.png", SPOKEN, "zh-CN", sentences=1, phone=True)
        recording(folder, server.url)


if __name__ == "__main__":
    main()
