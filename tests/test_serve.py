"""The server over real sockets: answers, refusals, limits, what happens when clients misbehave, and how it stops."""

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference

import maskfirst
from maskfirst.batching import Batcher
from maskfirst.build import Experiment
from maskfirst.compose import with_names
from maskfirst.data.shapes import Shapes
from maskfirst.errors import UserError
from maskfirst.recipe import load as recipe
from maskfirst.serve import Limits, application, listen, server
from threshold import Threshold

SCENE = Shapes("val", length=2)


def encoded(image: torch.Tensor, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, kind)
    return file.getvalue()


PNG = encoded(SCENE[0].image)


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Asks a server at a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: bytes = PNG, **headers: str) -> Reply:
        return self.ask("POST", path, body, **headers)


@contextmanager
def served(segmenter: maskfirst.Segmenter, limits: Limits | None = None, key: str | None = None) -> Iterator[Client]:
    limits = limits or Limits()
    found = server(application(segmenter, "a-model", limits, key), limits)
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=found.run, args=([listener],))
        thread.start()
        client = Client(listener.getsockname()[1])
        try:
            until(lambda: client.ask("GET", "/ready").status == 200)
            yield client
        finally:
            found.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(reached: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def model() -> maskfirst.Segmenter:
    return maskfirst.load("camvid-small")


@pytest.fixture(scope="module")
def client(model: maskfirst.Segmenter) -> Iterator[Client]:
    with served(model, Limits(bytes=200_000, pixels=100_000, body_seconds=1.0)) as found:
        yield found


class Held(Threshold):
    """Answers when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.sizes = threading.Event(), []

    @property
    def point_namer(self):
        return None

    @property
    def device(self):
        return torch.device("cpu")

    proposer = type("AnyProposer", (), {"tasks": frozenset({"semantic"})})()

    def segment_many(self, images, task="semantic", **given):
        self.sizes.append(len(images))
        if len(self.sizes) > 1:
            assert self.go.wait(60)
        return super().segment_many(images, task, **given)


def test_a_picture_is_answered_with_run_lengths(client: Client, model: maskfirst.Segmenter) -> None:
    reply = client.post("/predict")
    assert reply.status == 200
    told, wanted = reply.json, model.predict(PNG)
    assert (told["task"], told["height"], told["width"]) == ("semantic", 96, 128)
    assert [each["class"] for each in told["segments"]] == list(wanted.names)
    for each, mask in zip(told["segments"], wanted.masks, strict=True):
        assert np.array_equal(reference.decode(each["rle"]), mask.numpy())
        assert each["share"] == pytest.approx(mask.float().mean().item(), abs=1e-6)
        assert model.vocabulary.names[each["index"]] == each["class"]
        assert model.vocabulary.ids[each["index"]] == each["category_id"]
    assert told["request_id"] == reply.headers["x-request-id"]


def test_a_picture_is_answered_with_pngs(client: Client, model: maskfirst.Segmenter) -> None:
    labels = client.post("/predict?format=labels", content_type="image/png")
    assert labels.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(labels.body)) as png:
        assert np.array_equal(np.array(png), model.predict(PNG).label_map().numpy())
    with Image.open(io.BytesIO(client.post("/predict?format=overlay").body)) as png:
        assert png.width >= 128
        assert png.height > 96


def test_the_model_tells_what_it_can_do(client: Client) -> None:
    told = client.ask("GET", "/model").json
    assert (told["tasks"], told["task"], told["points"]) == (["semantic"], "semantic", False)
    assert told["vocabulary"]["names"][0] == "Sky"
    assert len(told["vocabulary"]["colors"]) == 11
    paths = client.ask("GET", "/openapi.json").json["paths"]
    assert {"/predict", "/model", "/health", "/ready"} == set(paths)
    assert "image/*" in paths["/predict"]["post"]["requestBody"]["content"]


def test_health_and_metrics(client: Client) -> None:
    assert client.ask("GET", "/health").json == {"status": "alive"}
    client.post("/predict")
    told = client.ask("GET", "/metrics").body.decode()
    assert re.search(r'maskfirst_requests_total\{path="/predict",status="200"\} [1-9]', told)
    assert "maskfirst_batch_pictures_count" in told


def bomb() -> bytes:
    """A PNG that says it is 50,000 x 50,000 px."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (50_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "code", "told"),
    [
        ("/predict", b"", {}, 400, "not_an_image", "empty"),
        ("/predict", b"<html></html>", {}, 400, "not_an_image", "not a JPEG"),
        ("/predict", PNG[:300], {}, 400, "not_an_image", "broken or cut short"),
        ("/predict", bomb(), {}, 413, "too_many_pixels", "50000 x 50000 px"),
        ("/predict", b"x" * 200_001, {}, 413, "too_many_bytes", "200001 bytes; at most 200000"),
        ("/predict", PNG, {"content_type": "multipart/form-data; boundary=x"}, 415, "wrong_kind", "--data-binary"),
        ("/predict", PNG, {"content_type": "application/json"}, 415, "wrong_kind", "a body of application/json"),
        ("/predict?task=panoptc", PNG, {}, 400, "wrong_request", "unknown task 'panoptc'. Did you mean 'panoptic'"),
        ("/predict?task=panoptic", PNG, {}, 400, "wrong_request", "panoptic"),
        ("/predict?format=gif", PNG, {}, 400, "wrong_request", "format: "),
        ("/predict?least_score=nan", PNG, {}, 400, "wrong_request", "least_score: "),
        ("/points?at=1,2", PNG, {}, 404, "not_found", "openapi.json"),
        ("/predikt", PNG, {}, 404, "not_found", "openapi.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_told_as_json(
    client: Client, path: str, body: bytes, headers: dict[str, str], status: int, code: str, told: str
) -> None:
    reply = client.post(path, body, **headers)
    assert (reply.status, reply.json["error"]["code"]) == (status, code)
    assert told in reply.json["error"]["message"]
    assert "\n" not in reply.json["error"]["message"]
    assert reply.json["request_id"] == reply.headers["x-request-id"]
    assert client.post("/predict").status == 200, "the server goes on"


def test_wrong_methods_and_paths_out_of_the_page(client: Client) -> None:
    assert client.ask("GET", "/predict").json["error"]["code"] == "wrong_request"
    for path in ("/web/..%2f__init__.py", "/web/../serve.py", "/web/gone.js"):
        assert client.ask("GET", path).status == 404


def test_a_body_that_does_not_say_its_length_is_bounded(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as line:
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):
            for _ in range(40):
                line.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert b" 413 " in line.recv(4096).split(b"\r\n")[0]


def test_a_slow_body_is_not_waited_for(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as line:
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n" + PNG[:10])
        answer = line.recv(4096)
    assert b" 408 " in answer.split(b"\r\n")[0]
    assert client.post("/predict").status == 200


def test_numbers_of_requests_are_taken_over_where_they_are_sane(client: Client) -> None:
    assert client.ask("GET", "/health", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    assert client.ask("GET", "/health", x_request_id="a b<script>").headers["x-request-id"] != "a b<script>"


def test_the_page_may_load_nothing_from_elsewhere(client: Client) -> None:
    reply = client.ask("GET", "/")
    assert reply.status == 200
    assert "default-src 'self'" in reply.headers["content-security-policy"]
    assert not re.search(rb"(?:src|href|action)=.?(?:https?:)?//", reply.body)
    files = re.findall(rb'(?:src|href)="(web/[\w.]+)"', reply.body)
    assert len(files) >= 2
    for name in files:
        assert client.ask("GET", f"/{name.decode()}").status == 200


def test_a_key_is_asked_for() -> None:
    held = Held()
    held.go.set()
    with served(held, key="a secret") as client:
        refused = client.post("/predict")
        assert (refused.status, refused.json["error"]["code"]) == (401, "unauthorized")
        assert client.post("/predict", authorization="Bearer another").status == 401
        assert client.ask("GET", "/metrics").status == 401
        assert client.ask("GET", "/health").status == client.ask("GET", "/").status == 200
        assert client.post("/predict", authorization="Bearer a secret").status == 200


def test_when_it_is_full_others_are_sent_away_and_what_waited_goes_together() -> None:
    held = Held()
    with served(held, Limits(requests=5, batch=4)) as client, ThreadPoolExecutor(5) as pool:
        first = pool.submit(client.post, "/predict")
        until(lambda: len(held.sizes) == 2)
        others = [pool.submit(client.post, "/predict") for _ in range(4)]
        until(lambda: "maskfirst_requests_in_progress 5.0" in client.ask("GET", "/metrics").body.decode())
        away = client.post("/predict")
        assert (away.status, away.json["error"]["code"], away.headers["retry-after"]) == (429, "busy", "1")
        time.sleep(0.3)
        held.go.set()
        assert [each.result().status for each in (first, *others)] == [200] * 5
    assert held.sizes == [1, 1, 4], "a picture to warm up, the first one alone, and the four that came meanwhile"


def test_what_takes_too_long_is_told() -> None:
    held = Held()
    with served(held, Limits(seconds=0.5)) as client:
        reply = client.post("/predict")
        assert (reply.status, reply.json["error"]["code"]) == (504, "too_slow")
        held.go.set()
        assert client.post("/predict").status == 200


def test_nothing_is_done_for_clients_that_have_gone() -> None:
    held = Held()
    with served(held, Limits(batch=1)) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/predict")
        until(lambda: len(held.sizes) == 2)
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as line:
            head = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: {len(PNG)}\r\n\r\n"
            line.sendall(head.encode() + PNG)
            until(lambda: "maskfirst_requests_in_progress 2.0" in client.ask("GET", "/metrics").body.decode())
        until(lambda: "maskfirst_requests_in_progress 1.0" in client.ask("GET", "/metrics").body.decode())
        held.go.set()
        assert first.result().status == 200
        assert client.post("/predict").status == 200
    assert held.sizes == [1, 1, 1]


def test_a_mistake_of_the_server_is_told_without_its_insides(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Held):
        def segment_many(self, images, task="semantic", **given):
            if images[0].shape[1] == 64:
                return super().segment_many(images, task, **given)
            raise RuntimeError("a secret of the inside")

    with served(Broken()) as client:
        reply = client.post("/predict")
    assert (reply.status, reply.json["error"]["code"]) == (500, "internal")
    assert b"secret" not in reply.body
    assert "a secret of the inside" in caplog.text


@pytest.fixture(scope="module")
def points() -> Iterator[Client]:
    torch.manual_seed(0)
    model = Experiment(recipe("shapes-vit-p")).segmenter().eval()
    masks = Experiment(recipe("shapes")).segmenter().eval()
    with served(with_names(masks, model), Limits(points=1000)) as found:
        yield found


def test_points_are_named(points: Client) -> None:
    told = points.post("/points?at=3,4&at=95.4,127").json
    assert len(told["names"]) == 7
    assert [(each["y"], each["x"]) for each in told["points"]] == [(3.0, 4.0), (95.4, 127.0)]
    for each in told["points"]:
        assert sum(each["probabilities"]) == pytest.approx(1, abs=1e-4)
    many = "&".join(f"at={index % 96},{index % 128}" for index in range(1000))
    assert len(points.post(f"/points?{many}").json["points"]) == 1000


@pytest.mark.parametrize(
    ("at", "code", "told"),
    [
        ("at=nan,3", "wrong_request", "is no place of a picture"),
        ("at=inf,3", "wrong_request", "is no place of a picture"),
        ("at=3", "wrong_request", "'3' is no place; say Y,X"),
        ("at=a,b", "wrong_request", "'a,b' is no place"),
        ("at=96,3", "wrong_request", "point y 96, x 3 is none of the picture"),
        ("", "wrong_request", "at: Field required"),
        ("&".join(["at=1,1"] * 1001), "too_many_points", "1001 points; at most 1000"),
    ],
)
def test_points_that_are_none_are_told(points: Client, at: str, code: str, told: str) -> None:
    reply = points.post(f"/points?{at}")
    assert (reply.status, reply.json["error"]["code"]) == (400, code)
    assert told in reply.json["error"]["message"]


def test_a_batch_that_fails_is_done_one_by_one() -> None:
    hold = threading.Event()

    def work(kind, items):
        hold.wait(60)
        if 0 in items:
            raise ZeroDivisionError(kind)
        return [10 / item for item in items]

    batcher = Batcher(work, 8)
    first = batcher.submit("a", 1)
    until(lambda: first.running())
    jobs = [batcher.submit("a", item) for item in (2, 0, 5)] + [batcher.submit("b", 4)]
    jobs[2].cancel()
    hold.set()
    batcher.close()
    assert (first.result(), jobs[0].result(), jobs[3].result()) == (10, 5, 2.5)
    assert jobs[2].cancelled()
    with pytest.raises(ZeroDivisionError):
        jobs[1].result()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit("a", 1)


def test_limits_are_numbers_above_nothing() -> None:
    with pytest.raises(UserError, match=r"seconds: 0\.0 must be more than 0"):
        Limits(seconds=0.0)


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as listener, pytest.raises(UserError, match="in use; choose another --port"):
        listen("127.0.0.1", listener.getsockname()[1])


def loaded(client: Client, process: int, bodies: list[bytes], count: int) -> float:
    """Asks so often, eight at a time, and returns the MiB that the server has then."""
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/predict", bodies[index % len(bodies)]) for index in range(count)]
        found = [each.result().status for each in asked]
    assert found == [400 if bodies[index % len(bodies)] == b"no picture" else 200 for index in range(count)]
    told = Path(f"/proc/{process}/status")
    pages = re.search(r"VmRSS:\s+(\d+) kB", told.read_text()) if told.is_file() else None
    return int(pages[1]) / 1024 if pages else 0.0


def test_under_load_it_does_not_grow_and_told_to_stop_it_finishes_what_it_has_accepted() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from maskfirst.cli import main; main()", "serve", "--port", "0", "--seconds", "600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().strip()
        client = Client(int(address.rpartition(":")[2]))
        until(lambda: client.ask("GET", "/ready").status == 200)
        # Eight clients at a time, broken pictures among theirs; what it needs does not grow.
        small = encoded(SCENE[0].image[:, :48, :64])
        grown = [loaded(client, process.pid, [small, small, b"no picture", small], 24) for _ in range(3)]
        assert grown[-1] - grown[0] < 32
        big = encoded(SCENE[0].image.repeat(1, 12, 12))
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(client.post, "/predict", big) for _ in range(3)]
            until(lambda: "maskfirst_requests_in_progress 3.0" in client.ask("GET", "/metrics").body.decode())
            process.send_signal(signal.SIGTERM)
            assert [each.result().status for each in asked] == [200, 200, 200]
        process.wait(60)
        log = process.stderr.read()
    assert process.returncode in (0, -signal.SIGTERM)
    assert len(re.findall(r"[0-9a-f]{32} POST /predict 200 \d+ ms", log)) == 3 + 54
    with pytest.raises(ConnectionRefusedError):
        client.ask("GET", "/health")
