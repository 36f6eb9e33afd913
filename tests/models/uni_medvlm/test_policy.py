"""Uni-MedVLM as a policy: shared-prefix rows with images, a region and experts equal rows of their own,
and decoding the forward."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from models.starter.uni_medvlm import build_tiny_unimed
from models.uni_medvlm.experts import RoutingOptions, add_experts

CORPUS = ["What is in this region? a bright lesion in the upper left", "Segment the lesion. It is dark."] * 4
ANSWERS = ["a <SEG> here", "<SEG>", "no", "dark <SEG> and <SEG>", "a bright lesion", "in the upper left"]


def picture(seed, height=90, width=112):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def region(height=90, width=112):
    mask = np.zeros((height, width), np.uint8)
    mask[10:40, 20:70] = 255
    return Image.fromarray(mask)


def prompts():
    """One about a region, one without an image, one about an image."""
    text, image = {"type": "text", "text": "What is it?"}, {"type": "image"}
    return [
        ([{"role": "user", "content": [image, text, {"type": "region", "mask": region()}]}], [picture(0)]),
        ([{"role": "user", "content": "Is a lesion dark?"}], []),
        (
            [{"role": "user", "content": [image, {"type": "text", "text": "Segment the lesion, please, if there is one."}]}],
            [picture(1)],
        ),
    ]


@pytest.fixture
def make_policy():
    def make(experts=False, **settings):
        policy = build_tiny_unimed(CORPUS, **settings)
        torch.manual_seed(1)
        for module in policy.model.vision_tower.cvfm_modules:  # the identity would hide it
            torch.nn.init.normal_(module.mlp[-1].weight, std=0.1)
        if experts:
            options = RoutingOptions(top_k=2, renormalize=False)
            policy.model.ledger = add_experts(policy.model.llm.get_decoder(), 3, options)
            for layer in policy.model.llm.get_decoder().layers:  # three that differ
                for expert in layer.mlp.experts:
                    for parameter in expert.parameters():
                        parameter.data += 0.05 * torch.randn_like(parameter)
        return policy

    return make


def encoded(policy, key=None):
    return [policy.processor.encode(prompt, images, key and f"{key}{i}") for i, (prompt, images) in enumerate(prompts())]


def answer_ids(policy, texts=ANSWERS, groups=2):
    ids = policy.processor.answer_ids(texts)
    length = max(map(len, ids))
    padded = torch.tensor([row + [policy.pad_token_id] * (length - len(row)) for row in ids])
    real = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]).bool()
    return padded.unflatten(0, (-1, groups)), real


def logprobs(policy, batch, ids):
    def head(hidden, weight):
        return (hidden @ weight.T).log_softmax(-1).gather(-1, ids.flatten(0, 1)[..., None])[..., 0]

    return policy.model(**policy.answer_inputs(batch, ids), head=head)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("tiling", [False, True])
def test_shared_prefix_rows_equal_rows_of_their_own_with_their_gradients(make_policy, experts, tiling):
    policy = make_policy(experts, tiling=tiling)
    policy.model.requires_grad_(True)
    own = encoded(policy)
    ids, real = answer_ids(policy)
    together = logprobs(policy, policy.batch(own), ids)
    weights = torch.randn(together.shape, generator=torch.Generator().manual_seed(0)) * real
    (together * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    if experts:
        assert all(gradients[name].abs().max() > 0 for name in gradients if name.endswith("router"))

    policy.model.zero_grad()
    separately = torch.zeros_like(together)
    for row in range(len(separately)):  # each answer after its prompt alone, without padding of either
        length = int(real[row].sum())
        alone = logprobs(policy, policy.batch([own[row // 2]]), ids.flatten(0, 1)[row, :length].view(1, 1, -1))
        (alone * weights[row, :length]).sum().backward()
        separately[row, :length] = alone.detach()[0]
    assert (together.detach() - separately)[real].abs().max() < 1e-5
    for name, parameter in policy.model.named_parameters():
        if name in gradients:
            scale = gradients[name].abs().max().clamp(min=1.0)
            assert (gradients[name] - parameter.grad).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("experts", [False, True])
def test_decoding_says_what_the_forward_says(make_policy, experts):
    policy = make_policy(experts)
    ids, real = answer_ids(policy)
    with torch.no_grad():
        batch = policy.batch(encoded(policy))
        expected = logprobs(policy, batch, ids)
        decoding, logits = policy.prefill(batch, 2, ids.shape[-1])
        for step, tokens in enumerate(ids.flatten(0, 1).T):
            found = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            assert (found - expected[:, step])[real[:, step]].abs().max() < 1e-5
            logits = decoding.step(tokens)


def test_a_batch_without_a_prompt_is_as_if_it_had_never_been_there(make_policy):
    policy = make_policy()
    ids, _ = answer_ids(policy, ANSWERS[:4])
    with torch.no_grad():
        selected = logprobs(policy, policy.batch(encoded(policy)).select([1, 2]), ids)
        alone = logprobs(policy, policy.batch(encoded(policy)[1:]), ids)
    assert torch.equal(selected, alone)


def test_masks_have_their_images_size_and_give_gradients_to_what_draws(make_policy):
    policy = make_policy()
    model = policy.model
    model.visual_model.mask_decoder.requires_grad_(True)
    ids, _ = answer_ids(policy, ["<SEG>", "a <SEG> here", "no", "no", "<SEG>", "no"])
    batch = policy.batch(encoded(policy, "image"))
    rows = [0, 0, 2]

    def head(hidden, weight):
        states = torch.stack([hidden[0, 0], hidden[1, ids.flatten(0, 1)[1].tolist().index(policy.seg_token_id)], hidden[4, 0]])
        return policy.mask_logits(batch, states, rows)

    masks, iou = model(**policy.answer_inputs(batch, ids), head=head)
    assert [tuple(mask.shape) for mask in masks] == [(90, 112)] * 3 and iou.shape == (3,)
    (sum(mask.sigmoid().sum() for mask in masks) + iou.sum()).backward()
    assert model.text_hidden_fcs[0][0].weight.grad.abs().max() > 0
    assert model.visual_model.mask_decoder.mask_tokens.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.visual_model.image_encoder.parameters())
    with pytest.raises(ValueError, match="no image"):
        policy.mask_logits(batch, torch.zeros(1, model.text_hidden_fcs[0][0].in_features), [1])


def test_features_of_known_images_are_kept_while_the_towers_are_frozen(make_policy):
    policy = make_policy()
    policy.model.requires_grad_(False)
    first = policy.image_features(policy.batch(encoded(policy, "image")))
    seen = []
    policy.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    again = policy.image_features(policy.batch(encoded(policy, "image")))
    assert not seen and all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    policy.forget_images()
    policy.image_features(policy.batch(encoded(policy, "image")))
    assert seen


def test_the_reference_is_the_policy_as_it_was(make_policy):
    policy = make_policy()
    policy.model.requires_grad_(False)
    policy.model.mm_projector.requires_grad_(True)
    reference = policy.reference()
    ids, _ = answer_ids(policy)
    with torch.no_grad():
        before = logprobs(policy, policy.batch(encoded(policy)), ids)
        policy.model.mm_projector.weight += 0.5
        after = logprobs(policy, policy.batch(encoded(policy)), ids)
        with reference.as_reference():
            then = logprobs(reference, reference.batch(encoded(policy)), ids)
    assert torch.equal(then, before) and not torch.equal(after, before)


def test_a_copied_model_is_a_model_of_its_own(make_policy):
    policy = make_policy(experts=True)
    copied = copy.deepcopy(policy.model)
    assert copied.ledger is not policy.model.ledger
