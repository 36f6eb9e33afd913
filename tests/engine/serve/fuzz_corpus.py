"""What the fuzzers begin with: `python -m tests.engine.serve.fuzz_corpus FOLDER` writes FOLDER/fuzz_image/ and so on."""

import base64
import json
import random
import sys
from pathlib import Path

from tests.engine.serve.pictures import write_pictures
from tests.engine.serve.texts import text

CHAT = {"max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["\n", "é"], "stream": True, "n": 1}
SMALL_BPE = {
    "added_tokens": [{"id": 4, "content": "<|im_end|>", "special": True, "normalized": False}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": [["a", "b"]]},
}


def manifest() -> dict:
    """A small one, as engine/export writes them."""
    tensor = {"name": "image", "dtype": "float32", "shape": [1, "prompts"]}
    package = {"file": "packages/a.pt2", "inputs": [tensor], "outputs": [tensor], "constants": {"w": "w"}}
    about = {"format": "vesalius-bundle", "format_version": 1, "kind": "segmenter", "target": "aoti", "device": "cpu"}
    about |= {"dtype": "float32", "instruction_set": "AVX2", "versions": {"torch": "2"}, "weights": "weights.safetensors"}
    files = {"weights.safetensors": {"sha256": "0" * 64, "bytes": 8}}
    return {**about, "files": files, "packages": {"a": package}, "dimensions": {"prompts": [1, 8]}}


def requests(image: bytes) -> list[bytes]:
    """Bodies of both routes, and a manifest."""
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    pictured = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": pictured}]
    bodies = [
        {"image": uri, "boxes": [[1, 2, 30, 40.5]], "points": [[[3, 4, 1], [5, 6, 0]]]},
        {"image_id": "0" * 64, "points": [[[1, 1, 1]], [[2, 2, 0]]]},
        {"messages": messages, **CHAT, "stream_options": {"include_usage": True}},
        manifest(),
    ]
    return [json.dumps(body).encode() for body in bodies]


def connections(bodies: list[bytes]) -> list[bytes]:
    """What clients send: whole, in chunks, announced, one after another."""
    head = b"POST /segment HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    gets = [b"GET %s HTTP/1.1\r\nHost: localhost:80\r\n\r\n" % path for path in (b"/", b"/healthz", b"/metrics?a=b", b"/none")]
    whole = [head + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in bodies]
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(bodies[1]), bodies[1])
    return [*gets, *whole, chunked, whole[1].replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"), b"".join(gets) + whole[1]]


def main(folder: Path) -> None:
    rng, scratch = random.Random(0), folder / "pictures"
    scratch.mkdir(parents=True, exist_ok=True)
    images = {name: file.read_bytes() for name, file in write_pictures(scratch).items()}
    bodies = requests(images["small.png"])
    texts = [text(rng).encode() for _ in range(200)] + [json.dumps(SMALL_BPE).encode()]
    corpora = {"image": list(images.values()), "request": bodies, "http": connections(bodies), "tokenizer": texts}
    for name, inputs in corpora.items():
        place = folder / f"fuzz_{name}"
        place.mkdir(exist_ok=True)
        for number, content in enumerate(inputs):
            (place / f"seed{number}").write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
