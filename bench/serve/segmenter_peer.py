"""A segmenter's ONNX files in another runtime, in an environment that has nothing of ours: run by `bench.serve` as a file.

    python segmenter_peer.py onnxruntime|openvino FOLDER

Each line on standard input is {"inputs": FILE.npz, "output": FILE.npy}: an image as the network takes it and prompts; the logits of
masks are written. Preparing the image and scaling the mask are not its work, which is in the runtime's favour.
"""

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def onnxruntime_model(file: Path) -> Run:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def openvino_model(file: Path) -> Run:
    openvino = importlib.import_module("openvino")
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda inputs: [np.array(value) for value in compiled(inputs).values()]


def main(runtime: str, folder: Path) -> None:
    build = {"onnxruntime": onnxruntime_model, "openvino": openvino_model}[runtime]
    encoder, decoder = (build(folder / f"{name}.onnx") for name in ("image_encoder", "mask_decoder"))
    print(json.dumps({"version": importlib.metadata.version(runtime)}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        given = dict(np.load(work["inputs"]))
        (embeddings,) = encoder({"image": given.pop("image")})
        masks, _ = decoder({"image_embeddings": embeddings, **given})
        np.save(work["output"], masks)
        print("{}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
