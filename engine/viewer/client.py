"""What a viewer does, in short: a box in a volume, and the mask that comes of it."""

import json
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np

from engine.viewer.arrays import pack_array, unpack_array


def segment_box(address: str, key: str | None, voxels: np.ndarray, spacing: Sequence[float], box: list[list[int]]) -> np.ndarray:
    """The mask [X, Y, Z] bool of what is in the box ([low, high] of each axis) of `voxels` [X, Y, Z]. Raises httpx2.HTTPError."""
    mask = np.zeros(voxels.shape, bool)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx2.Client(base_url=address, headers=headers, timeout=600, trust_env=False) as client:

        def ask(route: str, **request: Any) -> Any:
            answer = client.post(f"/{route}", **request).raise_for_status()
            if "x-meta" not in answer.headers:
                return answer.json()
            change = json.loads(answer.headers["x-meta"])
            if change["bbox"]:
                mask[tuple(slice(*side) for side in change["bbox"])] = unpack_array(answer.content, mask.nbytes)
            return change["unfinished"]

        client.headers["X-Lease-Token"] = ask("claim")["lease_token"]
        meta = json.dumps({"image_properties": {"spacing": list(spacing)}})
        ask("set_image", content=pack_array(voxels[None]), headers={"X-Meta": meta})
        ask("set_target_buffer", json={"shape": voxels.shape, "dtype": "bool"})
        unfinished = ask("add_bbox_interaction", json={"bbox_coords": box, "include_interaction": True})
        while unfinished:
            unfinished = ask("predict", json={})
        ask("release")
    return mask
