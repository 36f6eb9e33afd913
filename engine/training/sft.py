"""Supervised fine-tuning (SFT) of a policy: a prompt with its images, and the answer to learn.

    loss = -(1 / M) sum of log p(token)     over the M tokens of all answers of an optimizer step, their end tokens included

M is counted over all micro-batches and processes before the first of them runs, so the gradient is that of the whole step however
it is divided. The prompt is never a target, and the single-pass head sees the answers' states only.

Letters: B prompts of a micro-batch, T tokens of its longest answer.
"""

import time
from typing import Any

import torch
from torch.utils.data import Sampler

from engine.data.rows import Rows
from engine.rollout.answers import Answer
from engine.rollout.grounded import greedy_answers
from engine.rollout.policy import Policy
from engine.tasks.task import Task
from engine.training.compiled.layers import SHORTEST
from engine.training.config.sft import SFTConfig
from engine.training.encoded_rows import EncodedRows, PatchMaker
from engine.training.step_sampler import StepSampler
from engine.training.trainer import Trainer
from kernels.linear_logprob import SKIP, head_operands, linear_logprob_forward


class SFTTrainer(Trainer):
    """Teaches `policy` the answers `task.target(row)` to the prompts of `rows`."""

    args: SFTConfig
    headline_metric = "loss"
    may_divide = True

    def __init__(self, policy: Policy, task: Task, args: SFTConfig, rows: Rows, **options: Any) -> None:
        encoded = EncodedRows(rows, task, policy.processor, targets=True, loader=args.loader)
        super().__init__(policy.model, args, encoded, data_collator=list, processing_class=policy.processor, **options)
        self.attend_as_asked(policy, args)
        self.pictures = PatchMaker(policy.processor, args.device) if args.loader == "dali" else None
        self.policy, self.greedy = policy, greedy_answers(policy, task.prompt, args.max_completion_length)
        self.loss_is_scaled_for_ga = True  # by the tokens of the step
        self.counts: list[torch.Tensor] = []  # since the last log: (tokens, those the model would choose, sum of entropies)
        self.started: float | None = None

    def answer(self, rows: list[dict]) -> list[Answer]:
        self.model.eval()
        with self.accelerator.autocast():
            return self.greedy(rows)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return StepSampler.of(self)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[list[dict]], torch.Tensor | None]:
        """The micro-batches of one optimizer step, and the number of answer tokens they have per process."""
        self.started = self.started or time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        tokens = sum(len(row["answer_ids"]) for rows in batches for row in rows)
        return batches, self.accelerator.reduce(torch.tensor(float(tokens), device=self.args.device), "mean")

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """This micro-batch's share of the step's loss, in nats per answer token of the step."""
        prompts = self.policy.batch([row["encoded"] for row in inputs])
        shortest = SHORTEST if self.args.torch_compile else 1
        answer_ids, targets = padded_answers([row["answer_ids"] for row in inputs], self.policy, shortest)

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logprob, counts = answer_likelihood(hidden.flatten(0, 1), weight, targets.flatten())
            of_text = -logprob / (num_items_in_batch if num_items_in_batch is not None else counts[0])
            return self.share_of_loss(of_text, inputs, prompts, hidden) + self.auxiliary_loss(self.policy), counts

        with self.accelerator.autocast():
            asked = self.policy.answer_inputs(prompts, answer_ids[:, None])
        loss, counts = model(**asked, head=head)
        self.counts.append(counts)
        return loss

    def share_of_loss(self, of_text: torch.Tensor, rows: list[dict], prompts: Any, hidden: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the step's loss, of which `of_text` is that of its tokens.

        `hidden` (B, T, H): the states that predict each token of the rows' answers. A subclass that learns more adds it here, where
        `model(...)` calls its head.
        """
        return of_text

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def step_metrics(self) -> dict[str, float]:
        """What the answers' tokens were like since the last log, over all processes, under TRL's names where it has them."""
        if not self.counts:
            return {}
        tokens, chosen, entropy = self.accelerator.reduce(torch.stack(self.counts).sum(0), "sum").tolist()
        seconds = time.perf_counter() - (self.started or 0.0)
        steps = len(self.counts) / self.args.gradient_accumulation_steps
        self.state.num_input_tokens_seen += int(tokens)  # kept in checkpoints
        self.counts.clear()
        self.started = None
        return {
            "mean_token_accuracy": chosen / tokens,
            "entropy": entropy / tokens,
            "answer_tokens": self.state.num_input_tokens_seen,
            "tokens_per_second": tokens / seconds,
            "seconds/step": seconds / steps,
        }


def padded_answers(answers: list[list[int]], policy: Policy, shortest: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """B answers' tokens -> (B, T) twice, padded on the right: with the pad token, as a model reads them; with SKIP, as targets.

    T is that of the longest, or `shortest`.
    """
    parts = [torch.tensor(ids + [SKIP] * (shortest - len(ids))) for ids in answers]
    targets = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=SKIP).to(policy.device)
    return targets.where(targets != SKIP, policy.pad_token_id), targets


def answer_likelihood(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden (N, H), weight (V, H), targets (N,), SKIP where none -> the sum of log p, and the counts of `SFTTrainer.counts`.

    A target is what greedy decoding takes where its logit is the largest, max z. There log p = -log sum exp(z - max z), and the
    head keeps that sum for its backward pass; 1e-5 is rounding.
    """
    logprobs, entropy, stats = linear_logprob_forward(*head_operands(hidden, weight), targets, 1.0, 0)
    counted = targets != SKIP
    chosen = counted & (logprobs.detach() + stats[1].clamp(min=1).log() > -1e-5)
    return logprobs.sum(), torch.stack([counted.sum(), chosen.sum(), entropy.detach().sum()])
