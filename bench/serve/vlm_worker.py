"""A Qwen-VL in Python by transformers' generate, greedy, with its own attention: file in, answer out, as `vesalius-vlm` does it.

    python -m bench.serve.vlm_worker CHECKPOINT

Each line on standard input is {"image": FILE, "question": text, "tokens": at most so many}.
"""

import json
import sys

import torch
import transformers

from engine.data.images import open_image
from models.qwen.policy import load_qwen_vl


@torch.inference_mode()
def main(checkpoint: str) -> None:
    torch.set_num_threads(1)
    policy = load_qwen_vl(checkpoint)
    model, ends = policy.base.eval(), policy.eos_token_ids
    for network in (model.model.visual, model.model.language_model):
        network.config._attn_implementation = "sdpa"
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        content = [{"type": "image"}, {"type": "text", "text": work["question"]}]
        batch = policy.batch([policy.processor.encode([{"role": "user", "content": content}], [open_image(work["image"])])])
        given = {"pixel_values": torch.cat(batch.pixel_values), "image_grid_thw": torch.stack(batch.image_grid_thw)}
        pictured = (batch.input_ids == model.config.image_token_id).int()
        ids = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=pictured,
            max_new_tokens=work["tokens"],
            do_sample=False,
            **given,
        )[0, batch.input_ids.shape[1] :].tolist()
        answer = ids[:-1] if ids[-1] in ends else ids
        print(json.dumps({"text": policy.processor.decode([answer])[0], "tokens": len(answer)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
