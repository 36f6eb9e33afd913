"""GRPO (DeepSeekMath, arXiv:2402.03300) on `transformers.Trainer`: batching, rollout and loss; everything else is Hugging Face's.

One optimizer step: draw prompts, sample G answers to each (`engine/training/groups.py`), score them, compare within the group, and
take the gradient of the clipped objective with one row `[prompt | answer_1 .. answer_G]` a prompt and a single-pass head.

Letters: B prompts of a micro-batch, G answers a prompt, N = B*G, T tokens of the longest answer.
"""

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Sampler

from engine.data.rows import Rows
from engine.errors import InputError
from engine.report.content import Sample
from engine.rollout.answers import Answer
from engine.rollout.grounded import greedy_answers
from engine.rollout.policy import Policy, PromptBatch
from engine.rollout.rounded_copy import RoundedCopy
from engine.rollout.sampler import LocalSampler
from engine.rollout.sampler import Sampler as AnswerSampler
from engine.seeds import derive_seed
from engine.tasks.task import Task
from engine.training.compiled.layers import SHORTEST, HasLayers
from engine.training.config.grpo import GRPOConfig
from engine.training.encoded_rows import EncodedRows, PatchMaker
from engine.training.groups import Group, GroupSampler
from engine.training.step_log import StepLog
from engine.training.step_sampler import StepSampler
from engine.training.trainer import Trainer
from kernels.linear_grpo import linear_grpo_loss
from kernels.linear_logprob import linear_logprob

KEPT_LOGPROBS = ("ref_logprobs", "old_logprobs")  # of the first of num_iterations passes over the same answers, for the others


@dataclass
class MicroBatch:
    """What one forward and backward pass needs; rows of tensors (N, ...) of one prompt lie together."""

    prompts: PromptBatch
    completion_ids: torch.Tensor  # (B, G, T)
    completion_mask: torch.Tensor  # (N, T) tokens that count in the loss
    advantages: torch.Tensor  # (N,)
    ref_logprobs: torch.Tensor | None = None  # (N, T)
    old_logprobs: torch.Tensor | None = None  # (N, T), from the first of num_iterations passes
    policy_mask: torch.Tensor | None = None  # (N, T) tokens whose policy term counts, by entropy

    def __len__(self) -> int:
        return len(self.prompts)


class GRPOTrainer(Trainer):
    """Trains `policy` by the rewards of `task` on `rows`.

    `sampler` answers the prompts: by default the policy itself, here.
    """

    args: GRPOConfig
    headline_metric = "reward"

    def __init__(
        self, policy: Policy, task: Task, args: GRPOConfig, rows: Rows, *, sampler: AnswerSampler | None = None, **options: Any
    ) -> None:
        encoded = EncodedRows(rows, task, policy.processor, loader=args.loader)
        super().__init__(policy.model, args, encoded, data_collator=list, processing_class=policy.processor, **options)
        self.attend_as_asked(policy, args)
        self.pictures = PatchMaker(policy.processor, args.device) if args.loader == "dali" else None
        self.policy, self.greedy = policy, greedy_answers(policy, task.prompt, args.max_completion_length)
        self.reference: Policy | None = policy.reference() if args.beta > 0 else None
        own_model = self.reference is not None and self.reference.model is not policy.model
        if self.reference is not None and own_model:
            self.reference.model.to(args.device)
            if args.bf16 and self.is_deepspeed_enabled:  # which rounds the policy's weights, but no buffers, and casts nothing else
                for parameter in self.reference.model.parameters():
                    parameter.data = parameter.data.bfloat16()
        if args.sync_ref_model and not own_model:
            raise InputError("--sync_ref_model cannot move a reference that is the base model of an adapter; leave out --use_peft")
        if sampler is not None and args.rollout_dtype:
            raise InputError("--rollout_dtype is for answers that are sampled here; leave it out")
        self.rounded = RoundedCopy(policy, getattr(torch, args.rollout_dtype)) if args.rollout_dtype else None
        sampler = sampler or LocalSampler(self.rounded.policy if self.rounded else policy, args.rollout_batch_size)
        self.sampler = GroupSampler(sampler, policy.processor, task, args, lambda: self.state)
        self.step_log = StepLog(args, task, self.sampler.names)
        # dapo and cispo divide by the tokens of the whole step; the Trainer averages the others over its micro-batches.
        self.loss_is_scaled_for_ga = args.loss_type in ("dapo", "cispo")
        self.groups: list[list[Group]] = []
        self._saved_step: dict[str, Any] | None = None
        self.micro_batches: list[MicroBatch] = []

    def networks(self) -> list[HasLayers]:
        own = self.reference is not None and self.reference.model is not self.policy.model
        return [self.policy, self.reference] if own and self.reference is not None else [self.policy]

    def answer(self, rows: list[dict]) -> list[Answer]:
        self.model.eval()
        with self.accelerator.autocast():
            return self.greedy(rows)

    def samples(self) -> list[Sample]:
        return self.step_log.samples

    # ---- batching -------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        return StepSampler.of(self, repeats=self.args.num_iterations)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[MicroBatch], torch.Tensor | None]:
        """One optimizer step's rows -> its micro-batches and the number of answer tokens they have per process.

        Every `num_iterations`-th step samples; the steps between train on the same answers again.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        self.step_log.start_step()
        if self.args.sync_ref_model and self.state.global_step and self.state.global_step % self.args.ref_model_sync_steps == 0:
            self.sync_reference()
        if self.state.global_step % self.args.num_iterations == 0:
            self.micro_batches = self._sample_step(batches)
        elif not self.micro_batches:  # resumed between two steps on the same answers
            self.micro_batches = self._restore_step()
        tokens = torch.stack([micro.completion_mask.sum() for micro in self.micro_batches]).sum()
        # At least one token a step, as in TRL: where every answer is masked, the loss is 0 and not 0 / 0.
        return self.micro_batches, self.accelerator.reduce(tokens.float(), "sum").clamp(min=1) / self.args.world_size

    def _sample_step(self, batches: list[list[dict]]) -> list[MicroBatch]:
        step = self.state.global_step
        self.model.eval()
        if self.rounded:
            self.rounded.refresh()
        with self.accelerator.autocast():
            groups = self.sampler.sample([row for batch in batches for row in batch], step)
            if self.args.dynamic_sampling:
                self._replace_flat_groups(groups, step)
        rewards = self.sampler.set_advantages(groups, self.accelerator.gather, self.args.process_index, self.args.device)
        self.step_log.add_groups(groups, rewards, step)
        rest = iter(groups)
        self.groups = [list(itertools.islice(rest, len(batch))) for batch in batches]
        return [self._micro_batch(groups) for groups in self.groups]

    def _replace_flat_groups(self, groups: list[Group], step: int) -> None:
        """DAPO (arXiv:2503.14476): groups with equal rewards give way to other rows' groups, for a bounded number of rounds."""
        for round in range(1, self.args.dynamic_sampling_max_rounds + 1):
            flat = [i for i, group in enumerate(groups) if self.sampler.is_flat(group)]
            if not flat:
                break
            seed = derive_seed(self.args.seed, step, round, self.args.process_index)
            picks = torch.randint(len(self.train_dataset), (len(flat),), generator=torch.Generator().manual_seed(seed)).tolist()
            for place, group in zip(flat, self.sampler.sample(self._rows(picks), step, round), strict=True):
                if not self.sampler.is_flat(group):
                    groups[place] = group

    def _rows(self, indices: list[int]) -> list[dict]:
        """Rows beside those that the data loader brings."""
        rows = [self.train_dataset[i] for i in indices]
        return self.pictures.fill([rows])[0] if self.pictures else rows

    def _micro_batch(self, groups: list[Group]) -> MicroBatch:
        masks = [
            group.completion_mask * ~group.truncated[:, None] if self.args.mask_truncated_completions else group.completion_mask
            for group in groups
        ]
        length = max(int(group.completion_mask.sum(1).max()) for group in groups)
        if self.args.torch_compile:
            length = max(length, SHORTEST)

        def padded(parts: list[torch.Tensor], value: int) -> torch.Tensor:
            cut = [x[:, :length] for x in parts]
            return torch.stack([torch.nn.functional.pad(x, (0, length - x.shape[1]), value=value) for x in cut])

        return MicroBatch(
            self.policy.batch([group.row["encoded"] for group in groups]),
            padded([group.completion_ids for group in groups], self.policy.pad_token_id),
            padded(masks, 0).flatten(0, 1),
            torch.cat([group.advantages for group in groups]).to(self.args.device),
        )

    # ---- loss -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """The GRPO objective of one micro-batch; gradients are those of training on every answer separately."""
        args, micro = self.args, cast(MicroBatch, inputs)
        if micro.ref_logprobs is None and self.reference is not None:
            micro.ref_logprobs = self._score(self.reference, micro)[0]
        if args.top_entropy_quantile < 1:  # of the weights as they are, in each pass over the same answers
            micro.policy_mask = self._high_entropy_tokens(micro)
        live = self._rows_with_gradient(micro)
        num_rows = micro.completion_mask.shape[0]
        if not live and args.world_size == 1:
            return sum(p.flatten()[0] * 0.0 for p in model.parameters() if p.requires_grad)
        computed = live or [0]  # the other processes wait for this one's gradients, which are zero
        part = _answers_of(computed, micro)
        # bnpo divides by the tokens of the micro-batch, skipped rows included; dapo and cispo by those of the whole step
        num_items = micro.completion_mask.sum().clamp(min=1) if args.loss_type == "bnpo" else num_items_in_batch

        def head(hidden, weight):
            loss, *rest = linear_grpo_loss(
                hidden,
                weight.to(hidden.dtype),
                part.completion_ids.flatten(0, 1),
                part.advantages,
                part.completion_mask,
                args.loss,
                temperature=args.temperature,
                old_logprobs=part.old_logprobs,
                ref_logprobs=part.ref_logprobs,
                policy_mask=part.policy_mask,
                num_items=num_items,
                num_rows=num_rows,
            )
            return loss + self.auxiliary_loss(self.policy), *rest

        with self.accelerator.autocast():
            inputs = self.policy.answer_inputs(part.prompts, part.completion_ids)
        loss, logprobs, metrics = model(**inputs, head=head)
        if args.num_iterations > 1 and micro.old_logprobs is None:
            micro.old_logprobs = torch.zeros_like(micro.completion_mask, dtype=logprobs.dtype)
            micro.old_logprobs.unflatten(0, (len(micro), -1))[computed] = logprobs.detach().unflatten(0, (len(computed), -1))
        if live:
            self.step_log.add_tensors(metrics)
        return loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_log.seconds["train"] += time.perf_counter() - start
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _rows_with_gradient(self, micro: MicroBatch) -> list[int]:
        """Prompts whose gradient is not exactly zero: they have a token that counts and, without a KL term, an advantage not 0.

        An auxiliary loss is one of all prompts.
        """
        if self.policy.has_auxiliary_loss or (self.args.beta > 0 and not self.args.mask_truncated_completions):
            return list(range(len(micro)))
        moving = micro.completion_mask.any(1) & ((micro.advantages != 0) | (self.args.beta > 0))
        return moving.view(len(micro), -1).any(1).nonzero().flatten().tolist()

    @torch.no_grad()
    def _score(self, policy: Policy, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies (N, T) of the answers under another policy, or under this one without gradients."""
        targets = micro.completion_ids.flatten(0, 1).masked_fill(micro.completion_mask == 0, -100)

        def head(hidden, weight):
            rows = hidden.flatten(0, 1)
            return linear_logprob(rows, weight.to(rows.dtype), targets.flatten(), temperature=self.args.temperature)

        # as the policy computes: a reference that equals it has a KL of exactly 0
        with policy.as_reference(), self.accelerator.autocast():
            logprobs, entropy = policy.model(**policy.answer_inputs(micro.prompts, micro.completion_ids), head=head)
        return logprobs.view(targets.shape), entropy.view(targets.shape)

    def _high_entropy_tokens(self, micro: MicroBatch) -> torch.Tensor:
        """Tokens above the entropy quantile of the micro-batch over all processes (arXiv:2506.01939), (N, T)."""
        entropy = self._score(self.policy, micro)[1]
        own = entropy.masked_fill(micro.completion_mask == 0, float("nan")).flatten()
        everyone = self.accelerator.gather(self.accelerator.pad_across_processes(own, pad_index=float("nan")))
        everyone = everyone[~everyone.isnan()].float()
        if not everyone.numel():  # every answer is masked
            return torch.zeros_like(entropy, dtype=torch.bool)
        return (entropy >= everyone.quantile(1 - self.args.top_entropy_quantile)) & micro.completion_mask.bool()

    # ---- logging, reference, recovery -------------------------------------------------------------------------------

    def step_metrics(self) -> dict[str, float]:
        return self.step_log.collect(self.accelerator, self.sampler.seconds, self.sampler.rewards.metrics, self.state.global_step)

    @torch.no_grad()
    def sync_reference(self) -> None:
        """Move the reference towards the policy (TR-DPO, arXiv:2404.09656)."""
        alpha = self.args.ref_model_mixup_alpha
        policy = self.accelerator.unwrap_model(self.model)
        assert self.reference is not None  # the settings see to it
        for old, new in zip(self.reference.model.parameters(), policy.parameters(), strict=True):
            old.mul_(1 - alpha).add_(new, alpha=alpha)
        self.reference.forget_images()

    def save_extra(self, folder: Path) -> None:
        """What a resumed run needs beyond the Trainer's files: a moved reference, and answers that are not used up."""
        rank = self.args.process_index
        if self.args.sync_ref_model and self.reference is not None and self.args.should_save:
            torch.save(self.reference.model.state_dict(), folder / "reference.pt")
        if self.state.global_step % self.args.num_iterations:
            parts = [[_saved(group) for group in groups] for groups in self.groups]
            kept = {name: [getattr(micro, name) for micro in self.micro_batches] for name in KEPT_LOGPROBS}
            torch.save({"groups": parts, **kept}, folder / f"answers_{rank}.pt")

    def load_extra(self, folder: Path) -> None:
        if self.args.sync_ref_model and self.reference is not None:
            self.reference.model.load_state_dict(torch.load(folder / "reference.pt", map_location="cpu", weights_only=True))
            self.reference.forget_images()
        answers = folder / f"answers_{self.args.process_index}.pt"
        self._saved_step = None
        if self.state.global_step % self.args.num_iterations:
            place = self.args.device if self.args.device.type != "cpu" else "cpu"  # DeepSpeed's is cpu:0, unknown to torch.load
            self._saved_step = torch.load(answers, map_location=place, weights_only=True)

    def _restore_step(self) -> list[MicroBatch]:
        assert self._saved_step is not None  # answers were left over when the checkpoint was saved
        self.groups = [
            [Group(row=self._rows([saved.pop("index")])[0], texts=[], **saved) for saved in groups]
            for groups in self._saved_step["groups"]
        ]
        micro_batches = [self._micro_batch(groups) for groups in self.groups]
        for name in KEPT_LOGPROBS:
            for micro, logprobs in zip(micro_batches, self._saved_step[name], strict=True):
                setattr(micro, name, logprobs)
        return micro_batches


def _saved(group: Group) -> dict:
    tensors = ("completion_ids", "completion_mask", "truncated", "rewards", "advantages")
    return {"index": group.row["index"]} | {name: getattr(group, name) for name in tensors}


def _answers_of(prompts: list[int], micro: MicroBatch) -> MicroBatch:
    """The same micro-batch with these prompts only, cut to their longest answer."""
    if len(prompts) == len(micro):
        return micro

    def rows(x):
        return None if x is None else x.unflatten(0, (len(micro), -1))[prompts].flatten(0, 1)

    return MicroBatch(
        micro.prompts.select(prompts),
        micro.completion_ids[prompts],
        rows(micro.completion_mask),
        rows(micro.advantages),
        rows(micro.ref_logprobs),
        rows(micro.old_logprobs),
        rows(micro.policy_mask),
    )
