"""A headless Chromium that looks at the server's page, driven by the WebDriver protocol.

https://www.w3.org/TR/webdriver2
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
KEYS = {
    "left": "\ue012",
    "up": "\ue013",
    "right": "\ue014",
    "down": "\ue015",
    "shift": "\ue008",
    "enter": "\ue007",
    "tab": "\ue004",
}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""What https://www.w3.org/TR/webdriver2/#elements calls elements."""


class Browser:
    """A headless Chromium, driven by the WebDriver protocol."""

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None, "chromium is not installed"
        assert DRIVER is not None, "chromedriver is not installed"
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        told = folder / "chromedriver.log"
        with open(told, "wb") as file:
            self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=file, stderr=subprocess.STDOUT)
        self.session = ""
        try:
            self.root = f"http://127.0.0.1:{told_port(told, self.driver, r'successfully on port ([0-9]+)')}"
            arguments = [
                "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--force-color-profile=srgb", "--window-size=1280,900",
                f"--user-data-dir={folder / 'profile'}",
            ]  # fmt: skip
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
                "goog:loggingPrefs": {"browser": "ALL"},
                "timeouts": {"script": 60_000, "pageLoad": 60_000},
            }
            self.session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            self.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.session:
            self._do("DELETE", "")
        self.driver.terminate()
        self.driver.wait(30)

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.root + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(json.load(error)["value"]["message"]) from None

    def _do(self, method: str, path: str, **content: Any) -> Any:
        return self._ask(method, f"/session/{self.session}{path}", content if method == "POST" else None)

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self._do("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, address: str) -> None:
        self.errors()
        self._do("POST", "/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        return self._do("POST", "/execute/sync", script=script, args=arguments)

    def value(self, expression: str, *arguments: Any) -> Any:
        return self.run(f"return {expression}", *arguments)

    def until(self, expression: str, seconds: float = 60) -> Any:
        """Waits until an expression is true; says its value."""
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, (
                f"not within {seconds} s: {expression}\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.05)
        return found

    def text(self, css: str) -> str:
        return self.value("document.querySelector(arguments[0]).innerText", css)

    def _element(self, css: str) -> str:
        return self._do("POST", "/element", using="css selector", value=css)[ELEMENT]

    def click(self, css: str) -> None:
        self._do("POST", f"/element/{self._element(css)}/click")

    def type(self, css: str, text: str) -> None:
        self._do("POST", f"/element/{self._element(css)}/value", text=text)

    def press(self, *keys: str, shift: bool = False) -> None:
        """On whatever has the focus."""
        actions = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        if shift:
            edge = {"value": KEYS["shift"]}
            actions = [{"type": "keyDown"} | edge, *actions, {"type": "keyUp"} | edge]
        self._do("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def move(self, x: int, y: int, click: bool = False) -> None:
        """The pointer, to a pixel of the picture."""
        left, top, scale = self.value(
            "(() => { const canvas = document.getElementById('canvas'); canvas.scrollIntoView({block: 'center'});"
            "const box = canvas.getBoundingClientRect(); return [box.left, box.top, box.width / canvas.width]; })()"
        )
        place = {"x": round(left + (x + 0.5) * scale), "y": round(top + (y + 0.5) * scale)}
        actions: list[dict[str, Any]] = [{"type": "pointerMove", "duration": 0} | place]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._do("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": actions}])

    def pixels(self) -> np.ndarray:
        """What the canvas shows, H x W x 3."""
        url = self.value("document.getElementById('canvas').toDataURL('image/png')")
        return opened(base64.b64decode(url.partition(",")[2]))

    def errors(self) -> list[str]:
        """Of the console since the last call."""
        return [each["message"] for each in self._do("POST", "/se/log", type="browser") if each["level"] == "SEVERE"]

    def downloaded(self, name: str) -> bytes:
        """A file that the page has saved; it is gone then."""
        file, end = self.downloads / name, time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < end, f"{name} is not among {os.listdir(self.downloads)}"
            time.sleep(0.05)
        content = file.read_bytes()
        file.unlink()
        return content

    def give(self, file: Path) -> None:
        """Chooses a picture and waits for its segments."""
        self.type("#input", str(file))
        self.found()

    def found(self) -> None:
        self.until("!document.getElementById('panel').hidden")
        self.until("/ in .* s$/.test(document.getElementById('status').textContent)")


def told_port(log: Path, process: subprocess.Popen[bytes], pattern: str) -> int:
    """Waits for a line in what a process has written."""
    end = time.monotonic() + 180
    while not (found := re.search(pattern, log.read_text(errors="replace"))):
        assert process.poll() is None, log.read_text(errors="replace")
        assert time.monotonic() < end, f"silent: {log.read_text(errors='replace')}"
        time.sleep(0.1)
    return int(found[1])


def opened(content: bytes) -> np.ndarray:
    """A picture's pixels, H x W x 3."""
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))
