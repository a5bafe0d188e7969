"""The server's page for long: `python -m bench.page`, saved with the hardware.

Scenes of four sizes are chosen one after the other on the page of `maskfirst serve camvid-small`, in one tab of a headless
Chromium, and each is looked at: every class switched off and on, a segment's name on hover, the PNG and the COCO file saved.
Told are the seconds from the choice to the segments beside those of a plain request, and what the page and the server hold in
memory after a tenth and at the end. Needs Chromium with its driver.
"""

import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as reference

from bench.browser import Browser, opened
from bench.measure import Check, hardware, options, settle
from bench.serve import MODEL, asked, resident, served
from maskfirst.data.shapes import Shapes
from maskfirst.draw import to_picture
from maskfirst.files import write_json

SIZES = ((90, 120), (180, 240), (120, 90), (240, 320))


def main() -> None:
    """Reads the command line, measures, prints, writes."""
    parser = options(__doc__, 1)
    parser.add_argument("--pictures", type=int, default=240)
    given = parser.parse_args()
    settle(given)
    with tempfile.TemporaryDirectory() as place, served(given.threads) as (port, process):
        files = [scene(Path(place), size, seed) for seed, size in enumerate(SIZES)]
        browser = Browser(Path(place))
        try:
            browser.open(f"http://127.0.0.1:{port}")
            browser.until("document.getElementById('model').textContent.startsWith('camvid-small')")
            took, plain, seen = [], [], []
            for number in range(given.pictures):
                file = files[number % len(files)]
                start = time.perf_counter()
                browser.give(file)
                took.append(time.perf_counter() - start)
                plain += asked(port, file.read_bytes(), 1, float("inf"), 1)
                look(browser, file)
                if (number + 1) % max(1, given.pictures // 10) == 0:
                    seen.append(held(browser) | {"server_mib": resident(process.pid)})
                    print(f"{number + 1:>6} pictures: {seen[-1]}", flush=True)
            errors = browser.errors()
        finally:
            browser.close()
    told = {
        "pictures": given.pictures,
        "page_ms": round(1000 * statistics.median(took)),
        "request_ms": round(1000 * statistics.median(plain)),
        "held": {"after a tenth": seen[0], "end": seen[-1]},
        "errors": errors,
    }
    grown = {key: seen[-1][key] - seen[0][key] for key in seen[0]}
    checks = [
        Check("ms from choice to segments beyond a request", told["page_ms"] - told["request_ms"], 250),
        Check("MiB of the page's heap at the end beyond a tenth", grown["heap_mib"], 8),
        Check("nodes of the page at the end beyond a tenth", grown["nodes"], 200),
        Check("MiB of the server at the end beyond a tenth", grown["server_mib"], 64),
        Check("errors in the browser's console", len(errors), 0),
    ]
    print(f"median ms, page {told['page_ms']}, plain request {told['request_ms']}", *checks, sep="\n")
    if given.out:
        content = {"model": MODEL, "sizes": SIZES, **told, "checks": [each.as_json() for each in checks]}
        write_json(given.out, {"hardware": hardware(), **content})


def scene(place: Path, size: tuple[int, int], seed: int) -> Path:
    """A made-up scene of (height, width) px as a PNG."""
    file = place / f"scene-{seed}.png"
    to_picture(Shapes("val", seed + 1, size)[seed].image).save(file)
    return file


def look(browser: Browser, file: Path) -> None:
    """Does with a picture on the page what a person may; raises AssertionError where what is shown is not what was found."""
    plain = digest(opened(file.read_bytes()))
    painted = shown(browser)
    assert painted != plain
    browser.click("#none")
    assert shown(browser) == plain, "classes that are switched off are shown"
    browser.click("#all")
    assert shown(browser) == painted, "switched off and on it is another picture"
    browser.click("#save-png")
    assert digest(opened(browser.downloaded(f"{file.stem}-semantic.png"))) == painted
    browser.click("#save-coco")
    coco: dict[str, Any] = json.loads(browser.downloaded(f"{file.stem}-semantic.json"))
    names = {each["id"]: each["name"] for each in coco["categories"]}
    for each in coco["annotations"]:
        y, x = (int(side[len(side) // 2]) for side in np.nonzero(reference.decode(each["segmentation"])))
        browser.move(x, y)
        assert browser.text("#tip").startswith(names[each["category_id"]])


def digest(pixels: np.ndarray) -> str:
    """Of a picture, H x W x 3, as `shown` tells it."""
    opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    return hashlib.sha256(np.concatenate([pixels, opaque], 2).tobytes()).hexdigest()


def shown(browser: Browser) -> str:
    """The digest of what the canvas shows. The pixels themselves, asked for, would stay in the page's heap."""
    return browser.run("""
      const canvas = document.getElementById('canvas');
      const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      return crypto.subtle.digest('SHA-256', data).then(
        (found) => Array.from(new Uint8Array(found), (each) => each.toString(16).padStart(2, '0')).join(''));
    """)


def held(browser: Browser) -> dict[str, float]:
    """MiB of the page's heap and its nodes, once what nobody needs is gone."""
    browser.cdp("HeapProfiler.collectGarbage")
    heap = browser.cdp("Runtime.getHeapUsage")["usedSize"]
    return {"heap_mib": round(heap / 2**20, 2), "nodes": browser.cdp("Memory.getDOMCounters")["nodes"]}


if __name__ == "__main__":
    main()
