"""nnInteractive's routes (as nninteractive-client 2.6.0 has them), answered with a `Segmenter`.

GET  /healthz, /capabilities       whether it is there; what may be drawn
POST /claim                        {"lease_token", "idle_timeout_seconds", "liveness_timeout_seconds", ...}; 503 where all are taken

All that follows has the lease in X-Lease-Token, and is 410 without one. An array is packed (`arrays.py`), with JSON in X-Meta.

POST /heartbeat, /release;  GET /lease_status
POST /set_image                    array [1 or 3, X, Y, Z], {"image_properties": {"spacing": [x, y, z]}}
POST /set_target_buffer            {"shape": [X, Y, Z], "dtype": that of masks that are sent}; a new object begins
POST /add_bbox_interaction         {"bbox_coords": [[low, high], ...], "include_interaction", "run_prediction"}
POST /add_point_interaction        {"coordinates": [x, y, z], ...}
POST /add_scribble_interaction, /add_lasso_interaction    array, {"interaction_bbox", ...}
POST /add_initial_seg_interaction  array [X, Y, Z], {"run_prediction"}
POST /predict, /undo, /reset_interactions, /set_do_autozoom

What changes the mask is answered with X-Meta {"ran_prediction", "bbox", "unfinished"} and the array of the mask in that box.
`unfinished` is ours: there was no time for all slices, and /predict goes on. An error is {"detail": one line}.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from engine.viewer.access import Access
from engine.viewer.arrays import pack_array, unpack_array
from engine.viewer.leases import Lease, Leases
from engine.viewer.marks import Mark, box_mark, drawn_mark, point_mark
from engine.viewer.request import JSON_BYTES, Refusal, flag, intervals, numbers, read_body, read_object, refused
from engine.viewer.segmentation import Region, Segmentation
from engine.viewer.segmenter import Segmenter
from engine.viewer.stack import Stack

PATIENCE = 40.0  # seconds from a request until no further slice is begun: its client gives up after 60
TARGETS = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()
CAPABILITIES = {
    "supported_interactions": {"points": True, "bbox2d": True, "bbox3d": False, "scribble": True, "lasso": True},
    "supports_initial_label": True,
    "supports_zero_shot_label_refinement": True,
    "supports_undo": True,
    # What follows is of nnInteractive's networks; its clients look for it.
    "do_autozoom": False,
    "preferred_scribble_thickness": [1, 1, 1],
    "interaction_decay": 1.0,
    "inference_session_version": "2.6.0",
    "num_interaction_channels": 7,
    "channel_mapping": {"prev_seg": 0, "bbox2d": [1, 2], "bbox3d": [1, 2], "lasso": [1, 2], "points": [3, 4], "scribble": [5, 6]},
}
logger = logging.getLogger(__name__)


class Call(NamedTuple):
    """A session's request: its JSON, its array where it has one, and when it came."""

    lease: Lease
    values: dict[str, Any]
    array: Any
    start: float

    @property
    def segmentation(self) -> Segmentation:
        """Refusal where there is no image yet."""
        if self.lease.segmentation is None:
            raise Refusal(400, "there is no image yet (expected set_image first)")
        return self.lease.segmentation

    @property
    def begun(self) -> Segmentation:
        """Refusal where nothing can be drawn yet."""
        if self.segmentation is not None and self.lease.dtype is None:
            raise Refusal(400, "there is no target buffer yet (expected set_target_buffer first)")
        return self.segmentation


class Viewer:
    """The server's state. One thread runs the model; two more do what else takes time."""

    def __init__(self, segmenter: Segmenter, leases: Leases, most_bytes: int, clock: Callable[[], float] = time.monotonic):
        self.segmenter, self.leases, self.most_bytes, self.clock = segmenter, leases, most_bytes, clock
        self.model, self.others = ThreadPoolExecutor(1, "model"), ThreadPoolExecutor(2, "arrays")
        self.stopping, self.predictions = False, 0

    def stop(self) -> None:
        """Waits for what is being computed, which ends at its next slice."""
        self.stopping = True
        for pool in (self.model, self.others):
            pool.shutdown(cancel_futures=True)

    def app(self, api_key: str | None) -> Access:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        def at_once(answer: Callable[[str], Any]) -> Any:
            async def endpoint(request: Any) -> Any:
                return _json(answer(_token(request)))

            return endpoint

        async def refusal(request: Any, error: Any) -> Any:
            return _json({"detail": error.detail}, error.status, error.headers)

        async def unknown(request: Any, error: Any) -> Any:
            return _json({"detail": error.detail}, error.status_code, error.headers)

        async def fault(request: Any, error: Exception) -> Any:
            return _json({"detail": "the server has failed; its log says where"}, 500)

        leases = self.leases
        get: dict[str, Callable[[str], Any]] = {
            "healthz": lambda token: {"ok": True},
            "capabilities": lambda token: CAPABILITIES | {"license": self.segmenter.license},
            "lease_status": lambda token: self._heartbeat(token) | {"idle_timeout_seconds": leases.idle_seconds},
        }
        post = {"claim": self._claim, "heartbeat": self._heartbeat, "release": self._release}
        routes = [Route(f"/{name}", at_once(answer)) for name, answer in get.items()]
        routes += [Route(f"/{name}", at_once(answer), methods=["POST"]) for name, answer in post.items()]
        arrays = (self.set_image, self.add_scribble_interaction, self.add_lasso_interaction, self.add_initial_seg_interaction)
        drawn = (*arrays[1:], self.add_bbox_interaction, self.add_point_interaction, self.predict)
        plain = (self.set_target_buffer, self.set_do_autozoom, self.reset_interactions, self.undo)
        for work in {*arrays, *drawn, *plain}:
            endpoint = self._for_session(work, work in arrays, self.model if work in drawn else self.others)
            routes.append(Route(f"/{work.__name__}", endpoint, methods=["POST"]))
        return Access(
            Starlette(routes=routes, exception_handlers={Refusal: refusal, HTTPException: unknown, Exception: fault}), api_key
        )

    def _claim(self, token: str) -> dict[str, Any]:
        token, leases = self.leases.claim(), self.leases
        logger.info("a session begins, %d of %d", len(leases.held), leases.most)
        times = {"idle_timeout_seconds": leases.idle_seconds, "liveness_timeout_seconds": leases.alive_seconds}
        return {"lease_token": token, "max_sessions": leases.most} | times

    def _heartbeat(self, token: str) -> dict[str, Any]:
        return {"remaining_seconds": self.leases.remaining(self.leases.find(token))}

    def _release(self, token: str) -> dict[str, Any]:
        self.leases.held.pop(token, None)
        return {"released": True}

    def _for_session(self, work: Callable[[Call], Any], packed: bool, pool: ThreadPoolExecutor) -> Any:
        """The endpoint that does `work` in a thread of the pool, with the lease held and the request read."""

        async def endpoint(request: Any) -> Any:
            start, token = self.clock(), _token(request)
            lease = self.leases.find(token)
            async with lease.lock:
                self.leases.find(token)  # it may have ended since
                body = await read_body(request, self.most_bytes + JSON_BYTES if packed else JSON_BYTES)
                values = read_object(request.headers.get("x-meta", "{}"), "X-Meta") if packed else read_object(body, "the body")

                def answer() -> Any:
                    with refused():
                        array = unpack_array(body, self.most_bytes) if packed else None
                    return work(Call(lease, values, array, start))

                try:
                    lease.worked = self.clock()
                    return await asyncio.get_running_loop().run_in_executor(pool, answer)
                except MemoryError:
                    raise Refusal(413, "there is no memory for this") from None
                finally:
                    lease.worked = lease.heard = self.clock()

        return endpoint

    # A session's requests, one after the other, each in a thread.

    def set_image(self, call: Call) -> Any:
        image, properties = call.array, call.values.get("image_properties")
        if image.ndim != 4 or image.shape[0] not in (1, 3):
            raise Refusal(400, f"an image of shape {list(image.shape)} (expected [1 or 3, X, Y, Z])")
        given = properties.get("spacing") if isinstance(properties, dict) else None
        spacing = [1.0, 1.0, 1.0] if given is None else numbers(given, "spacing", 3)
        if min(spacing) <= 0:
            raise Refusal(400, "spacing: expected 3 numbers, more than 0")
        call.lease.segmentation, call.lease.dtype = None, None  # before the next one takes as much
        call.lease.segmentation = Segmentation(Stack(image, spacing))
        return _json({"original_image_shape": list(image.shape)})

    def set_target_buffer(self, call: Call) -> Any:
        shape, dtype = list(call.segmentation.stack.shape), call.values.get("dtype")
        if numbers(call.values.get("shape"), "shape", 3) != shape:
            raise Refusal(400, f"shape: expected that of the image, {shape}")
        if dtype not in TARGETS:
            raise Refusal(400, f"dtype: expected one of {', '.join(TARGETS)}")
        call.segmentation.clear()
        call.lease.dtype = np.dtype(dtype)
        return _json({})

    def set_do_autozoom(self, call: Call) -> Any:
        flag(call.values, "do_autozoom")  # there is nothing to zoom
        return _json({})

    def reset_interactions(self, call: Call) -> Any:
        if call.lease.segmentation is not None:
            call.lease.segmentation.clear()
        return _json({})

    def add_bbox_interaction(self, call: Call) -> Any:
        box, stack = intervals(call.values.get("bbox_coords"), "bbox_coords"), call.begun.stack
        with refused():
            mark = box_mark(box, flag(call.values, "include_interaction"), stack.shape, stack.axis)
        return self._drawn(call, mark)

    def add_point_interaction(self, call: Call) -> Any:
        place, begun = numbers(call.values.get("coordinates"), "coordinates", 3), call.begun
        with refused():
            mark = point_mark(place, flag(call.values, "include_interaction"), begun.stack.shape, begun.plane)
        return self._drawn(call, mark)

    def add_scribble_interaction(self, call: Call) -> Any:
        return self._image_drawn(call, closed=False)

    def add_lasso_interaction(self, call: Call) -> Any:
        return self._image_drawn(call, closed=True)

    def add_initial_seg_interaction(self, call: Call) -> Any:
        mask, begun, refine = call.array, call.begun, flag(call.values, "run_prediction", False)
        if mask.shape != begun.stack.shape:
            raise Refusal(400, f"a mask of shape {list(mask.shape)} (expected {list(begun.stack.shape)})")
        begun.begin_with(mask != 0, refine=refine)
        return self.predict(call) if refine else _changes(call, False, None)

    def predict(self, call: Call) -> Any:
        begun = call.begun
        ran, region = begun.predict(self.segmenter, lambda: self.stopping or self.clock() - call.start > PATIENCE)
        self.predictions += ran
        logger.info("a prediction in %.1f s%s", self.clock() - call.start, ", unfinished" if begun.unfinished else "")
        return _changes(call, ran, region)

    def undo(self, call: Call) -> Any:
        return _changes(call, *call.begun.undo())

    def _image_drawn(self, call: Call, *, closed: bool) -> Any:
        begun, box = call.begun, call.values.get("interaction_bbox")
        shape = begun.stack.shape
        inside: list[list[float]] = [[0, side] for side in shape] if box is None else intervals(box, "interaction_bbox")
        if any(low % 1 or high % 1 or not 0 <= low < high <= side for (low, high), side in zip(inside, shape, strict=True)):
            raise Refusal(400, f"interaction_bbox: expected whole numbers within the image of {list(shape)} voxels")
        if call.array.shape != tuple(high - low for low, high in inside):
            raise Refusal(400, f"what is drawn has the shape {list(call.array.shape)} (expected that of its box)")
        corner, include = [int(low) for low, _ in inside], flag(call.values, "include_interaction")
        with refused():
            mark = drawn_mark(call.array, corner, include, begun.plane, closed=closed)
        return self._drawn(call, mark)

    def _drawn(self, call: Call, mark: Mark) -> Any:
        run = flag(call.values, "run_prediction", True)
        with refused():
            call.begun.add(mark)
        return self.predict(call) if run else _changes(call, False, None)


def _token(request: Any) -> str:
    return request.headers.get("x-lease-token", "")


def _changes(call: Call, ran: bool, region: Region | None) -> Any:
    """Where the mask has changed, and what it is there."""
    from starlette.responses import Response

    meta: dict[str, Any] = {"ran_prediction": ran, "bbox": region, "unfinished": call.begun.unfinished}
    packed = b""
    if region is not None:
        part = call.begun.mask[tuple(slice(low, high) for low, high in region)].astype(call.lease.dtype)
        meta, packed = meta | {"dtype": part.dtype.name, "shape": list(part.shape)}, pack_array(part)
    return Response(packed, media_type="application/octet-stream", headers={"X-Meta": json.dumps(meta, separators=(",", ":"))})


def _json(content: Any, status: int = 200, headers: Any = None) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers)
