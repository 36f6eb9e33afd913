"""Supervised fine-tuning (SFT) of a policy on `transformers.Trainer`: a prompt with its images, and the answer to learn.

    loss = -(1 / M) sum of log p(token)     over the M tokens of all answers of an optimizer step, their end tokens included

M is counted over all micro-batches and processes before the first of them runs, so the gradient is that of the whole step however
it is divided. The prompt is never a target, and the single-pass head sees the answers' states only.

Letters: B prompts of a micro-batch, T tokens of its longest answer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from engine.errors import InputError
from engine.rollout.policy import Policy
from engine.training.checkpoints import WholeCheckpoints
from engine.training.sft_config import SFTConfig
from engine.training.step_log import peak_memory_gb
from engine.training.step_sampler import StepSampler
from kernels.linear_logprob import SKIP, head_operands, linear_logprob_forward


@dataclass
class MicroBatch:
    """Rows of one forward pass and the token ids of their answers. Images become tensors only when the pass begins."""

    rows: list[dict]
    answers: list[list[int]]


class SFTTrainer(WholeCheckpoints, Trainer):
    """`Trainer` whose loss is that above.

    `policy` is an `engine.rollout.policy.Policy` whose processor also has `answer_ids(texts)`. Of a dataset row `prompt_of(row)`
    gives the chat messages, whose PIL images are under `images`, and `answer_of(row)` the text to learn.
    """

    args: SFTConfig

    def __init__(self, policy: Policy, prompt_of: Callable, answer_of: Callable, args: SFTConfig, train_dataset, **kwargs):
        super().__init__(
            model=policy.model,
            args=args,
            train_dataset=train_dataset,
            data_collator=list,
            processing_class=policy.processor,
            **kwargs,
        )
        if self.is_deepspeed_enabled and self.accelerator.deepspeed_plugin.zero_stage == 3:
            raise InputError("--deepspeed: ZeRO-3 is not supported, since the head needs whole weights on every device; use ZeRO-2")
        self.policy, self.prompt_of, self.answer_of = policy, prompt_of, answer_of
        self.loss_is_scaled_for_ga = True  # by the tokens of the step
        self.model_accepts_loss_kwargs = False
        self.counts: list[torch.Tensor] = []  # since the last log: (tokens, those the model would choose, sum of entropies)
        self.started = None

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return StepSampler.of(self)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list[MicroBatch], torch.Tensor]:
        """One optimizer step's rows -> its micro-batches and the number of answer tokens they have per process."""
        self.started = self.started or time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        encode = self.policy.processor.answer_ids
        micro_batches = [MicroBatch(rows, encode([self.answer_of(row) for row in rows])) for rows in batches]
        tokens = sum(len(ids) for micro in micro_batches for ids in micro.answers)
        return micro_batches, self.accelerator.reduce(torch.tensor(float(tokens), device=self.args.device), "mean")

    def compute_loss(self, model, inputs: MicroBatch, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """This micro-batch's share of the step's loss, in nats per answer token of the step."""
        rows = inputs.rows
        prompts = self.policy.encode(
            [self.prompt_of(row) for row in rows], [row["images"] for row in rows], [row.get("image_id") for row in rows]
        )
        parts = [torch.tensor(ids) for ids in inputs.answers]
        targets = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=SKIP).to(self.args.device)  # (B, T)
        answer_ids = targets.where(targets != SKIP, self.policy.pad_token_id)

        def head(hidden, weight):
            return answer_likelihood(hidden.flatten(0, 1), weight, targets.flatten())

        logprob, counts = model(**self.policy.answer_inputs(prompts, answer_ids[:, None]), head=head)
        self.counts.append(counts)
        return -logprob / (num_items_in_batch if num_items_in_batch is not None else counts[0])

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs

    def floating_point_ops(self, inputs) -> int:
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the answers' tokens were like since the last log, over all processes, under TRL's names where it has them."""
        if "loss" in logs and self.counts:
            tokens, chosen, entropy = self.accelerator.reduce(torch.stack(self.counts).sum(0), "sum").tolist()
            seconds = time.perf_counter() - self.started
            self.state.num_input_tokens_seen += int(tokens)  # kept in checkpoints
            logs = logs | {
                "mean_token_accuracy": chosen / tokens,
                "entropy": entropy / tokens,
                "answer_tokens": self.state.num_input_tokens_seen,
                "tokens_per_second": tokens / seconds,
                "seconds/step": seconds * self.args.gradient_accumulation_steps / len(self.counts),
                "peak_memory_gb": peak_memory_gb(self.args.device),
            }
            self.counts.clear()
            self.started = None
        super().log(logs, start_time)


def answer_likelihood(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N, H), weight (V, H), targets (N,), SKIP where none -> the sum of log p, and the counts of `SFTTrainer.counts`.

    A target is what greedy decoding takes where its logit is the largest, max z. There log p = -log sum exp(z - max z), and the
    head keeps that sum for its backward pass; 1e-5 is rounding.
    """
    logprobs, entropy, stats = linear_logprob_forward(*head_operands(hidden, weight), targets, 1.0, 0)
    counted = targets != SKIP
    chosen = counted & (logprobs.detach() + stats[1].clamp(min=1).log() > -1e-5)
    return logprobs.sum(), torch.stack([counted.sum(), chosen.sum(), entropy.detach().sum()])
