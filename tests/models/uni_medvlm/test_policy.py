"""Uni-MedVLM as a policy: shared-prefix rows with images, a region and experts equal rows of their own,
and decoding the forward."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from engine.rollout.rollout import rollout
from engine.rollout.sampling import SamplingParams
from models.starter.uni_medvlm import build_tiny_unimed
from models.uni_medvlm.experts import RoutingOptions, add_experts
from models.uni_medvlm.prompts import PromptBatch
from tests.models.sam.conftest import Golden

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


def plain_logprobs(policy, prompt, ids):
    """The same of one answer [T] after one prompt, by Hugging Face's own causal attention and positions: no row is shared."""
    model, batch = policy.model, policy.batch([prompt])
    embeds = [model.embed_prompt(batch, model.image_features(batch.shown)), model.input_embeddings(ids[None])]
    states = model.llm.get_decoder()(inputs_embeds=torch.cat(embeds, 1), use_cache=False).last_hidden_state[0]
    before = states[batch.input_ids.shape[1] - 1 : -1]
    return (before @ model.head_weight().T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


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
        alone = plain_logprobs(policy, own[row // 2], ids.flatten(0, 1)[row, :length])
        (alone * weights[row, :length]).sum().backward()
        separately[row, :length] = alone.detach()
    assert (together.detach() - separately)[real].abs().max() < 1e-5
    for name, parameter in policy.model.named_parameters():
        found, expected = (torch.zeros(()) if grad is None else grad for grad in (gradients.get(name), parameter.grad))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1.0), name


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


@pytest.mark.parametrize("experts", [False, True])
def test_a_rollout_has_the_log_probs_of_the_forward(make_policy, experts, monkeypatch):
    """Answers end at different places, so rows are dropped on the way."""
    policy = make_policy(experts)
    batch = policy.batch(encoded(policy))
    monkeypatch.setattr(type(policy), "eos_token_ids", [*range(0, policy.seg_token_id, 8)])
    torch.manual_seed(0)
    answers = rollout(policy, batch, SamplingParams(), num_generations=4, max_new_tokens=10)
    assert 0 < answers.truncated.sum() < 12
    with torch.no_grad():
        scored = logprobs(policy, batch, answers.completion_ids.view(3, 4, -1)) * answers.completion_mask
    torch.testing.assert_close(answers.logprobs, scored, atol=1e-5, rtol=1e-5)


def test_a_step_with_experts_waits_for_the_device_and_is_not_captured(make_policy):
    assert make_policy(experts=True).model.decoding_parts().waits and not make_policy().model.decoding_parts().waits


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


def test_a_batch_without_a_seg_has_no_masks(make_policy):
    policy = make_policy()
    masks, iou = policy.mask_logits(policy.batch(encoded(policy, "image")), torch.zeros(0, 128), [])
    assert masks == [] and iou.shape == (0,)


def test_golden_seg_positions_are_those_of_the_states_before_them(golden):
    """MedPLIB's two rows, each image of 576 patches: the states of the answers are the whole sequence's at the published places."""
    facts = Golden(golden / "uni_medvlm", "medplib_losses_golden").facts["seg_token_mask"]
    policy = build_tiny_unimed(CORPUS, num_layers=1)
    model = policy.model
    features = [torch.randn(576, 64, generator=torch.Generator().manual_seed(row)) for row in range(2)]
    for row, ids in enumerate(facts["input_ids"]):
        seg = ids.index(facts["seg_token_idx"])
        of_image = [model.token_id("<image>")] * 576
        before = [id for one in ids[:seg] for id in (of_image if one == -200 else [one])]
        after = [policy.seg_token_id, *ids[seg + 1 :]]
        own = torch.tensor([before])
        prompt = PromptBatch(own, torch.ones_like(own), [encoded(policy)[2].image])
        answer = torch.tensor([[after]])
        with torch.no_grad():
            hidden = model(prompt, answer, lambda hidden, _: hidden, features[row : row + 1])
            found = hidden[answer[0] == policy.seg_token_id]
            embeds = torch.cat([model.embed_prompt(prompt, features[row : row + 1]), model.input_embeddings(answer[0])], 1)
            states = model.llm.get_decoder()(inputs_embeds=embeds).last_hidden_state[0]
        expected = [place for number, place in facts["true_positions"] if number == row]
        assert len(states) == facts["shape"][1] and len(found) == len(expected) == 1
        torch.testing.assert_close(found, states[expected], atol=1e-5, rtol=1e-5)
        assert (found - states[[expected[0] + 1]]).abs().max() > 1e-2  # and not that of <SEG> itself


@torch.no_grad()
def test_golden_text_hidden_fcs(golden):
    data = Golden(golden / "uni_medvlm", "medplib_losses_golden")
    layers = build_tiny_unimed(CORPUS, hidden_size=512, num_layers=1).model.text_hidden_fcs
    assert list(layers.state_dict()) == ["0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias"]
    data.fill.fill_(layers.state_dict(), "text_hidden_fcs.")
    assert data.error("text_hidden_fcs/out", layers[0](data.seeded(305, (3, 512)))) <= 1e-5


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


def test_the_reference_with_experts_is_their_policy_as_it_was(make_policy):
    policy = make_policy(experts=True)
    reference = policy.reference()
    ids, _ = answer_ids(policy)
    with torch.no_grad():
        before = logprobs(policy, policy.batch(encoded(policy)), ids)
        for name, parameter in policy.model.named_parameters():
            if name.endswith("router"):
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        after = logprobs(policy, policy.batch(encoded(policy)), ids)
        with reference.as_reference():
            then = logprobs(reference, reference.batch(encoded(policy)), ids)
        again = logprobs(policy, policy.batch(encoded(policy)), ids)
    assert torch.equal(then, before) and torch.equal(again, after) and not torch.equal(after, before)


def test_experts_count_neither_padding_nor_what_follows_an_end(make_policy):
    policy = make_policy(experts=True)
    batch = policy.batch(encoded(policy))
    ids, real = answer_ids(policy)
    logprobs(policy, batch, ids)
    num_tokens = int(batch.attention_mask.sum() + real.sum())
    assert num_tokens < ids.numel() + batch.input_ids.numel()
    assert policy.model.ledger.counts().sum(1).tolist() == [2 * num_tokens] * 3  # two experts a token
    before = policy.auxiliary_loss()
    padding = ~real.view_as(ids)
    logprobs(policy, batch, ids.masked_fill(padding, policy.seg_token_id))
    assert torch.equal(policy.auxiliary_loss(), before)


def test_what_a_batch_does_not_use_has_a_gradient_of_zeros(make_policy):
    """Two processes, one with regions and one without images, would wait for each other otherwise."""
    policy = make_policy()
    trained = (policy.model.mm_projector, policy.model.region_fea_adapter, policy.model.vision_tower.cvfm_modules)
    policy.model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)
    ids, _ = answer_ids(policy)
    for rows, used in (([1], []), ([2], [0, 2]), ([0], [0, 1, 2])):  # without an image, without a region, with both
        policy.model.zero_grad()
        logprobs(policy, policy.batch([encoded(policy)[row] for row in rows]), ids[:1]).sum().backward()
        gradients = [[parameter.grad for parameter in part.parameters()] for part in trained]
        assert [place for place, own in enumerate(gradients) if any(grad.any() for grad in own)] == used


def test_layers_that_run_again_in_the_backward_pass_give_the_same_gradients(make_policy):
    """With experts, whose routers' losses are those of the first time."""
    found = []
    for checkpointed in (False, True):
        policy = make_policy(experts=True)
        if checkpointed:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.model.train()
        ids, real = answer_ids(policy)
        loss = logprobs(policy, policy.batch(encoded(policy)), ids)[real].sum()
        (loss + policy.auxiliary_loss()).backward()
        found.append({name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5)


def test_a_copied_model_is_a_model_of_its_own(make_policy):
    policy = make_policy(experts=True)
    copied = copy.deepcopy(policy.model)
    assert copied.ledger is not policy.model.ledger
