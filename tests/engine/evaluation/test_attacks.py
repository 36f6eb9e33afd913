"""Attacks: exact on losses whose gradients are known, within their bounds on any, and through a real small Qwen-VL."""

import pytest
import torch

from engine.evaluation.attacks import Attack, target_losses
from models.qwen.pixels import QwenPixels
from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import encode, ragged_prompts, save_tiny

EPSILON = 8 / 255


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def policy(request, tmp_path_factory):
    policy = load_qwen_vl(save_tiny(tmp_path_factory.mktemp("tiny"), request.param))
    policy.model.eval().requires_grad_(False)
    return policy


@pytest.fixture(scope="module")
def batch(policy):
    prompts, images = ragged_prompts(3)
    return encode(policy, prompts, images, image_keys=["a", "b", "c"])


@pytest.fixture(scope="module")
def pixels(policy):
    return QwenPixels(policy.processor.image_processor)


def images_of(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, shape, generator=generator) / 255 for shape in shapes]


def test_fgsm_moves_every_pixel_by_epsilon_along_the_sign_of_the_gradient():
    images = images_of((4, 3, 2, 2), (1, 3, 2, 2))
    weights = images_of((4, 3, 2, 2), (1, 3, 2, 2), seed=1)
    weights = [weight - 0.5 for weight in weights]
    fgsm = Attack.named("fgsm", EPSILON, 0.0, 0)
    attacked = fgsm(images, lambda xs: torch.stack([(w * x).sum() for w, x in zip(weights, xs, strict=True)]))
    for x, y, w in zip(images, attacked, weights, strict=True):
        assert torch.allclose(y, (x + EPSILON * w.sign()).clamp(0, 1), atol=1e-6)


def test_pgd_finds_the_corner_of_a_loss_that_fgsm_overshoots():
    """The loss is largest three levels away: ten steps of one level stay there, one step of eight goes past it."""
    images = [torch.full((1, 3, 2, 2), 100 / 255)]
    loss_of = lambda xs: -(xs[0] - 103 / 255).square().sum()[None]  # noqa: E731
    pgd = Attack.named("pgd", EPSILON, 1 / 255, 10)(images, loss_of)
    fgsm = Attack.named("fgsm", EPSILON, 1 / 255, 10)(images, loss_of)
    assert ((pgd[0] * 255).round() - 103).abs().max() <= 1 and torch.allclose(fgsm[0] * 255, torch.tensor(108.0))


def test_pgd_keeps_each_images_best_step():
    """The loss of the first image falls again when it is passed; the second image's rises to the end."""
    images = [torch.full((1, 3, 2, 2), level / 255) for level in (100, 100)]
    far = lambda xs: torch.stack([(-(xs[0] * 255 - 102.5).abs()).mean(), (xs[1] * 255).mean()])  # noqa: E731
    best, last = (Attack.named("pgd", EPSILON, 2 / 255, steps, best=best)(images, far) for steps, best in ((4, True), (4, False)))
    levels = [[round(float(x[0, 0, 0, 0]) * 255) for x in attacked] for attacked in (best, last)]
    assert levels == [[102, 108], [104, 108]]


@pytest.mark.parametrize("epsilon", [0.03, EPSILON, 0.5 / 255])
@pytest.mark.parametrize("scale", [None, torch.tensor([0.27, 0.26, 0.28])[:, None, None]])
def test_an_attacked_image_can_be_kept_as_a_file_and_is_within_epsilon(epsilon, scale):
    images = images_of((5, 3, 4, 4))
    images[0][0] = torch.tensor([0.0, 1.0]).repeat(24).view(3, 4, 4)
    direction = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    (attacked,) = Attack.named("pgd", epsilon, epsilon / 3, 7, scale=scale)(images, lambda xs: (direction * xs[0]).sum()[None])
    bound = epsilon * (1.0 if scale is None else scale)
    assert ((attacked - images[0]).abs() <= bound + 1e-5).all() and attacked.min() >= 0 and attacked.max() <= 1
    levels = attacked * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    wanted = (torch.as_tensor(bound) * 255 + 1e-3).floor().expand_as(direction)
    inside = ((images[0] + bound * direction.sign()) >= 0) & ((images[0] + bound * direction.sign()) <= 1)
    moved = ((attacked - images[0]) * 255).abs().round()
    assert torch.equal(moved[inside], wanted[inside])  # all the way that whole levels allow


TARGETS = [[20, 21, 30], [31, 32], [22]]


def test_the_loss_is_the_models_own_and_padding_does_not_count(policy, batch):
    losses = target_losses(policy, batch, TARGETS)
    for row, target in enumerate(TARGETS):
        alone = batch.select([row])
        ids = torch.cat([alone.input_ids, torch.tensor([target])], dim=1)
        inputs = {"pixel_values": torch.cat(alone.pixel_values), "image_grid_thw": torch.stack(alone.image_grid_thw)}
        types = (ids == policy.base.config.image_token_id).int()
        logits = policy.base(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **inputs).logits[0]
        logprobs = logits[-len(target) - 1 : -1].log_softmax(-1)[torch.arange(len(target)), ids[0, -len(target) :]]
        assert losses[row].item() == pytest.approx(-logprobs.sum().item(), rel=1e-4)


def test_attacks_raise_the_loss_of_each_image_for_itself(policy, batch, pixels):
    def loss_of(images, rows=(0, 1, 2)):
        return target_losses(policy, pixels.put(batch, images).select(list(rows)), [TARGETS[row] for row in rows])

    clean = pixels.of(batch)
    attacked = {name: Attack.named(name, EPSILON, 2 / 255, 10)(clean, loss_of) for name in ("fgsm", "pgd")} | {"clean": clean}
    losses = {name: [loss_of(images, [i]).item() for i in range(3)] for name, images in attacked.items()}
    assert sum(losses["clean"]) < sum(losses["fgsm"]) < sum(losses["pgd"])
    assert all(a < b for a, b in zip(losses["clean"], losses["pgd"], strict=True))
    second = batch.select([1])
    (alone,) = Attack.named("fgsm", EPSILON, 0.0, 0)(
        pixels.of(second), lambda images: target_losses(policy, pixels.put(second, images), TARGETS[1:2])
    )
    assert (alone != attacked["fgsm"][1]).float().mean() < 0.01  # but where a gradient is as good as zero


def test_there_are_two_attacks():
    with pytest.raises(ValueError, match="attack is fgsm or pgd, not 'cw'"):
        Attack.named("cw", 0.1, 0.1, 1)
