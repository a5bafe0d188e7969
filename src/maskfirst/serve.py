"""Serve: a model behind HTTP. A picture is posted, and its segments come back; a page for people lies at /.

Nothing of a request is trusted: its size, its time, the pixels it declares and how many wait at once are bounded, it names no
files and no addresses, and whatever goes wrong is told as JSON with the request's number.
"""

import asyncio
import hmac
import io
import json
import logging
import math
import os
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from maskfirst.batching import Batcher
from maskfirst.data.images import ImageError, TooLargeError, as_rgb
from maskfirst.draw import SURE
from maskfirst.errors import UserError, listed
from maskfirst.formats import rle
from maskfirst.prediction import Prediction
from maskfirst.segmenter import Segmenter
from maskfirst.tasks import check_task
from maskfirst.types import TASKS

R = TypeVar("R")
PAGE = Path(__file__).with_name("web")
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
OPEN = ("/", "/health", "/ready")
"""What needs no key, beside the page's files."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
POINTS = "points"
"""The kind of work that names points; others are tasks."""
LOG = logging.getLogger("maskfirst.serve")


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take.

    `bytes` and `pixels` of a picture, `points` of one request. `seconds` from its first byte to the answer, `body_seconds` of
    these until its last byte has come. `requests`: accepted and not yet answered; more are sent away with 429. `batch`:
    pictures that go through the model together; None: as the model likes.
    """

    bytes: int = 20_000_000
    pixels: int = 25_000_000
    points: int = 1000
    seconds: float = 60.0
    body_seconds: float = 15.0
    requests: int = 32
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("bytes", "pixels", "points", "seconds", "body_seconds", "requests"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: {getattr(self, name)} must be more than 0")


class RefusedError(Exception):
    """A request that gets no answer. `code`: one word for programs. `wait`: seconds after which to try again."""

    def __init__(self, status: int, code: str, message: str, wait: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.wait = status, code, wait


class Rle(BaseModel):
    """A mask as COCO's run lengths, column by column, packed into text."""

    size: tuple[int, int]
    counts: str


class Segment(BaseModel):
    """One segment. `index`: of its name in the vocabulary. `share`: of the picture. `box`: x0, y0, x1, y1 px."""

    name: Annotated[str, Field(alias="class")]
    index: int
    category_id: int
    score: float
    share: float
    box: tuple[float, float, float, float]
    rle: Rle


class Answer(BaseModel):
    """What is in a picture."""

    request_id: str
    task: Literal["semantic", "instance", "panoptic"]
    height: int
    width: int
    segments: list[Segment]


class NamedPoint(BaseModel):
    """The probabilities of all names at a place."""

    y: float
    x: float
    probabilities: list[float]


class NamedPoints(BaseModel):
    """What is at some places of a picture."""

    request_id: str
    names: list[str]
    points: list[NamedPoint]


class Fault(BaseModel):
    """What is wrong, in one word and in one line."""

    code: str
    message: str


class Refusal(BaseModel):
    """The answer to a request that got none."""

    error: Fault
    request_id: str


BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a JPEG, PNG, WebP, TIFF, BMP or GIF file.",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Refusal, "description": told}
    for status, told in {
        400: "no picture, or a wrong parameter",
        401: "the key is missing or wrong",
        408: "the body took too long",
        413: "too many bytes or pixels",
        415: "a body of another kind",
        429: "too many at once; try again after Retry-After seconds",
        504: "the answer took too long",
    }.items()
}


class Service:
    """A model that answers pictures from many requests, some at a time. Knows nothing of HTTP."""

    def __init__(self, segmenter: Segmenter, limits: Limits, batches: Callable[[int], None]) -> None:
        """`batches` is told the size of each."""
        self.segmenter, self.limits, self.batches = segmenter, limits, batches
        self.tasks = tuple(task for task in TASKS if _can(segmenter, task))
        self.points = segmenter.point_namer is not None
        self.batcher = Batcher(self._work, limits.batch or segmenter.batch)
        # What reads pictures and what writes answers, beside the one thread that the model has.
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="pictures")
        self.warm = self.batcher.submit(self.tasks[0], torch.zeros(3, 64, 64, dtype=torch.uint8))

    def close(self) -> None:
        """Returns when all that was accepted is done."""
        self.batcher.close()
        self.pool.shutdown()

    def _work(self, kind: str, items: Sequence[Any]) -> Sequence[Any]:
        self.batches(len(items))
        if kind == POINTS:
            return [self.segmenter.name_points(image, points) for image, points in items]
        return self.segmenter.segment_many(items, kind, batch=self.batcher.most)


def application(segmenter: Segmenter, name: str, limits: Limits | None = None, key: str | None = None) -> FastAPI:
    """The routes of a model called `name`. `key`: what requests must bear, None: nothing."""
    limits = limits or Limits()
    metrics = Metrics()
    service = Service(segmenter, limits, metrics.batches.observe)
    entrance = Entrance(limits.requests, metrics.waiting.set)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title=f"maskfirst: {name}",
        description="Post a picture, get its segments.",
        version="1",
        lifespan=lifespan,
        # The pages that FastAPI has for these load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Porter, metrics=metrics, key=key)
    _tell_mistakes(app)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/web/{file}", include_in_schema=False)
    def page_file(file: str) -> FileResponse:
        # By listing, so that no name leads out of the folder.
        known = {each.name: each for each in PAGE.iterdir() if each.suffix in KINDS}
        if file not in known:
            raise RefusedError(404, "not_found", f"there is no {file} here")
        return FileResponse(known[file], media_type=KINDS[known[file].suffix])

    @app.get("/health")
    def health() -> dict[str, str]:
        """Answers as long as the process does."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: REFUSALS[429] | {"description": "not yet"}})
    def ready() -> dict[str, str]:
        """Answers 200 once the model has answered its first picture."""
        if not service.warm.done() or service.warm.exception() is not None:
            raise RefusedError(503, "not_ready", "the model has not answered its first picture")
        return {"status": "ready"}

    @app.get("/metrics", include_in_schema=False)
    def told_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/model")
    def model() -> dict[str, Any]:
        """What can be asked, and of what names."""
        words = segmenter.vocabulary
        return {
            "name": name,
            "tasks": service.tasks,
            "task": segmenter.default_task,
            "points": service.points,
            "limits": {"bytes": limits.bytes, "pixels": limits.pixels, "points": limits.points},
            "vocabulary": {
                "names": words.names,
                "colors": words.colors,
                "things": sorted(words.things),
                "ids": words.ids,
            },
        }

    @app.post("/predict", response_model=Answer, responses=REFUSALS, openapi_extra=BODY)
    async def predict(
        request: Request,
        task: Annotated[str | None, Query(description=f"{', '.join(service.tasks)}; by default the model's")] = None,
        format: Annotated[
            Literal["json", "labels", "overlay"],
            Query(description="JSON with run lengths, a PNG of classes, or the picture under their colours"),
        ] = "json",
        least_score: Annotated[float, Query(ge=0, le=1, description="of the instances that are told")] = SURE,
    ) -> Response:
        """The segments of the picture in the body."""
        wanted = segmenter.default_task if task is None else task
        check_task(wanted, segmenter.proposer.tasks, segmenter.vocabulary)
        async with entrance.admitted(), _within(limits.seconds):
            image = await _picture(request, service)
            segments = await _result(request, service.batcher.submit(wanted, image))
            if wanted == "instance":
                segments = segments[segments.scores >= least_score]
            found = Prediction(image, segments, segmenter.vocabulary, wanted)
            return await _in(service.pool, lambda: _written(found, format, _number(request)))

    if service.points:

        @app.post("/points", response_model=NamedPoints, responses=REFUSALS, openapi_extra=BODY)
        async def points(
            request: Request, at: Annotated[list[str], Query(description="Y,X px; the first pixel's centre is 0,0")]
        ) -> Response:
            """What is at some places of the picture in the body."""
            places = _places(at, limits.points)
            async with entrance.admitted(), _within(limits.seconds):
                image = await _picture(request, service)
                told = await _result(request, service.batcher.submit(POINTS, (image, torch.tensor(places))))
                answer = [
                    {"y": y, "x": x, "probabilities": [round(value, 6) for value in row]}
                    for (y, x), row in zip(places, told.tolist(), strict=True)
                ]
                content = {"request_id": _number(request), "names": segmenter.vocabulary.names, "points": answer}
                return JSONResponse(content)

    return app


def run(app: FastAPI, host: str, port: int, limits: Limits, told: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then answers what it has accepted. `told` is given the address once it listens.

    `port`: 0 for any that is free. Raises UserError where the address cannot be had.
    """
    with listen(host, port) as listener:
        address = listener.getsockname()
        told(f"http://{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}")
        server(app, limits).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine. Raises UserError."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise UserError(f"{host}:{port}: {os.strerror(error.errno or 0)}; choose another --port or --host") from error


def server(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """What runs the routes."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        # Connections, most of which wait for one that is answered.
        limit_concurrency=8 * limits.requests + 64,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=math.ceil(limits.seconds),
    )
    return uvicorn.Server(settings)


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given: Mapping[str, Any] = {"namespace": "maskfirst", "registry": self.registry}
        self.requests = Counter("requests", "Requests by path and status", ["path", "status"], **given)
        self.seconds = Histogram("seconds", "From the first byte to the last, by path", ["path"], **given)
        self.waiting = Gauge("requests_in_progress", "Accepted and not yet answered", **given)
        self.batches = Histogram("batch_pictures", "Pictures a pass", buckets=(1, 2, 4, 8, 16, 32), **given)


class Entrance:
    """Lets so many in at a time. Of one event loop."""

    def __init__(self, most: int, told: Callable[[float], None]) -> None:
        self.most, self.told, self.inside = most, told, 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Raises RefusedError at once where it is full."""
        if self.inside >= self.most:
            raise RefusedError(429, "busy", f"{self.inside} requests are being answered; try again in a second", wait=1)
        self.inside += 1
        self.told(self.inside)
        try:
            yield
        finally:
            self.inside -= 1
            self.told(self.inside)


class Porter:
    """Around all routes: numbers requests, asks for the key, adds headers, and writes a line of the log for each."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None) -> None:
        self.app, self.metrics, self.key = app, metrics, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        number = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        scope.setdefault("state", {})["number"] = number

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {"X-Request-ID": number, **HEADERS}
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.lower().encode(), value.encode()) for name, value in own.items()),
                ]
            await send(message)

        try:
            if self._may(scope):
                await self.app(scope, receive, sent)
            else:
                refused = RefusedError(401, "unauthorized", "send the server's key: `Authorization: Bearer KEY`")
                await _refusal(number, refused)(scope, receive, sent)
        finally:
            seconds = time.perf_counter() - start
            # Paths that there are not would be a label each.
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            LOG.info("%s %s %s %d %.0f ms", number, scope["method"], scope["path"], status, 1000 * seconds)

    def _may(self, scope: Scope) -> bool:
        if self.key is None or scope["path"] in OPEN or scope["path"].startswith("/web/"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self.key.encode())


def _can(segmenter: Segmenter, task: str) -> bool:
    try:
        check_task(task, segmenter.proposer.tasks, segmenter.vocabulary)
    except UserError:
        return False
    return True


def _number(request: Request) -> str:
    return request.state.number


def _refusal(number: str, error: RefusedError) -> JSONResponse:
    headers = {} if error.wait is None else {"Retry-After": str(error.wait)}
    content = {"error": {"code": error.code, "message": str(error)}, "request_id": number}
    # What has not been read of a body would be taken for the next request.
    return JSONResponse(content, error.status, headers | {"Connection": "close"})


def _tell_mistakes(app: FastAPI) -> None:
    """Whatever is raised becomes a refusal."""

    def refused(request: Request, error: Exception) -> Response:
        return _refusal(_number(request), _as_refusal(error, _number(request)))

    for kind in (RefusedError, UserError, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refused)


def _as_refusal(error: Exception, number: str) -> RefusedError:
    match error:
        case RefusedError():
            return error
        case TooLargeError():
            return RefusedError(413, "too_many_pixels", str(error))
        case ImageError():
            return RefusedError(400, "not_an_image", str(error))
        case UserError():
            return RefusedError(400, "wrong_request", str(error))
        case HTTPException(status_code=404):
            return RefusedError(404, "not_found", "there is nothing at this address; /openapi.json tells what is")
        case HTTPException():
            return RefusedError(error.status_code, "wrong_request", str(error.detail))
        case RequestValidationError():
            told = [f"{each['loc'][-1]}: {each['msg']}" for each in error.errors()]
            return RefusedError(400, "wrong_request", listed(told, 3))
        case ClientDisconnect():
            return RefusedError(499, "gone", "the client has gone")
        case _:
            LOG.error("%s failed", number, exc_info=error)
            return RefusedError(500, "internal", "the server has made a mistake; its log has it under this number")


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise RefusedError(504, "too_slow", f"no answer within {seconds:g} s") from None


async def _picture(request: Request, service: Service) -> torch.Tensor:
    """The picture in a body, read and decoded within the limits."""
    body = await _body(request, service.limits)
    return await _in(service.pool, lambda: as_rgb(body, service.limits.pixels))


async def _body(request: Request, limits: Limits) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind not in ("application/octet-stream", "binary/octet-stream"):
        raise RefusedError(
            415, "wrong_kind", f"a body of {kind}; send the bytes of the picture's file, as curl --data-binary @FILE does, "
            "with `Content-Type: application/octet-stream`",
        )  # fmt: skip
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.bytes:
        raise RefusedError(413, "too_many_bytes", f"{length} bytes; at most {limits.bytes} are taken")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.bytes:
                    raise RefusedError(413, "too_many_bytes", f"more than {limits.bytes} bytes; no more are taken")
    except TimeoutError:
        raise RefusedError(408, "slow_body", f"the body did not come within {limits.body_seconds:g} s") from None
    return bytes(body)


async def _in(pool: ThreadPoolExecutor, work: Callable[[], R]) -> R:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


async def _result(request: Request, future: Future[Any]) -> Any:
    """What a future brings; it is cancelled where nobody waits for it any more."""
    waited: Awaitable[Any] = asyncio.wrap_future(future)
    try:
        while True:
            done, _ = await asyncio.wait({waited}, timeout=0.5)
            if done:
                return await waited
            if await request.is_disconnected():
                raise ClientDisconnect()
    finally:
        future.cancel()


def _written(found: Prediction, format: str, number: str) -> Response:
    if format != "json":
        png = io.BytesIO()
        (found.labels() if format == "labels" else found.overlay()).save(png, "PNG")
        return Response(png.getvalue(), media_type="image/png")
    height, width = found.image.shape[-2:]
    rles = rle.encode(found.masks)
    areas = rle.area(rles).tolist()
    rows = zip(
        found.names, found.classes.tolist(), found.scores.tolist(), areas, found.boxes.tolist(), rles, strict=True
    )
    segments = [
        {
            "class": name,
            "index": index,
            "category_id": found.vocabulary.ids[index],
            "score": round(score, 6),
            "share": round(area / (height * width), 6),
            "box": box,
            "rle": mask,
        }
        for name, index, score, area, box, mask in rows
    ]
    told = {"request_id": number, "task": found.task, "height": height, "width": width, "segments": segments}
    return Response(json.dumps(told, ensure_ascii=False), media_type="application/json")


def _places(at: Sequence[str], most: int) -> list[tuple[float, float]]:
    if len(at) > most:
        raise RefusedError(400, "too_many_points", f"{len(at)} points; at most {most} are named at once")
    places = []
    for text in at:
        try:
            y, x = map(float, text.split(","))
        except ValueError:
            raise RefusedError(
                400, "wrong_request", f"at: '{text[:40]}' is no place; say Y,X in px, as 12.5,40"
            ) from None
        if not (math.isfinite(y) and math.isfinite(x)):
            raise RefusedError(400, "wrong_request", f"at: '{text[:40]}' is no place of a picture")
        places.append((y, x))
    return places
