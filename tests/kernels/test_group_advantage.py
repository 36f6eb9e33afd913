"""Group advantages against TRL's and Med-R1's, and what they promise about zeros."""

import pytest
import torch

from kernels.group_advantage import group_advantages, group_advantages_reference
from tests.kernels.golden_cases import read

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:invalid value"),  # numpy, in the interpreter
]


def _total(rewards, weights):
    total = (rewards * torch.tensor(weights or [1.0] * rewards.shape[1], dtype=rewards.dtype)).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def test_advantages_equal_trl(golden):
    arrays, described = read(golden)
    for name, case in described["advantage_cases"].items():
        rewards = arrays[f"{name}/rewards_per_func"]
        if case["aggregation"] == "sum_then_normalize":
            advantages = group_advantages(_total(rewards, case["weights"]), 4, scale_rewards=case["scale_rewards"])
        else:  # normalise each reward by group, then their sum over the batch
            each = torch.stack([group_advantages(column, 4) for column in rewards.unbind(1)], 1)
            total = _total(each.masked_fill(rewards.isnan(), torch.nan), case["weights"])
            advantages = group_advantages(total, len(total))
        # TRL's deviation carries a float32 Bessel factor: 2e-8 relative
        torch.testing.assert_close(
            advantages, arrays[f"{name}/advantages"], rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_advantages_equal_med_r1(golden):
    arrays, _ = read(golden)
    advantages = group_advantages(arrays["in/rewards_per_func"].sum(1), 4)
    torch.testing.assert_close(advantages, arrays["medr1_loss_beta0.0/advantages"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_equal_rewards_give_exact_zeros(group, scale):
    assert not group_advantages(torch.full((4 * group,), 0.1), group, scale_rewards=scale).any()


def test_unscored_completions_get_zero_and_leave_the_others_alone():
    rewards = torch.tensor([1.0, torch.nan, 0.0, 0.5])
    advantages = group_advantages(rewards, 4)
    assert advantages[1] == 0
    torch.testing.assert_close(advantages[[0, 2, 3]], group_advantages(rewards[[0, 2, 3]], 3))
    assert not group_advantages(torch.full((4,), torch.nan), 2).any()


def test_half_precision_rewards_are_computed_in_float32():
    rewards = torch.tensor([1.0, 0.5, 0.25, 0.0], dtype=torch.bfloat16)
    assert torch.equal(group_advantages(rewards, 4), group_advantages(rewards.float(), 4))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="scale_rewards must be one of group, batch, none, not 'mean'"):
        group_advantages(torch.ones(4), 2, scale_rewards="mean")
    with pytest.raises(ValueError, match=r"multiple of num_generations=3, not \(4,\)"):
        group_advantages(torch.ones(4), 3)


@pytest.mark.triton
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("group", [1, 2, 7, 8, 100])
def test_triton_body_equals_float64(group, scale):
    torch.manual_seed(group)
    rewards = torch.randint(0, 4, (3 * group,)) * 0.37
    rewards[torch.rand(3 * group) < 0.2] = torch.nan
    rewards[:group] = torch.nan
    exact = group_advantages_reference(rewards.double(), group, scale_rewards=scale)
    torch.testing.assert_close(group_advantages(rewards, group, scale_rewards=scale).double(), exact, rtol=1e-5, atol=1e-6)
    assert not group_advantages(torch.full((3 * group,), 0.1), group, scale_rewards=scale).any()
