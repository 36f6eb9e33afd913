"""What a drawn mask costs: the original's numbers, and the equations written out in float64."""

import math

import pytest
import torch

from engine.training.losses.grounding import TERMS, mask_terms
from tests.models.sam.conftest import Golden


@pytest.fixture(scope="module")
def medplib(golden):
    return Golden(golden / "uni_medvlm", "medplib_losses_golden")


def test_golden_losses_are_medplibs(medplib):
    facts = medplib.facts["losses_seeded_301_302"]
    logits = medplib.seeded(301, (1, 40, 56), 2.0)
    mask = (torch.from_numpy(medplib.fill.seeded_uniform(302, (1, 40, 56))) > 0.6).float()
    terms = dict(zip(TERMS, mask_terms(logits, mask, torch.tensor([facts["pred_iou"]]))[0].tolist(), strict=True))
    assert terms == pytest.approx({name: facts[name] for name in TERMS}, rel=1e-6)
    stage_3 = terms["bce"] + 5 * terms["dice"] + terms["focal"]
    assert stage_3 == pytest.approx(medplib.facts["mask_loss_stage3_weights(bce1,dice5,iou0,focal1)"], rel=1e-6)
    stage_4 = 2 * terms["bce"] + 0.5 * terms["dice"]
    assert stage_4 == pytest.approx(medplib.facts["mask_loss_stage4_weights(bce2,dice0.5,iou0,focal0)"], rel=1e-6)


def written_out(logits, mask, expected):
    """Pixel by pixel, in Python's floats."""
    pairs = list(zip(logits.double().flatten().tolist(), mask.flatten().tolist(), strict=True))
    chances = [1 / (1 + math.exp(-x)) for x, _ in pairs]
    own = [(p, m, -math.log(p if m else 1 - p), p if m else 1 - p) for p, (_, m) in zip(chances, pairs, strict=True)]
    both, sizes = sum(p * m for p, m, *_ in own), sum(p + m for p, m, *_ in own)
    focal = sum((0.25 if m else 0.75) * (1 - right) ** 2 * loss for _, m, loss, right in own) / len(own)
    iou = ((both + 1e-7) / (sizes - both + 1e-7) - expected) ** 2
    return [sum(loss for *_, loss, _ in own) / len(own), 1 - (2 * both + 1e-6) / (sizes + 1e-6), iou, focal]


def test_losses_are_their_equations():
    """Of a few masks, an empty and a full one among them."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 9, 13, generator=generator)
    masks = (torch.rand(4, 9, 13, generator=generator) > 0.6).float()
    masks[1], masks[2] = 0, 1
    expected = torch.rand(4, generator=generator)
    found = mask_terms(logits, masks, expected)
    by_hand = torch.tensor([written_out(*of) for of in zip(logits, masks, expected.tolist(), strict=True)])
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-5)
    for m in range(4):
        torch.testing.assert_close(mask_terms(logits[m : m + 1], masks[m : m + 1], expected[m : m + 1])[0], found[m])


def test_gradients_are_those_of_float64_and_finite_far_out():
    generator = torch.Generator().manual_seed(1)
    masks = (torch.rand(2, 8, 8, generator=generator) > 0.5).double()
    logits = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.rand(2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, e: mask_terms(x, masks, e), (logits, expected))
    far = torch.full((2, 8, 8), 200.0, requires_grad=True)
    terms = mask_terms(far, torch.zeros(2, 8, 8), torch.ones(2))
    terms.sum().backward()
    assert terms.isfinite().all() and far.grad.isfinite().all()
    torch.testing.assert_close(terms[:, 0], torch.full((2,), 200.0))
