"""The trainer: what it optimises, that it learns, and every setting that changes a step."""

import pytest
import torch

from engine.errors import InputError
from engine.tasks.rewards import text_of
from engine.training.config.grpo import LOSS_TYPES, GRPOConfig
from engine.training.step_sampler import StepSampler
from models.decoder.shared_prefix import NAMES
from models.loading import load_policy
from tests.engine.training.grpo_run import checksum, make_trainer, questions
from tests.models.qwen.test_policy import naive_logprobs
from tests.tiny_qwen import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def first_micro_batch(trainer):
    trainer.step_log.start_step()
    rows = [trainer.train_dataset[i] for i in range(4)]
    return trainer._sample_step([rows[:2], rows[2:]])[0]


def naive_loss(trainer, micro, ref_logprobs):
    """Med-R1's objective written out: mean over answers of the mean over tokens of -(ratio A - beta k3)."""
    answers = micro.completion_ids
    logprobs = naive_logprobs(trainer.policy.base, micro.prompts, answers).flatten(0, 1)
    kl = (ref_logprobs - logprobs).exp() - (ref_logprobs - logprobs) - 1
    per_token = -((logprobs - logprobs.detach()).exp() * micro.advantages[:, None] - trainer.args.beta * kl)
    mask = micro.completion_mask
    return ((per_token * mask).sum(1) / mask.sum(1)).mean()


@pytest.mark.parametrize("attention", ["prefix", "sdpa"])
def test_loss_and_gradients_are_med_r1s(model, tmp_path, attention):
    trainer = make_trainer(model, tmp_path, attention=attention)
    attending = {policy.base.model.language_model.config._attn_implementation for policy in (trainer.policy, trainer.reference)}
    assert attending == {NAMES[attention]}
    micro = first_micro_batch(trainer)
    reference = naive_logprobs(trainer.policy.base, micro.prompts, micro.completion_ids).flatten(0, 1).detach() + 0.1
    micro.ref_logprobs = reference * micro.completion_mask
    trainer.model.train()
    expected = naive_loss(trainer, micro, reference)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, micro)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for name, parameter in trainer.model.named_parameters():
        scale = max(1e-2, gradients[name].abs().max().item())
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, atol=2e-5, rtol=0, msg=name)


def test_attention_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, model):
    with pytest.raises(InputError, match=r"--attention flash: flash is not installed \(pip install"):
        GRPOConfig(output_dir=str(tmp_path), attention="flash")
    monkeypatch.setattr("kernels.prefix_providers.importlib.util.find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"--attention xformers: xformers runs on CUDA only \(expected prefix or sdpa\)"):
        make_trainer(model, tmp_path, attention="xformers")


def test_it_learns_what_is_rewarded(model, tmp_path):
    trainer = make_trainer(model, tmp_path, max_steps=30, learning_rate=5e-3, beta=0.0, num_generations=8, max_completion_length=8)
    trainer.train()
    rewards = [row["rewards/letters/mean"] for row in trainer.state.log_history if "reward" in row]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5]) + 1


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_groups_without_advantage_are_skipped_and_counted(model, tmp_path, loss_type, monkeypatch):
    """Leaving out rows whose gradient is exactly zero changes no gradient: they stay in the denominators."""
    settings = {"beta": 0.0, "loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else None}
    trainer = make_trainer(model, tmp_path, **settings)
    micro = first_micro_batch(trainer)
    micro.advantages[:4] = 0
    gradients = []
    for skip in (True, False):
        if not skip:
            monkeypatch.setattr(trainer, "_rows_with_gradient", lambda micro: [0, 1])
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, micro, num_items_in_batch=torch.tensor(50.0)).backward()
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    for skipped, full in zip(*gradients, strict=True):
        torch.testing.assert_close(skipped, full, atol=1e-6, rtol=1e-4)
    assert any(g.abs().max() > 1e-3 for g in gradients[0])


def test_bnpo_divides_by_its_own_tokens_and_dapo_by_the_steps(model, tmp_path):
    losses = {}
    for loss_type in ("bnpo", "dapo"):
        trainer = make_trainer(model, tmp_path, loss_type=loss_type)
        micro = first_micro_batch(trainer)
        micro.ref_logprobs = torch.full_like(micro.completion_mask, -3.0, dtype=torch.float32)
        tokens = micro.completion_mask.sum().float()
        losses[loss_type] = [trainer.compute_loss(trainer.model, micro, num_items_in_batch=tokens * k).item() for k in (1, 2)]
    assert losses["bnpo"][0] == losses["bnpo"][1] == pytest.approx(losses["dapo"][0], rel=1e-5)
    assert losses["dapo"][1] == pytest.approx(losses["dapo"][0] / 2, rel=1e-5)


def test_a_step_without_any_advantage_moves_nothing(model, tmp_path):
    def flat(prompts, completions, **columns):
        return [1.0] * len(completions)

    trainer = make_trainer(model, tmp_path, reward_funcs=[flat], beta=0.0, max_steps=2)
    before = checksum(trainer.model)
    trainer.train()
    assert checksum(trainer.model) == before
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1


def test_dynamic_sampling_replaces_flat_groups(model, tmp_path):
    """Every other question gives equal rewards; with dynamic sampling the batch fills with the others, within the bound."""

    def uneven(prompts, completions, solution, **columns):
        return [len(text_of(answer)) * float(s == "b") for answer, s in zip(completions, solution, strict=True)]

    rows = [row | {"solution": "ab"[i % 2]} for i, row in enumerate(questions(24))]
    fractions = {}
    for rounds in (0, 8):
        trainer = make_trainer(
            model,
            tmp_path,
            reward_funcs=[uneven],
            rows=rows,
            beta=0.0,
            dynamic_sampling=rounds > 0,
            dynamic_sampling_max_rounds=max(rounds, 1),
        )
        trainer.train()
        fractions[rounds] = [row["frac_reward_zero_std"] for row in trainer.state.log_history if "reward" in row]
    assert max(fractions[0]) > 0 and sum(fractions[8]) < sum(fractions[0]) / 2


def test_two_iterations_reuse_answers_and_clip(model, tmp_path):
    trainer = make_trainer(model, tmp_path, num_iterations=2, learning_rate=1e-2, beta=0.0, max_steps=4)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert ["reward" in row for row in rows] == [True, False, True, False]
    assert rows[0]["clip_ratio/region_mean"] == 0 < rows[1]["clip_ratio/region_mean"]


def test_truncated_answers_can_be_left_out(model, tmp_path):
    micro = first_micro_batch(make_trainer(model, tmp_path, mask_truncated_completions=True, max_completion_length=2))
    assert micro.completion_mask.sum() == 0
    trainer = make_trainer(model, tmp_path, mask_truncated_completions=True, max_completion_length=2, max_steps=1)
    before = checksum(trainer.model)
    trainer.train()
    assert checksum(trainer.model) == before


def test_entropy_quantile_keeps_the_uncertain_tokens(model, tmp_path):
    trainer = make_trainer(model, tmp_path, top_entropy_quantile=0.25)
    micro = first_micro_batch(trainer)
    kept = trainer._high_entropy_tokens(micro)
    entropy = trainer._score(trainer.policy, micro)[1]
    real = micro.completion_mask.bool()
    assert abs(kept.sum() / real.sum() - 0.25) < 0.05 and entropy[kept].min() >= entropy[real & ~kept].max()


def test_the_reference_moves_only_when_asked(model, tmp_path):
    still = make_trainer(model, tmp_path, max_steps=3)
    before = checksum(still.reference.model)
    still.train()
    assert checksum(still.reference.model) == before
    moving = make_trainer(model, tmp_path, max_steps=3, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0)
    moving.train()
    assert checksum(moving.reference.model) != before


def test_lora_trains_adapters_only_and_keeps_the_base_as_reference(model, tmp_path):
    policy = load_policy(model, lora={"r": 4, "alpha": 8, "dropout": 0.0})
    base = {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora" not in name}
    trainer = make_trainer(model, tmp_path, policy=policy, max_steps=3)
    trainer.train()
    moved = {name for name, p in policy.model.named_parameters() if name in base and not torch.equal(p, base[name])}
    assert not moved and trainer.state.log_history[2]["kl"] > 0 and trainer.state.log_history[0]["kl"] == 0
    assert 4 < len(policy.features) <= 12  # a frozen tower sees an image once


def test_rewards_of_none_leave_an_answer_out(model, tmp_path):
    def sometimes(prompts, completions, **columns):
        return [None if i % 2 else float(len(text_of(answer))) for i, answer in enumerate(completions)]

    trainer = make_trainer(model, tmp_path, reward_funcs=[sometimes], max_steps=1)
    trainer.train()
    assert all(group.advantages[1::2].eq(0).all() for groups in trainer.groups for group in groups)


def test_order_follows_from_seed_and_epoch():
    def order(epoch, repeats=1):
        return list(StepSampler(10, 4, repeats, seed=3, epoch=lambda: epoch))

    assert order(0) == order(0) != order(1)
    assert sorted(order(0)) != list(range(10)) and len(order(0)) == 8
    assert order(0, repeats=2) == [*order(0)[:4], *[None] * 4, *order(0)[4:], *[None] * 4]
    with pytest.raises(InputError, match="the training set has 3 rows; one optimizer step needs 4 prompts"):
        StepSampler(3, 4, 1, 0, lambda: 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "--num_generations 1: expected a number, at least 2"),
        ({"temperature": 0.0}, "--temperature 0.0: expected a number, more than 0"),
        ({"loss_type": "sapo"}, "--loss_type sapo: expected one of grpo, bnpo"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "--eval_strategy is not supported"),
        ({"fsdp": "full_shard"}, "--fsdp is not supported"),
        ({"sync_ref_model": True, "beta": 0.0}, "--sync_ref_model needs a reference policy"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        GRPOConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.04}, {"beta": 0.04, "importance_sampling_level": "sequence"}])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_of_masked_answers_has_a_loss_of_zero(model, tmp_path, loss_type, settings):
    """As TRL, which divides by at least one token; so has a micro-batch whose answers are all masked."""
    high = 5.0 if loss_type == "cispo" else None
    trainer = make_trainer(
        model, tmp_path, loss_type=loss_type, mask_truncated_completions=True, epsilon_high=high, max_steps=3, **settings
    )
    sample = trainer.sampler.sample

    def cut(rows, step, round=0):
        groups = sample(rows, step, round)
        for i, group in enumerate(groups):  # all answers of the first step, those of a micro-batch of the second, none of the third
            group.truncated = torch.full_like(group.truncated, step == 0 or step == 1 and i < 2)
        return groups

    trainer.sampler.sample = cut
    before = checksum(trainer.model)
    trainer.train()
    logs = trainer.state.log_history
    assert logs[0]["loss"] == logs[0]["grad_norm"] == 0 < logs[1]["grad_norm"] and logs[2]["grad_norm"] > 0
    assert "entropy" not in logs[0] and logs[1]["entropy"] > 1 and "train_loss" in logs[3]
    assert checksum(trainer.model) != before


def test_an_entropy_quantile_of_masked_answers_is_of_nothing(model, tmp_path):
    settings = {"mask_truncated_completions": True, "top_entropy_quantile": 0.2, "max_completion_length": 2, "max_steps": 1}
    trainer = make_trainer(model, tmp_path, **settings)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0


def test_the_entropy_mask_is_made_anew_in_each_pass(model, tmp_path):
    """As in TRL: the tokens of high entropy are those of the weights as they are."""
    trainer = make_trainer(model, tmp_path, top_entropy_quantile=0.3, num_iterations=2)
    micro = first_micro_batch(trainer)
    masks = []
    for _ in range(2):
        trainer.compute_loss(trainer.model, micro, num_items_in_batch=torch.tensor(50.0))
        masks.append(micro.policy_mask.clone())
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert masks[0].sum() == masks[1].sum() and not torch.equal(*masks)


@pytest.mark.parametrize("policy", ["whole", "frozen tower", "adapters"])
def test_a_reference_computes_as_the_policy_does(model, tmp_path, policy):
    """In mixed precision too the first step's KL is exactly 0."""
    options = {"frozen tower": {"freeze_vision": True}, "adapters": {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}}}
    loaded = load_policy(model, **options.get(policy, {}))
    trainer = make_trainer(model, tmp_path, policy=loaded, bf16=True, max_steps=1)
    seen = set()
    hook = trainer.reference.base.model.visual.blocks[0].attn.qkv.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    trainer.train()
    hook.remove()
    assert trainer.state.log_history[0]["kl"] == 0 and seen == {torch.bfloat16}


def test_rewards_of_none_have_a_deviation(model, tmp_path):
    def sometimes(completions, **columns):
        return [None if i % 4 == 0 else float(i % 4) for i in range(len(completions))]

    trainer = make_trainer(model, tmp_path, reward_funcs=[sometimes], max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["reward_std"] == 1 and trainer.state.log_history[0]["reward"] == 2


def test_a_run_without_any_reward_goes_on_and_moves_nothing(model, tmp_path):
    trainer = make_trainer(model, tmp_path, reward_funcs=[lambda completions, **columns: [None] * len(completions)], beta=0.0)
    before = checksum(trainer.model)
    trainer.train()
    assert checksum(trainer.model) == before and "reward" not in trainer.state.log_history[0]


def test_one_process_uses_one_gpu(tmp_path):
    """A machine with several makes nn.DataParallel of a Trainer's model, which would halve answers and not their prompts."""
    args = GRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=3)
    args._n_gpu = 2  # what transformers finds on such a machine
    assert args.n_gpu == 1 and args.train_batch_size == 3


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_each_reward_needs_its_weight(model, tmp_path, weights):
    with pytest.raises(InputError, match=rf"--reward_weights: {len(weights)} weights for 2 reward functions"):
        make_trainer(model, tmp_path, reward_weights=weights)
