"""Headless Chromium on the server's page: a microphone that plays a WAV, drops, downloads, and a connection to cut."""

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conftest import free_port
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

WAIT_S = 60  # on a busy machine
ALLOW, REFUSE = 1, 2  # Chromium's values of a content setting


class Page:
    """One browser with one tab. Its steps wait for what they need."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path):
        self.driver, self.downloads = driver, downloads

    def open(self, url: str) -> None:
        """Until the server's state is known."""
        self.driver.get(url)
        self.wait(lambda: self.state() != "connecting", "the page to know the server's state")

    def state(self) -> str:
        return self.find("#status").get_attribute("data-state")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        return self.driver.execute_script(script, selector)

    def text(self, selector: str) -> str:
        """What is there to be read: nothing of what is hidden."""
        return self.find(selector).text

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script that may await."""
        done = "const done = arguments[arguments.length - 1]"
        wrapped = f"{done}; (async () => {{ {script} }})().then(done, error => done({{failed: error.stack}}))"
        value = self.driver.execute_async_script(wrapped, *arguments)
        assert not (isinstance(value, dict) and "failed" in value), value["failed"]
        return value

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}; the page says:\n{self.text('body')}"
            time.sleep(0.05)
        return found

    def drop(self, path: Path) -> None:
        """A file out of the file manager onto the page."""
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "x": 200, "y": 300, "data": data})

    def download(self, actions: str, suffix: str) -> bytes:
        """What the button for this format saves. Chromium makes an empty file of that name first, and writes into another."""
        before = set(self.downloads.iterdir())
        self.click(f"{actions} [data-format={suffix}]")

        def saved() -> list[Path]:
            return [path for path in self.downloads.glob(f"*.{suffix}") if path not in before and path.stat().st_size]

        return self.wait(saved, f"a download of {suffix}")[0].read_bytes()

    def frames(self) -> list[dict]:
        """The events that came over WebSockets since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [
            json.loads(message["params"]["response"]["payloadData"])
            for message in messages
            if message["method"] == "Network.webSocketFrameReceived"
        ]

    def complaints(self) -> list[str]:
        """What the console got since the last call: faults in scripts, and what the page's policy has stopped."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if "Failed to load resource" not in message]

    def resize(self, width: int, height: int, scale: float = 1, mobile: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@contextmanager
def browse(folder: Path, microphone: Path | None = None, setting: int = ALLOW, language: str = "en-US") -> Iterator[Page]:
    """A fresh browser, in whose microphone a WAV is played once, from when the page listens."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program and driver, "no chromium and chromedriver: run tests/chromium.sh"
    downloads = folder / "downloads"
    downloads.mkdir(exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-proxy-server",
                     "window-size=1100,850", f"accept-lang={language}", "use-fake-device-for-media-stream",
                     "autoplay-policy=no-user-gesture-required"):  # fmt: skip
        options.add_argument(f"--{argument}")
    if microphone:
        options.add_argument(f"--use-file-for-fake-audio-capture={microphone}%noloop")
    options.add_experimental_option(
        "prefs",
        {
            "profile.default_content_setting_values.media_stream_mic": setting,
            "download.default_directory": str(downloads),
            "intl.accept_languages": language,
        },
    )
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Page(chrome, downloads)
    finally:
        chrome.quit()


class Relay:
    """A port that leads to another, until it is cut."""

    def __init__(self, target: int):
        self.port, self.target = free_port(), target
        self.sockets: list[socket.socket] = []
        self.listener: socket.socket | None = None
        self.restore()

    def restore(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> None:
        """Ends all connections at once, as a pulled cable's other end would, and takes no more."""
        for one in (self.listener, *self.sockets):
            with_shutdown(one)
        self.sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:  # cut
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            self.sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass  # the other side is gone, as below
        with_shutdown(source)
        with_shutdown(sink)


def with_shutdown(one: socket.socket) -> None:
    """Closes a socket that another thread may be waiting on."""
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more
    one.close()
