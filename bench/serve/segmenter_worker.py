"""A segmenter in Python, eager or with its networks compiled by torch.compile: file in, file out, as `vesalius-seg` does it.

    python -m bench.serve.segmenter_worker eager|compiled CHECKPOINT

Each line on standard input is {"image": FILE, "box": [x1, y1, x2, y2], "output": FILE.png}.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from engine.data.images import open_image
from models.sam.loading import load_sam, sam_kind
from models.sam.predictor import Predictor


def main(kind: str, checkpoint: Path) -> None:
    torch.set_num_threads(1)
    model = load_sam(sam_kind(checkpoint), checkpoint).eval()
    if kind == "compiled":
        model.image_encoder.compile()
        model.mask_decoder.compile()
    predictor = Predictor(model)
    print(json.dumps({"version": torch.__version__}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        [mask] = predictor.masks_of(open_image(work["image"]), [work["box"]])
        Image.fromarray(mask).save(work["output"])
        print("{}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
