"""nnInteractive's routes (nninteractive-client 2.6.0), answered with a `Segmenter`.

GET  /healthz       {"ok": true}
POST /claim         {"lease_token", "idle_timeout_seconds", "liveness_timeout_seconds", "max_sessions"}; 503 where all are taken
GET  /capabilities  what may be drawn, and constants of nnInteractive's networks that its clients look for

All that follows has the lease in X-Lease-Token, and is 410 without one.

POST /heartbeat, /release;  GET /lease_status
POST /set_image                    a packed array [1 or 3, X, Y, Z]; X-Meta may have {"image_properties": {"spacing": [x, y, z]}}
POST /set_target_buffer            {"shape": [X, Y, Z], "dtype"}: of which type masks are sent. A new object begins
POST /add_bbox_interaction         {"bbox_coords": [[low, high], ...], "include_interaction", "run_prediction"}
POST /add_point_interaction        {"coordinates": [x, y, z], ...}
POST /add_scribble_interaction, /add_lasso_interaction    a packed array; X-Meta as the others' JSON, and "interaction_bbox"
POST /add_initial_seg_interaction  a packed array [X, Y, Z]; X-Meta {"run_prediction"}
POST /predict, /undo, /reset_interactions, /set_do_autozoom

What changes the mask is answered with X-Meta {"ran_prediction", "bbox", "unfinished"} and, packed, the mask in that box.
`unfinished` is ours: there was no time for all slices, and /predict goes on. An error is {"detail": one line}, with 400 where the
request is at fault.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.viewer.access import Access
from engine.viewer.arrays import pack_array, unpack_array
from engine.viewer.leases import Lease, Leases
from engine.viewer.marks import Mark, box_mark, drawn_mark, point_mark
from engine.viewer.request import JSON_BYTES, Refusal, flag, intervals, numbers, read_body, read_object, refused
from engine.viewer.segmentation import Region, Segmentation
from engine.viewer.segmenter import Segmenter
from engine.viewer.stack import Stack

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PATIENCE = 40.0  # seconds from a request until no further slice is begun: its client gives up after 60
TARGETS = frozenset("bool int8 uint8 int16 uint16 int32 uint32 int64 uint64".split())
logger = logging.getLogger(__name__)
Work = Callable[[Lease, dict[str, Any], np.ndarray | None, float], "Response"]


def capabilities(segmenter: Segmenter) -> dict[str, Any]:
    """What /capabilities says."""
    return {
        "supported_interactions": {"points": True, "bbox2d": True, "bbox3d": False, "scribble": True, "lasso": True},
        "supports_initial_label": True,
        "supports_zero_shot_label_refinement": True,
        "supports_undo": True,
        "license": segmenter.license,
        "do_autozoom": False,
        "preferred_scribble_thickness": [1, 1, 1],
        "interaction_decay": 1.0,
        "patch_size": None,
        "inference_session_version": "2.6.0",
        "num_interaction_channels": 7,
        "channel_mapping": {
            "prev_seg": 0,
            "bbox2d": [1, 2],
            "bbox3d": [1, 2],
            "lasso": [1, 2],
            "points": [3, 4],
            "scribble": [5, 6],
        },
    }


class Viewer:
    """The server's state. One thread runs the model; two more unpack what is sent."""

    def __init__(self, segmenter: Segmenter, leases: Leases, most_bytes: int, clock: Callable[[], float] = time.monotonic):
        self.segmenter, self.leases, self.most_bytes, self.clock = segmenter, leases, most_bytes, clock
        self.model, self.arrays = ThreadPoolExecutor(1, "model"), ThreadPoolExecutor(2, "arrays")
        self.stopping = False
        self.predictions = 0

    def stop(self) -> None:
        """Waits for what is being computed, which ends at its next slice."""
        self.stopping = True
        for pool in (self.model, self.arrays):
            pool.shutdown(cancel_futures=True)

    def app(self, api_key: str | None) -> Access:
        """The ASGI application."""
        return Access(_application(self), api_key)

    # What is answered at once.

    async def healthz(self, request: "Request") -> Any:
        return {"ok": True}

    async def capabilities(self, request: "Request") -> Any:
        return capabilities(self.segmenter)

    async def claim(self, request: "Request") -> Any:
        lease = self.leases.claim()
        logger.info("a session begins, %d of %d", len(self.leases), self.leases.most)
        return {
            "lease_token": lease.token,
            "idle_timeout_seconds": self.leases.idle_seconds,
            "liveness_timeout_seconds": self.leases.alive_seconds,
            "max_sessions": self.leases.most,
        }

    async def release(self, request: "Request") -> Any:
        self.leases.release(_token(request))
        return {"released": True}

    async def heartbeat(self, request: "Request") -> Any:
        return {"remaining_seconds": self.leases.remaining(self.leases.find(_token(request)))}

    async def lease_status(self, request: "Request") -> Any:
        return await self.heartbeat(request) | {"idle_timeout_seconds": self.leases.idle_seconds}

    # What a session's user does: in a thread, one after the other.

    def set_image(self, lease: Lease, meta: dict[str, Any], image: Any, start: float) -> "Response":
        if image.ndim != 4 or image.shape[0] not in (1, 3):
            raise Refusal(400, f"an image of shape {list(image.shape)} (expected [1 or 3, X, Y, Z])")
        properties = meta.get("image_properties")
        given = properties.get("spacing") if isinstance(properties, dict) else None
        spacing = [1.0, 1.0, 1.0] if given is None else numbers(given, "spacing", 3)
        if min(spacing) <= 0:
            raise Refusal(400, "spacing: expected 3 numbers, more than 0")
        lease.segmentation, lease.dtype = None, None  # before the next one takes as much
        lease.segmentation = Segmentation(Stack(image, spacing))
        return _json({"original_image_shape": list(image.shape)})

    def set_target_buffer(self, lease: Lease, values: dict[str, Any], _: Any, start: float) -> "Response":
        segmentation = _imaged(lease)
        if numbers(values.get("shape"), "shape", 3) != list(segmentation.stack.shape):
            raise Refusal(400, f"shape: expected that of the image, {list(segmentation.stack.shape)}")
        if not isinstance(values.get("dtype"), str) or values["dtype"] not in TARGETS:
            raise Refusal(400, f"dtype: expected one of {', '.join(sorted(TARGETS))}")
        segmentation.clear()
        lease.dtype = np.dtype(values["dtype"])
        return _json({})

    def set_do_autozoom(self, lease: Lease, values: dict[str, Any], _: Any, start: float) -> "Response":
        flag(values, "do_autozoom")  # there is nothing to zoom
        return _json({})

    def reset_interactions(self, lease: Lease, values: dict[str, Any], _: Any, start: float) -> "Response":
        if lease.segmentation is not None:
            lease.segmentation.clear()
        return _json({})

    def add_bbox_interaction(self, lease: Lease, values: dict[str, Any], _: Any, start: float) -> "Response":
        segmentation = _targeted(lease)
        box = intervals(values.get("bbox_coords"), "bbox_coords")
        with refused():
            mark = box_mark(box, flag(values, "include_interaction"), segmentation.stack.shape, segmentation.stack.axis)
        return self._drawn(lease, mark, values, start)

    def add_point_interaction(self, lease: Lease, values: dict[str, Any], _: Any, start: float) -> "Response":
        segmentation = _targeted(lease)
        place = numbers(values.get("coordinates"), "coordinates", 3)
        with refused():
            mark = point_mark(place, flag(values, "include_interaction"), segmentation.stack.shape, segmentation.plane)
        return self._drawn(lease, mark, values, start)

    def add_scribble_interaction(self, lease: Lease, meta: dict[str, Any], drawn: Any, start: float) -> "Response":
        return self._drawn(lease, _drawn_mark(lease, meta, drawn, closed=False), meta, start)

    def add_lasso_interaction(self, lease: Lease, meta: dict[str, Any], drawn: Any, start: float) -> "Response":
        return self._drawn(lease, _drawn_mark(lease, meta, drawn, closed=True), meta, start)

    def add_initial_seg_interaction(self, lease: Lease, meta: dict[str, Any], mask: Any, start: float) -> "Response":
        segmentation = _targeted(lease)
        if mask.shape != segmentation.stack.shape:
            raise Refusal(400, f"a mask of shape {list(mask.shape)} (expected {list(segmentation.stack.shape)})")
        refine = flag(meta, "run_prediction", False)
        segmentation.begin_with(mask != 0, refine=refine)
        return self._predicted(lease, start) if refine else _changes(lease, False, None)

    def predict(self, lease: Lease, values: dict[str, Any], _: Any, start: float) -> "Response":
        _targeted(lease)
        return self._predicted(lease, start)

    def undo(self, lease: Lease, values: dict[str, Any], _: Any, start: float) -> "Response":
        return _changes(lease, *_targeted(lease).undo())

    def _drawn(self, lease: Lease, mark: Mark, values: dict[str, Any], start: float) -> "Response":
        run = flag(values, "run_prediction", True)
        with refused():
            _targeted(lease).add(mark)
        return self._predicted(lease, start) if run else _changes(lease, False, None)

    def _predicted(self, lease: Lease, start: float) -> "Response":
        segmentation = _targeted(lease)
        ran, region = segmentation.predict(self.segmenter, lambda: self.stopping or self.clock() - start > PATIENCE)
        self.predictions += ran
        logger.info("a prediction in %.1f s%s", self.clock() - start, ", unfinished" if segmentation.unfinished else "")
        return _changes(lease, ran, region)

    def for_session(self, work: Work, *, packed: bool, models: bool) -> Callable[["Request"], Awaitable["Response"]]:
        """The endpoint that does `work` in a thread, with the lease held and the request read."""

        async def endpoint(request: "Request") -> "Response":
            start, token = self.clock(), _token(request)
            lease = self.leases.find(token)
            async with lease.lock:
                self.leases.find(token)  # it may have ended since
                body = await read_body(request, self.most_bytes + JSON_BYTES if packed else JSON_BYTES)
                values = read_object(request.headers.get("x-meta", "{}"), "X-Meta") if packed else read_object(body, "the body")
                self.leases.work(lease)

                def answer() -> "Response":
                    array = None
                    if packed:
                        with refused():
                            array = unpack_array(body, self.most_bytes)
                    return work(lease, values, array, start)

                try:
                    return await asyncio.get_running_loop().run_in_executor(self.model if models else self.arrays, answer)
                except MemoryError:
                    raise Refusal(413, "there is no memory for this") from None
                finally:
                    self.leases.work(lease)

        return endpoint


def _application(viewer: Viewer) -> "Starlette":
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    def at_once(work: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return _json(await work(request))

        return endpoint

    async def refusal(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _json({"detail": error.detail}, error.status, error.headers)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _json({"detail": error.detail}, error.status_code, error.headers)

    async def fault(request: Request, error: Exception) -> Response:
        return _json({"detail": "the server has failed; its log says where"}, 500)

    routes = [Route(f"/{work.__name__}", at_once(work)) for work in (viewer.healthz, viewer.capabilities, viewer.lease_status)]
    routes += [
        Route(f"/{work.__name__}", at_once(work), methods=["POST"]) for work in (viewer.claim, viewer.release, viewer.heartbeat)
    ]
    works: list[tuple[Work, bool, bool]] = [  # packed, with the model
        (viewer.set_image, True, False),
        (viewer.set_target_buffer, False, False),
        (viewer.set_do_autozoom, False, False),
        (viewer.reset_interactions, False, False),
        (viewer.undo, False, False),
        (viewer.predict, False, True),
        (viewer.add_bbox_interaction, False, True),
        (viewer.add_point_interaction, False, True),
        (viewer.add_scribble_interaction, True, True),
        (viewer.add_lasso_interaction, True, True),
        (viewer.add_initial_seg_interaction, True, True),
    ]
    for work, packed, models in works:
        endpoint = viewer.for_session(work, packed=packed, models=models)
        routes.append(Route(f"/{work.__name__}", endpoint, methods=["POST"]))
    handlers: dict[Any, Any] = {Refusal: refusal, HTTPException: unknown, Exception: fault}
    return Starlette(routes=routes, exception_handlers=handlers)


def _token(request: "Request") -> str | None:
    return request.headers.get("x-lease-token")


def _imaged(lease: Lease) -> Segmentation:
    if lease.segmentation is None:
        raise Refusal(400, "there is no image yet (expected set_image first)")
    return lease.segmentation


def _targeted(lease: Lease) -> Segmentation:
    segmentation = _imaged(lease)
    if lease.dtype is None:
        raise Refusal(400, "there is no target buffer yet (expected set_target_buffer first)")
    return segmentation


def _drawn_mark(lease: Lease, meta: dict[str, Any], drawn: np.ndarray, *, closed: bool) -> Mark:
    segmentation = _targeted(lease)
    shape = segmentation.stack.shape
    box = meta.get("interaction_bbox")
    inside = [[0, length] for length in shape] if box is None else intervals(box, "interaction_bbox")
    if any(
        low != round(low) or high != round(high) or not 0 <= low < high <= n for (low, high), n in zip(inside, shape, strict=True)
    ):
        raise Refusal(400, f"interaction_bbox: expected whole numbers within the image of {list(shape)} voxels")
    if drawn.shape != tuple(high - low for low, high in inside):
        raise Refusal(400, f"what is drawn has the shape {list(drawn.shape)} (expected that of its box)")
    with refused():
        include = flag(meta, "include_interaction")
        return drawn_mark(drawn, [int(low) for low, _ in inside], include, segmentation.plane, closed=closed)


def _changes(lease: Lease, ran: bool, region: Region | None) -> "Response":
    """Where the mask has changed, and what it is there."""
    from starlette.responses import Response

    segmentation = _targeted(lease)
    meta: dict[str, Any] = {"ran_prediction": bool(ran), "bbox": region, "unfinished": segmentation.unfinished}
    packed = b""
    if region is not None:
        part = segmentation.mask[tuple(slice(low, high) for low, high in region)].astype(lease.dtype)
        meta |= {"dtype": part.dtype.name, "shape": list(part.shape)}
        packed = pack_array(part)
    headers = {"X-Meta": json.dumps(meta, separators=(",", ":"))}
    return Response(packed, media_type="application/octet-stream", headers=headers)


def _json(content: Any, status: int = 200, headers: Any = None) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers)
