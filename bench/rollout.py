"""Rollouts against transformers' `generate`, on one small Qwen2-VL with images, on one CPU thread.

    python -m bench.rollout [--repetitions 5] [--prompts 8] [--answers 8] [--tokens 64]

Case: hidden 512 in 4 layers, 4 query heads and 1 key head of 128, vision depth 2, vocabulary 4096, random weights, float32. 8
prompts with 8 sampled answers each of at most 64 tokens; prompts of 250 tokens, 196 of them an image of 392 x 392, and of 700,
625 of an image of 700 x 700. An answer stops at an end token, which a random model gives to few.

    generate    transformers': each prompt and image as often as it is answered (what `num_return_sequences` does, too)
    vesalius    ours: one vision pass, one prefill and one copy of the keys a prompt; rows that are finished are dropped

First both answer greedily and must agree. Then process CPU time, interleaved in one process, median; tokens are those of the
answers up to their end, as each provider sampled them. `speedup_P` is the ratio of tokens a second at prompts of P tokens. A CPU
computes products, and of those 8 answers of T tokens save 8 (P + T) / (P + 8 T) times as many: 3.3 at P = 250 and T = 64, 5.0 at
P = 700, 4.5 and 6.1 at T = 32. What is above that is attention and copies.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from bench.grpo_step import QUESTION, VOCABULARY, build_tokenizer, images
from bench.measure import cpu_seconds, environment
from engine.rollout.rollout import rollout
from engine.rollout.sampling import SamplingParams
from models.decoder.shared_prefix import attend_by_prefix
from models.qwen.policy import QwenVLPolicy
from models.qwen.processor import QwenProcessor
from models.qwen.prompts import PromptBatch

LENGTHS = {250: 392, 700: 700}  # tokens of a prompt, and its image's side: a token is 28 x 28 pixels
GREEDY = 8  # tokens that both must agree on


class Size(NamedTuple):
    """How much is asked: prompts, answers to each, tokens an answer at most."""

    prompts: int
    answers: int
    tokens: int


def build_policy() -> QwenVLPolicy:
    """The bench's model with random weights, spread so that its answers vary, and its own tokenizer."""
    tokenizer, special = build_tokenizer([QUESTION])
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "vocab_size": VOCABULARY,
            "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={"depth": 2, "embed_dim": 128, "hidden_size": 512, "num_heads": 4, "mlp_ratio": 2},
        **special,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 2 / 512**0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return QwenVLPolicy(model, QwenProcessor(tokenizer, Qwen2VLImageProcessorPil(), "qwen2_vl"))


def prompts_of(policy: QwenVLPolicy, number: int, length: int, side: int) -> PromptBatch:
    """`number` prompts of `length` tokens with an image each; the question is followed by names that no text has."""
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    encoded = [policy.processor.encode(prompt, [image]) for image in images(number, side)]
    rows = []
    for index, one in enumerate(encoded):
        generator = torch.Generator().manual_seed(index)
        filler = torch.randint(VOCABULARY - 1000, VOCABULARY, (length - len(one.input_ids),), generator=generator)
        rows.append(replace(one, input_ids=torch.cat([one.input_ids[:-4], filler, one.input_ids[-4:]])))
    return policy.batch(rows)


@torch.no_grad()
def generate(policy: QwenVLPolicy, batch: PromptBatch, size: Size, *, greedy: bool) -> Tensor:
    """transformers' answers, ids (prompts * answers, tokens)."""
    policy.base.model.language_model.config._attn_implementation = "sdpa"
    ids = batch.input_ids.repeat_interleave(size.answers, 0)
    out = policy.base.generate(
        input_ids=ids,
        attention_mask=batch.attention_mask.repeat_interleave(size.answers, 0),
        pixel_values=torch.cat([values for values in batch.pixel_values for _ in range(size.answers)]),
        image_grid_thw=torch.stack([grid for grid in batch.image_grid_thw for _ in range(size.answers)]),
        mm_token_type_ids=(ids == policy.base.config.image_token_id).int(),
        max_new_tokens=size.tokens,
        **({"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}),  # from all tokens, as ours
    )
    return out[:, ids.shape[1] :]


def ours(policy: QwenVLPolicy, batch: PromptBatch, size: Size, *, greedy: bool) -> Tensor:
    """Our answers, as `generate` gives them."""
    attend_by_prefix(policy.base.model.language_model.config)
    params = SamplingParams(temperature=0 if greedy else 1)
    return rollout(policy, batch, params, num_generations=size.answers, max_new_tokens=size.tokens).completion_ids


def answer_tokens(policy: QwenVLPolicy, ids: Tensor) -> int:
    """Tokens of all answers, each up to and with its end."""
    ends = torch.isin(ids, torch.tensor(policy.eos_token_ids))
    return int((ends.cumsum(1) - ends.long() == 0).sum())


def measure(policy: QwenVLPolicy, batch: PromptBatch, size: Size, repetitions: int) -> list[dict]:
    """A row a provider: seconds of a rollout, its tokens, and the tokens a second. SystemExit where greedy answers differ."""
    ways = {"generate": generate, "vesalius": ours}
    few = size._replace(answers=1, tokens=min(GREEDY, size.tokens))
    first, second = (way(policy, batch, few, greedy=True) for way in ways.values())
    if first.tolist() != second.tolist():
        raise SystemExit("error: the greedy answers of the two differ")
    found: dict[str, Tensor] = {}

    def run(name: str) -> None:
        torch.manual_seed(0)
        found[name] = ways[name](policy, batch, size, greedy=False)

    seconds = cpu_seconds({name: partial(run, name) for name in ways}, repetitions)
    counts = {name: answer_tokens(policy, ids) for name, ids in found.items()}
    return [
        {"provider": name, "seconds": seconds[name], "tokens": counts[name], "tokens_per_s": counts[name] / seconds[name]}
        for name in ways
    ]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repetitions", 5), ("prompts", 8), ("answers", 8), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--lengths", type=int, nargs="+", choices=list(LENGTHS), default=list(LENGTHS), help="of the prompts [all]")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    policy, size = build_policy(), Size(args.prompts, args.answers, args.tokens)
    result, rows = {}, []
    for length in args.lengths:
        measured = measure(policy, prompts_of(policy, size.prompts, length, LENGTHS[length]), size, args.repetitions)
        for row in measured:
            print(
                f"P = {length}  {row['provider']:9s} {row['seconds']:7.2f} s {row['tokens_per_s']:8.1f} tokens/s", file=sys.stderr
            )
        theirs, mine = (row["tokens_per_s"] for row in measured)
        result[f"speedup_{length}"] = round(mine / theirs, 3)
        rows += [{"prompt_tokens": length} | row for row in measured]
    versions = {"transformers": version("transformers")}
    result |= size._asdict() | environment(torch.device("cpu")) | versions | {"rows": rows}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
