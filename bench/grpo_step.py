"""One GRPO step against TRL's, on the same small Qwen2.5-VL with images, on one CPU thread.

    python -m bench.grpo_step

Case: hidden 256, 4 layers, vision depth 2, vocabulary 4096; 2 prompts x 8 answers of 64 tokens, 392 x 392 images (196 visual
tokens), beta 0.04, float32. Each provider runs in a process of its own; process CPU time, median over the steps after the first;
memory is the largest resident size of the process, imports included. Answers stop at an end token, which the random model gives to
about 3 % of them.

    trl                          TRL's GRPOTrainer: `generate` and the forward see each prompt and image once per answer
    vesalius                     ours: one vision pass, one prefill and one training row per prompt, single-pass head
    vesalius, vision per answer  ours, but the vision tower runs once per answer, as TRL's does
    vesalius, pairs share        ours, but two answers share a prompt instead of eight
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

PROMPTS, ANSWERS, TOKENS = 2, 8, 64
PROVIDERS = ("trl", "vesalius", "vesalius, vision per answer", "vesalius, pairs share")
SETTINGS = {
    "num_generations": ANSWERS,
    "max_completion_length": TOKENS,
    "gradient_accumulation_steps": 1,
    "beta": 0.04,
    "loss_type": "grpo",
    "learning_rate": 1e-6,
    "temperature": 1.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 0,
}
VOCABULARY = 4096  # tokens of the model, and of its tokenizer, which pads its own with names that no text has
QUESTION = "What imaging technique is employed for obtaining this image? A)MRI, B)Ultrasound, C)CT, D)X-Ray"


class Clock:
    """Adds up the CPU time of wrapped functions, by step."""

    def __init__(self):
        self.steps, self.rollouts, self._rollout, self._last = [], [], 0.0, None

    def wrap(self, owner, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._rollout += time.process_time() - start

        setattr(owner, name, timed)

    def end_step(self) -> None:
        now = time.process_time()
        if self._last is not None:
            self.steps.append(now - self._last)
            self.rollouts.append(self._rollout)
        self._last, self._rollout = now, 0.0


def build_tokenizer(texts: list[str]) -> tuple[Any, dict[str, int]]:
    """A tokenizer of VOCABULARY tokens, trained on these texts, and a Qwen2-VL configuration's ids of its image tokens."""
    from models.starter.qwen_vl import train_tokenizer

    tokenizer = train_tokenizer(texts)
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), VOCABULARY)])
    tokens = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return tokenizer, {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in tokens.items()}


def save_model(folder: str) -> None:
    """The bench's checkpoint: random weights, its own tokenizer."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    from engine.tasks.templates import TEMPLATES
    from models.qwen.processor import QwenProcessor

    tokenizer, special = build_tokenizer([QUESTION, *TEMPLATES.values()])
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
        **special,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    QwenProcessor(tokenizer, Qwen2VLImageProcessorPil(), "qwen2_5_vl").save_pretrained(folder)


def images(num: int, side: int = 392) -> list:
    import numpy as np
    from PIL import Image

    return [Image.fromarray(np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype="uint8")) for i in range(num)]


def variety(prompts, completions, **columns) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [len(set(text)) / 100 for text in texts]


def end_of_steps(clock: Clock):
    from transformers import TrainerCallback

    class EndOfSteps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.end_step()

    return EndOfSteps()


def run_trl(model: str, output: str, steps: int, clock: Clock) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil
    from trl import GRPOConfig, GRPOTrainer

    class ImageProcessor(Qwen2_5_VLProcessor):
        """Without its video half, which needs torchvision."""

        def check_argument_for_proper_class(self, name, argument):
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    pictures = Qwen2VLImageProcessorPil.from_pretrained(model)
    processor = ImageProcessor(pictures, tokenizer, video_processor=None, chat_template=tokenizer.chat_template)
    prompt = [{"role": "user", "content": QUESTION}]
    rows = Dataset.from_list([{"prompt": prompt, "image": image} for image in images((steps + 1) * PROMPTS)])
    args = GRPOConfig(
        output_dir=output,
        per_device_train_batch_size=PROMPTS * ANSWERS,
        max_steps=steps + 1,
        use_bias_correction_kl=False,
        **SETTINGS,
    )
    policy = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    trainer = GRPOTrainer(
        policy, variety, args=args, train_dataset=rows, processing_class=processor, callbacks=[end_of_steps(clock)]
    )
    clock.wrap(trainer, "_generate")
    trainer.train()


def run_vesalius(model: str, output: str, steps: int, clock: Clock, provider: str) -> None:
    import torch

    import models.qwen.policy
    from engine.tasks.multiple_choice import MultipleChoice
    from engine.training.config.grpo import GRPOConfig
    from engine.training.grpo import GRPOTrainer
    from models.loading import load_policy

    copies = 1
    if provider.endswith("vision per answer"):
        features = models.qwen.policy._image_features

        def per_answer(model, pixel_values, grids):
            copies = features(model, pixel_values * ANSWERS, grids * ANSWERS)
            return tuple(torch.stack(copies[i :: len(grids)]).mean(0) for i in range(len(grids)))

        models.qwen.policy._image_features = per_answer
    if provider.endswith("pairs share"):
        copies = ANSWERS // 2  # two answers a row is the least a group can have
    pictures = images((steps + 1) * PROMPTS)
    rows = [{"images": [image], "problem": QUESTION} for image in pictures for _ in range(copies)]
    settings = SETTINGS | {"num_generations": ANSWERS // copies, "per_device_train_batch_size": PROMPTS * copies}
    args = GRPOConfig(output_dir=output, max_steps=steps + 1, **settings)

    class Variety(MultipleChoice):
        """Asks the bare question and rewards as TRL's run does."""

        rewards = [variety]

        def prompt(self, row):
            return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["problem"]}]}]

        def score(self, row, answer):
            return {}

        def shown(self, row):
            return row["problem"], ""

    policy = load_policy(model)
    trainer = GRPOTrainer(policy, Variety(template=""), args, rows, callbacks=[end_of_steps(clock)])
    clock.wrap(policy.processor, "encode")
    clock.wrap(trainer.sampler.sampler, "sample")
    trainer.train()


def run_provider(provider: str, steps: int, model: str) -> dict:
    """One row, measured in this process."""
    import torch

    from engine.device import peak_memory_gb

    torch.set_num_threads(1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        if provider == "trl":
            run_trl(model, output, steps, clock)
        else:
            run_vesalius(model, output, steps, clock, provider)
    step, rollout = statistics.median(clock.steps), statistics.median(clock.rollouts)
    peak = peak_memory_gb(torch.device("cpu"))
    return {"provider": provider, "step_s": step, "rollout_s": rollout, "train_s": step - rollout, "peak_rss_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="measured steps after the first [5]")
    parser.add_argument("--provider", choices=PROVIDERS, help="measure this one alone, in this process")
    parser.add_argument("--model", help="the checkpoint of the bench (made where it is not given)")
    args = parser.parse_args()
    if args.provider:
        print(json.dumps(run_provider(args.provider, args.steps, args.model)))
        return
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
    rows = {}
    with tempfile.TemporaryDirectory() as model:
        save_model(model)
        for provider in PROVIDERS:
            command = [
                sys.executable,
                "-m",
                "bench.grpo_step",
                "--provider",
                provider,
                "--steps",
                str(args.steps),
                "--model",
                model,
            ]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{provider} failed:\n{done.stderr[-2000:]}")
            row = rows[provider] = json.loads(done.stdout.strip().splitlines()[-1])
            timing = f"step {row['step_s']:6.2f} s  rollout {row['rollout_s']:6.2f} s  training {row['train_s']:6.2f} s"
            print(f"{provider:29s} {timing}  peak {row['peak_rss_gb']:.2f} GB", file=sys.stderr)
    ours, theirs = rows["vesalius"], rows["trl"]
    ratios = {f"{name}_ratio": ours[key] / theirs[key] for name, key in RATIOS.items()}
    versions = {name: version(name) for name in ("torch", "transformers", "trl")}
    print(
        json.dumps(
            {name: round(value, 4) for name, value in ratios.items()}
            | {"device": "cpu, 1 thread", "versions": versions, "rows": list(rows.values())}
        )
    )


RATIOS = {"step": "step_s", "rollout": "rollout_s", "train": "train_s", "memory": "peak_rss_gb"}

if __name__ == "__main__":
    main()
