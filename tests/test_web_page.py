"""The server's page in a headless Chromium: with the real server, and with a made-up one for what a small model has not."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from bench.browser import CHROMIUM, DRIVER, KEYS, Browser, opened, told_port
from PIL import Image, ImageOps
from pycocotools import mask as reference
from pycocotools.coco import COCO

import maskfirst
from maskfirst.data.shapes import Shapes

WEB = Path(maskfirst.__file__).with_name("web")
pytestmark = pytest.mark.skipif(
    (CHROMIUM is None or DRIVER is None) and "CI" not in os.environ,
    reason="chromium or chromedriver is not installed (Debian: apt install chromium chromium-driver)",
)
CSP = "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
NAMES = [
    "Sky",
    "Road <img src=x onerror=alert(1)>",
    "Car 車両",
    "Person of a name that is much longer than any column",
    "سماء",
]
COLORS = [[70, 130, 180], [128, 64, 128], [200, 30, 30], [20, 160, 60], [90, 90, 0]]
SKY, ROAD, CAR, PERSON, ARAB = range(5)
HEIGHT, WIDTH = 60, 90


def boxed(height: int, width: int, y0: float, y1: float, x0: float, x1: float) -> np.ndarray:
    """A mask that is a box, in shares of the picture."""
    mask = np.zeros((height, width), bool)
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
    return mask


def scene_of(task: str, height: int, width: int) -> list[tuple[int, float, np.ndarray]]:
    """Class, score and mask of the segments that the stub finds in a picture."""
    road, first, second = ((0.6, 1, 0, 1), (0.7, 0.9, 0.1, 0.4), (0.7, 0.9, 0.5, 0.8))
    sky, road, first, second = (boxed(height, width, *box) for box in ((0, 0.4, 0, 1), road, first, second))
    if task == "panoptic":
        return [(SKY, 0.99, sky), (ROAD, 0.97, road & ~first & ~second), (CAR, 0.93, first), (CAR, 0.71, second)]
    if task == "instance":
        inner, unsure = boxed(height, width, 0.75, 0.85, 0.2, 0.3), boxed(height, width, 0.1, 0.3, 0.1, 0.3)
        return [(PERSON, 0.95, inner), (CAR, 0.9, first), (CAR, 0.62, second), (ARAB, 0.3, unsure)]
    return [(SKY, 1.0, sky), (ROAD, 1.0, road)]


def packed(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths as pycocotools has them."""
    rle: Any = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


class Stub(ThreadingHTTPServer):
    """A server that finds the same in every picture, and fails on demand."""

    daemon_threads = False
    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.key: str | None = None
        self.refusals: list[tuple[int, dict[str, str], bytes]] = []
        self.free = threading.Event()
        self.free.set()
        self.asked: list[tuple[str, dict[str, list[str]], bytes]] = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def refuse(self, status: int, code: str, message: str, **headers: str) -> None:
        """Says no to the next question."""
        content = {"error": {"code": code, "message": message}, "request_id": "number-7"}
        self.refusals.append(
            (status, {name.replace("_", "-"): value for name, value in headers.items()}, dumped(content))
        )

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Browsers leave when they like."""


def dumped(content: Any) -> bytes:
    return json.dumps(content).encode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5
    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, content: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        own = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "X-Request-ID": "number-1",
            "Connection": "close",
        }
        for name, value in (own | {"Content-Security-Policy": CSP, "Cache-Control": "no-store"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self.rfile.read(int(self.headers["Content-Length"])))

    def _handle(self, body: bytes) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        file = WEB / ("index.html" if path == "/" else path.removeprefix("/web/"))
        if path == "/" or (path.startswith("/web/") and file.parent == WEB):
            self._answer(file.read_bytes(), kind=KINDS[file.suffix])
            return
        self.server.asked.append((path, query, body))
        if self.server.key is not None and self.headers["Authorization"] != f"Bearer {self.server.key}":
            content = {"error": {"code": "unauthorized", "message": "send the server's key"}, "request_id": "number-4"}
            self._answer(dumped(content), 401)
            return
        if path != "/model":
            self.server.free.wait(30)
            if self.server.refusals:
                status, headers, content = self.server.refusals.pop(0)
                self._answer(content, status, **headers)
                return
        self._answer(
            dumped({"/model": self._model, "/predict": self._predict, "/points": self._points}[path](query, body))
        )

    def _model(self, query: dict[str, list[str]], body: bytes) -> Any:
        vocabulary = {
            "names": NAMES,
            "colors": COLORS,
            "things": [CAR, PERSON],
            "ids": [10 + each for each in range(len(NAMES))],
        }
        return {
            "name": "made-up",
            "tasks": ["semantic", "instance", "panoptic"],
            "task": "panoptic",
            "points": True,
            "limits": {"bytes": 20_000_000, "pixels": 25_000_000, "points": 1000},
            "vocabulary": vocabulary,
        }

    def _predict(self, query: dict[str, list[str]], body: bytes) -> Any:
        with Image.open(io.BytesIO(body)) as picture:
            width, height = ImageOps.exif_transpose(picture).size
        segments = []
        for index, score, mask in scene_of(query["task"][0], height, width):
            y, x = np.nonzero(mask)
            segments.append(
                {
                    "class": NAMES[index],
                    "index": index,
                    "category_id": 10 + index,
                    "score": score,
                    "share": float(mask.mean()),
                    "box": [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1],
                    "rle": packed(mask),
                }
            )
        return {
            "request_id": "number-2",
            "task": query["task"][0],
            "height": height,
            "width": width,
            "segments": segments,
        }

    def _points(self, query: dict[str, list[str]], body: bytes) -> Any:
        y, x = map(float, query["at"][0].split(","))
        return {
            "request_id": "number-3",
            "names": [*NAMES, "Tree"],
            "points": [{"y": y, "x": x, "probabilities": [0.05, 0.12, 0.6, 0.2, 0.02, 0.01]}],
        }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def stub(browser: Browser) -> Iterator[Stub]:
    with Stub() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield found
        browser.open("about:blank")
        found.free.set()
        found.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real one."""
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {name: value for name, value in os.environ.items() if name != "MASKFIRST_API_KEY"}
    command = [sys.executable, "-c", "from maskfirst.cli import main; main()", "serve", "camvid-small", "--port", "0"]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        yield f"http://127.0.0.1:{told_port(log, process, r'http://127[.]0[.]0[.]1:([0-9]+)')}"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A smooth one, all of whose colours differ from the overlay's."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    file = tmp_path / "street.png"
    Image.fromarray(np.stack([150 + x, 150 + y, 255 - x], -1).astype(np.uint8)).save(file)
    return file


@pytest.fixture
def page(browser: Browser, stub: Stub) -> Browser:
    """With the stub's model."""
    browser.open(stub.address)
    browser.until("!document.getElementById('tasks').hidden")
    return browser


@pytest.fixture
def shown(page: Browser, picture: Path) -> Browser:
    """With the panoptic segments of `picture`."""
    page.give(picture)
    return page


def toggle(page: Browser, index: int) -> None:
    page.click(f"#classes [data-index='{index}'] input")


def slide(page: Browser, name: str, value: int) -> None:
    script = "const slider = document.getElementById(arguments[0]); slider.value = arguments[1];"
    page.run(script + "slider.dispatchEvent(new Event('input'));", name, value)


def choose(page: Browser, task: str) -> None:
    page.run(f"document.querySelector('#tasks [value={task}]').click()")
    page.found()


def rows(page: Browser) -> list[list[str]]:
    """Name, count and share of the legend's entries."""
    return page.value(
        "[...document.querySelectorAll('#classes li')].map((row) => ['bdi', '.count', '.share'].map("
        "(css) => row.querySelector(css).textContent))"
    )


def test_the_overlay_is_in_the_colours_of_the_classes_and_the_opacity_asked_for(shown, picture):
    plain, painted = opened(picture.read_bytes()), shown.pixels()
    assert painted.shape == (HEIGHT, WIDTH, 3)
    inside = (slice(2, 20), slice(2, 80))
    assert np.abs(painted[inside] - (plain[inside] + np.array(COLORS[SKY])) / 2).max() <= 1.5
    assert (painted[30] == plain[30]).all(), "no segment"
    assert painted[23, 10].tolist() == COLORS[SKY], "the outline"
    assert painted[50, 20].tolist() != painted[50, 60].tolist(), "two cars"
    shown.click("#outlined")
    assert shown.pixels()[23, 10].tolist() != COLORS[SKY]
    slide(shown, "opacity", 0)
    assert (shown.pixels() == plain).all()
    assert shown.errors() == []


def test_the_legend_counts_and_switches_classes(shown, picture):
    plain = opened(picture.read_bytes())
    assert rows(shown) == [[NAMES[SKY], "1", "40.0%"], [NAMES[ROAD], "1", "28.0%"], [NAMES[CAR], "2", "12.0%"]]
    assert shown.text("#rest") == "Without a name: 20.0%"
    before = shown.pixels()
    toggle(shown, SKY)
    after = shown.pixels()
    assert (after[:24] == plain[:24]).all()
    assert (after[24:] == before[24:]).all()
    shown.move(10, 10)
    assert "No segment" in shown.text("#readout")
    toggle(shown, SKY)
    assert (shown.pixels() == before).all()
    shown.click("#none")
    assert (shown.pixels() == plain).all()
    shown.click("#all")
    assert (shown.pixels() == before).all()
    assert shown.errors() == []


def test_names_are_text_and_never_markup(shown):
    assert shown.value("document.querySelectorAll('img').length") == 0
    shown.move(45, 57)
    assert NAMES[ROAD] in shown.text("#readout")
    assert NAMES[ROAD] in shown.text("#tip")


def test_the_pointer_reads_name_and_score(shown):
    shown.move(20, 48)
    assert shown.text("#tip") == f"{NAMES[CAR]} 93%"
    assert "x 20, y 48" in shown.text("#readout")
    assert shown.value("document.querySelector('#classes .under').dataset.index") == str(CAR)
    shown.move(60, 48)
    assert shown.text("#tip") == f"{NAMES[CAR]} 71%"


def test_smaller_instances_are_in_front_and_unsure_ones_wait(shown):
    choose(shown, "instance")
    assert [row[0] for row in rows(shown)] == [NAMES[CAR], NAMES[PERSON]]
    shown.move(22, 48)
    assert shown.text("#tip") == f"{NAMES[PERSON]} 95%"
    shown.move(14, 48)
    assert shown.text("#tip") == f"{NAMES[CAR]} 90%"
    toggle(shown, PERSON)
    shown.move(22, 48)
    assert shown.text("#tip") == f"{NAMES[CAR]} 90%", "what lies below it is seen"
    slide(shown, "least", 20)
    shown.until("document.querySelectorAll('#classes li').length === 3")
    shown.move(15, 10)
    assert shown.text("#tip") == f"{NAMES[ARAB]} 30%"
    assert shown.errors() == []


def test_a_click_asks_for_the_names_of_that_pixel_with_the_same_picture(shown, stub, picture):
    shown.move(33, 44, click=True)
    shown.until("document.querySelectorAll('#points-names li').length === 5")
    path, query, body = stub.asked[-1]
    assert (path, query["at"], body) == ("/points", ["44,33"], picture.read_bytes())
    told = shown.value("[...document.querySelectorAll('#points-names li')].map((row) => row.innerText.split('\\n'))")
    assert told == [
        [NAMES[2], "60.0%"],
        [NAMES[3], "20.0%"],
        [NAMES[1], "12.0%"],
        [NAMES[0], "5.0%"],
        [NAMES[4], "2.0%"],
    ]
    assert shown.value("document.querySelector('#points-names .track span').style.width") == "60%"
    assert shown.errors() == []


def test_the_keyboard_does_all_that_the_pointer_does(page, picture, stub):
    page.press("tab")
    focused = [page.value("document.activeElement.id || document.activeElement.value")]
    assert (
        page.value("getComputedStyle(document.activeElement.closest('label') ?? document.activeElement).outlineStyle")
        == "solid"
    )
    page.press("tab")
    focused.append(page.value("document.activeElement.id"))
    assert focused == ["panoptic", "choose"]
    page.give(picture)
    page.until("document.activeElement.id === 'another'")
    page.press("tab", "tab")
    assert page.value("document.activeElement.id") == "canvas"
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.until(f"document.getElementById('told').textContent === 'No segment, x {WIDTH // 2}, y {HEIGHT // 2}'")
    page.press("down", "left", shift=True)
    page.press("left", "down", "down")
    page.press("left", "left", "up", "right", shift=True)
    page.press("down", shift=True)
    page.until(f"document.getElementById('told').textContent === '{NAMES[CAR]}, 93%, x 24, y 42'")
    page.press("enter")
    page.until("document.querySelectorAll('#points-names li').length === 5")
    assert stub.asked[-1][1]["at"] == ["42,24"]
    page.press(*["left"] * 8, shift=True)
    page.until("document.getElementById('told').textContent.endsWith('x 0, y 42')")
    assert page.errors() == []


def test_a_drop_and_a_paste_are_pictures_too(page, picture):
    give = """
      const bytes = Uint8Array.from(atob(arguments[0]), (each) => each.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], arguments[1], {type: 'image/png'}));
      const how = {bubbles: true, cancelable: true};
      document.body.dispatchEvent(arguments[2] === 'drop'
        ? new DragEvent('drop', {...how, dataTransfer: data}) : new ClipboardEvent('paste', {...how, clipboardData: data}));
    """
    for kind in ("drop", "paste"):
        page.run(give, base64.b64encode(picture.read_bytes()).decode(), f"{kind}.png", kind)
        page.until(f"document.getElementById('file').textContent.startsWith('{kind}.png, {WIDTH}')")
        page.found()
        assert (page.pixels() != opened(picture.read_bytes())).any()
    assert page.errors() == []


def test_photos_are_shown_upright(page, picture, tmp_path):
    with Image.open(picture) as plain:
        exif = plain.getexif()
        exif[0x0112] = 6  # a quarter turn clockwise is needed
        plain.save(tmp_path / "turned.jpg", quality=95, exif=exif, subsampling=0)
    page.give(tmp_path / "turned.jpg")
    upright = np.rot90(opened(picture.read_bytes()), -1)
    page.click("#none")
    page.click("#outlined")
    assert np.abs(page.pixels().astype(int) - upright).max() < 20
    assert "on grey" not in page.text("#hint")


def test_segments_of_a_file_that_the_browser_cannot_draw_are_shown_on_grey(page, picture, tmp_path):
    with Image.open(picture) as plain:
        plain.save(tmp_path / "street.tiff")
    page.give(tmp_path / "street.tiff")
    assert "on grey" in page.text("#hint")
    toggle(page, SKY)
    assert len(np.unique(page.pixels()[:20].reshape(-1, 3), axis=0)) == 1
    page.click("#save-png")
    assert (opened(page.downloaded("street-panoptic.png")) == page.pixels()).all()


def test_what_is_saved_is_what_was_found(shown, tmp_path):
    toggle(shown, ROAD)
    shown.click("#save-png")
    assert (opened(shown.downloaded("street-panoptic.png")) == shown.pixels()).all()
    shown.click("#save-coco")
    (tmp_path / "coco.json").write_bytes(shown.downloaded("street-panoptic.json"))
    coco: Any = COCO(str(tmp_path / "coco.json"))
    assert coco.loadImgs([1]) == [{"id": 1, "file_name": "street.png", "height": HEIGHT, "width": WIDTH}]
    assert [each["name"] for each in coco.loadCats(coco.getCatIds())] == NAMES
    truth = scene_of("panoptic", HEIGHT, WIDTH)
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len(annotations) == len(truth), "hidden classes, too"
    for each, (index, score, mask) in zip(annotations, truth, strict=True):
        assert (each["category_id"], each["score"], each["area"]) == (10 + index, score, mask.sum())
        assert (coco.annToMask(each) == mask).all()
        y, x = np.nonzero(mask)
        assert each["bbox"] == [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
    assert shown.errors() == []


def test_a_large_picture_is_shown_smaller_and_saved_in_full(page, tmp_path):
    Image.new("RGB", (3000, 2000), (180, 180, 180)).save(tmp_path / "large.png")
    page.give(tmp_path / "large.png")
    toggle(page, CAR)
    shown = page.pixels()
    assert 1_000_000 < shown.shape[0] * shown.shape[1] < 3_100_000
    page.click("#save-png")
    saved = opened(page.downloaded("large-panoptic.png"))
    assert saved.shape == (2000, 3000, 3)
    for y, x in ((0.2, 0.5), (0.5, 0.5), (0.65, 0.5), (0.8, 0.2)):
        one, other = (each[int(y * each.shape[0]), int(x * each.shape[1])].tolist() for each in (saved, shown))
        assert one == other
    outline = (saved[:, 1500] == COLORS[SKY]).all(-1)
    assert np.flatnonzero(outline).tolist() == list(range(795, 800)), "1/600 of the longer side"


def test_a_busy_server_is_asked_again_later(page, stub, picture):
    for wait in "31":
        stub.refuse(429, "busy", "2 requests are being answered", Retry_After=wait)
    page.type("#input", str(picture))
    page.until("document.getElementById('status').textContent === 'The server is busy, next try in 3 s (1 of 4)'")
    stub.free.clear()
    page.until("document.getElementById('status').textContent === 'Segmenting street.png'")
    stub.free.set()
    page.found()
    assert [path for path, _, _ in stub.asked] == ["/model", "/predict", "/predict", "/predict"]
    for _ in range(5):
        stub.refuse(429, "busy", "2 requests are being answered", Retry_After="0")
    page.type("#input", str(picture))
    page.until("!document.getElementById('error').hidden")
    assert page.text("#error") == "2 requests are being answered (request number-7)"
    page.click("#again")
    page.found()
    assert page.value("document.getElementById('error').hidden")


def test_errors_are_one_line_with_the_number_of_the_request(page, stub, picture):
    stub.refuse(400, "not_an_image", "it is <b>no</b> picture")
    page.type("#input", str(picture))
    page.until("!document.getElementById('error').hidden")
    assert page.text("#error") == "It is <b>no</b> picture (request number-7)"
    assert page.value("document.getElementById('again').hidden"), "it would not help"
    assert page.value("document.getElementById('progress').hidden")
    stub.refusals.append((502, {}, b"<h1>Bad gateway</h1>"))
    page.type("#input", str(picture))
    page.until("document.getElementById('error').textContent.startsWith('The server answered 502')")
    assert "number-1" in page.text("#error")
    page.give(picture)
    stub.refuse(500, "internal", "the server has made a mistake")
    page.move(20, 48, click=True)
    page.until("!document.getElementById('error').hidden")
    assert page.text("#error") == "The server has made a mistake (request number-7)"
    page.click("#again")
    page.until("document.querySelectorAll('#points-names li').length === 5")
    assert page.value("document.getElementById('error').hidden")


def test_a_picture_that_is_too_large_is_not_sent(page, stub, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(20_100_000))
    page.type("#input", str(tmp_path / "large.png"))
    page.until("!document.getElementById('error').hidden")
    assert page.text("#error") == "The file has 20.1 MB, and this server takes up to 20.0 MB"
    assert [path for path, _, _ in stub.asked] == ["/model"]


def test_the_key_is_asked_for_and_kept_in_the_tab(browser, stub, picture):
    stub.key = "right"
    browser.open(stub.address)
    browser.until("!document.getElementById('key').hidden")
    assert browser.value("document.activeElement.id") == "key-field"
    browser.type("#input", str(picture))
    browser.type("#key-field", "wrong" + KEYS["enter"])
    browser.until("document.getElementById('key-label').textContent.includes('did not take')")
    browser.type("#key-field", "right" + KEYS["enter"])
    browser.found()
    assert browser.value("document.getElementById('key').hidden")
    assert browser.value("[document.cookie, localStorage.length]") == ["", 0]
    browser.open(stub.address)
    browser.give(picture)


def test_a_new_picture_ends_the_request_for_the_last(page, stub, picture, tmp_path):
    other = shutil.copy(picture, tmp_path / "other.png")
    stub.free.clear()
    page.type("#input", str(picture))
    page.until("!document.getElementById('progress').hidden")
    page.until("document.getElementById('elapsed').textContent === '1 s'")
    page.type("#input", str(other))
    stub.free.set()
    page.found()
    assert page.text("#file").startswith("other.png")
    assert page.value("document.getElementById('error').hidden")
    stub.free.clear()
    page.type("#input", str(picture))
    page.click("#cancel")
    assert page.text("#status") == "Stopped"
    stub.free.set()
    page.click("#again")
    page.found()
    assert page.text("#file").startswith("street.png")
    assert page.errors() == []


def test_a_server_that_is_gone_is_told(page, stub, picture):
    stub.shutdown()
    stub.server_close()
    page.type("#input", str(picture))
    page.until("!document.getElementById('error').hidden")
    assert page.text("#error") == "The server cannot be reached"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window_and_all_texts_are_readable(page, picture, width, scheme):
    page.cdp("Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=2, mobile=False)
    page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        wide = "document.documentElement.scrollWidth"
        assert page.value(wide) <= width
        assert unreadable(page) == []
        page.give(picture)
        page.move(85, 10, click=True)
        page.until("document.querySelectorAll('#points-names li').length === 5")
        choose(page, "instance")
        page.move(85, 48)
        assert page.value(wide) <= width
        assert unreadable(page) == []
    finally:
        page.cdp("Emulation.clearDeviceMetricsOverride")
        page.cdp("Emulation.setEmulatedMedia", features=[])


def unreadable(page: Browser) -> list[Any]:
    """Texts whose contrast with what lies behind them is below WCAG's 4.5 (https://www.w3.org/TR/WCAG22/#contrast-minimum)."""
    return page.run("""
      const parse = (color) => { const [r, g, b, a = 1] = color.match(/[0-9.]+/g).map(Number); return [r, g, b, a]; };
      const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
      };
      const ground = (at) => {
        for (; at; at = at.parentElement) {
          const color = parse(getComputedStyle(at).backgroundColor);
          if (color[3] > 0.85) return color;
        }
        return [255, 255, 255, 1];
      };
      const found = [];
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const at = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !at.checkVisibility()) continue;
        const two = [light(parse(getComputedStyle(at).color)), light(ground(at))].sort((x, y) => y - x);
        const contrast = (two[0] + 0.05) / (two[1] + 0.05);
        if (contrast < 4.5) found.push([walker.currentNode.data, contrast]);
      }
      return found;
    """)


def test_run_lengths_read_as_pycocotools_writes_them(page):
    random = np.random.default_rng(0)
    masks = [np.zeros((3, 5)), np.ones((3, 5)), np.eye(7), boxed(700, 900, 0.1, 0.9, 0.2, 0.8)]
    for share in (0.02, 0.5, 0.97):
        masks += [
            random.random((height, width)) < share for height, width in ((1, 1), (1, 40), (40, 1), (37, 53), (300, 400))
        ]
    for mask in masks:
        found, area = decoded(page, packed(mask))
        assert (np.frombuffer(base64.b64decode(found), np.uint8).reshape(mask.shape, order="F") == mask).all()
        assert area == mask.sum()


def test_run_lengths_that_are_damaged_are_refused(page):
    counts = packed(np.eye(9))["counts"]
    for size, text in (
        ([9, 8], counts),
        ([9, 9], counts[:-1]),
        ([9, 9], counts + "o"),
        ([9, 9], "é" + counts),
        ([9, 9], "H"),
    ):
        with pytest.raises(AssertionError, match="run lengths"):
            decoded(page, {"size": size, "counts": text})


def decoded(page: Browser, rle: dict[str, Any]) -> Any:
    """The mask's bytes, in base 64, and its area."""
    return page.run(
        """
        return import('/web/rle.js').then((rle) => {
          const mask = rle.decode(arguments[0]);
          let text = '';
          for (let at = 0; at < mask.length; at += 8192) text += String.fromCharCode(...mask.subarray(at, at + 8192));
          return [btoa(text), rle.areaOf(rle.runsOf(arguments[0]))];
        });
        """,
        rle,
    )


def test_the_real_server_and_the_page_understand_each_other(browser, server, tmp_path):
    plain = Shapes("val", length=1)[0].image.permute(1, 2, 0).contiguous().numpy()
    file = tmp_path / "scene.png"
    Image.fromarray(plain).save(file)
    request = urllib.request.Request(
        f"{server}/predict", file.read_bytes(), {"Content-Type": "application/octet-stream"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        segments = json.load(answer)["segments"]
    browser.open(server)
    browser.until("document.getElementById('model').textContent.startsWith('camvid-small')")
    assert browser.value("document.getElementById('tasks').hidden"), "there is but one task"
    browser.give(file)
    painted = browser.pixels()
    assert painted.shape == plain.shape
    assert (painted != plain).any()
    assert {row[0] for row in rows(browser)} == {segment["class"] for segment in segments}
    for segment in segments:
        mask = reference.decode(segment["rle"]).astype(bool)
        y, x = (int(side[len(side) // 2]) for side in np.nonzero(mask))
        browser.move(x, y)
        assert browser.text("#tip").startswith(segment["class"])
        toggle(browser, segment["index"])
        assert (browser.pixels()[mask] == plain[mask]).all()
        toggle(browser, segment["index"])
        assert (browser.pixels() == painted).all()
    browser.move(5, 5, click=True)
    assert browser.value("document.getElementById('points').hidden")
    browser.click("#save-coco")
    saved = json.loads(browser.downloaded("scene-semantic.json"))
    assert [each["segmentation"] for each in saved["annotations"]] == [segment["rle"] for segment in segments]
    assert browser.errors() == []
    nothing = tmp_path / "nothing.png"
    nothing.write_text("no picture")
    browser.type("#input", str(nothing))
    browser.until("!document.getElementById('error').hidden")
    assert re.search(r"\(request [\w.-]+\)$", browser.text("#error"))
