"""Training with masks: the loss is its equation, however a step is divided, and what it teaches is drawn."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.errors import InputError
from engine.tasks.mecovqa.masks import score_masks
from engine.training.config.grounding import GroundingConfig
from models.decoder.feature_cache import FeatureCache
from models.uni_medvlm.experts import add_experts
from tests.engine.training import grpo_run, sft_run
from tests.engine.training.grounding_run import build, make_trainer, rows
from tests.engine.training.grpo_run import checksum
from tests.engine.training.test_recovery import finish, start

PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0}  # weights tell the gradient
WEIGHTS = {"ce_weight": 0.5, "bce_weight": 2.0, "dice_weight": 3.0, "iou_weight": 4.0, "focal_weight": 5.0}
POLICIES = ["llava", "unimed"]


def states_of(policy, row):
    """(states that predict the answer's tokens (T, H), head (V, H), the prompt's batch): one row, read from end to end at once."""
    batch, answer = policy.batch([row["encoded"]]), torch.tensor([row["answer_ids"]])
    T = answer.shape[1]
    if hasattr(policy.model, "embed_prompt"):  # Uni-MedVLM
        model = policy.model
        features = model.image_features(batch.shown)
        embeds = torch.cat([model.embed_prompt(batch, features), model.input_embeddings(answer)], 1)
        return model.llm.get_decoder()(inputs_embeds=embeds).last_hidden_state[0, -T - 1 : -1], model.head_weight(), batch
    ids, pixels = torch.cat([batch.input_ids, answer], 1), torch.cat(batch.pixel_values)
    states = policy.model.model(input_ids=ids, pixel_values=pixels.to(policy.model.dtype)).last_hidden_state[0]
    return states[-T - 1 : -1], policy.model.lm_head.weight, batch


def in_float64(policy):
    """A copy of a policy in float64, with transformers' own attention and nothing kept of images."""
    own = copy.copy(policy)
    if hasattr(policy.model, "routed"):
        policy.model.routed = None  # a tensor with a history cannot be copied
    own.model = copy.deepcopy(policy.model).double()
    if hasattr(own.model, "ledger"):
        own.model.llm.get_decoder().config._attn_implementation = "eager"
        own.features, own.embeddings = FeatureCache(0), FeatureCache(0)
    return own


def doubled(value):
    """Every float tensor of an encoded prompt in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(doubled, value))
    if isinstance(value, list | tuple):
        return type(value)(map(doubled, value))
    if hasattr(value, "__dataclass_fields__"):
        twin = copy.copy(value)
        for name in value.__dataclass_fields__:
            object.__setattr__(twin, name, doubled(getattr(value, name)))
        return twin
    return value


def loss_by_hand(policy, micro):
    """Row by row, mask by mask, in the policy's own type."""
    text, terms, tokens = 0.0, [], 0
    for row in micro:
        states, weight, batch = states_of(policy, row)
        chosen = (states @ weight.to(states.dtype).T).log_softmax(-1)
        text = text - sum(chosen[t, token] for t, token in enumerate(row["answer_ids"]))
        tokens += len(row["answer_ids"])
        before = [t for t, token in enumerate(row["answer_ids"]) if token == policy.seg_token_id]
        for t, mask in zip(before, row["masks"], strict=True):
            (logits,), (expected,) = policy.mask_logits(batch, states[t : t + 1], [0])
            m, x = torch.from_numpy((np.asarray(mask) > 0).astype(np.float64)), logits.double()
            p = x.sigmoid()
            bce = F.softplus(x) - m * x
            both = (p * m).sum()
            dice = 1 - (2 * both + 1e-6) / (p.sum() + m.sum() + 1e-6)
            iou = ((both + 1e-7) / ((p + m - p * m).sum() + 1e-7) - expected) ** 2
            focal = torch.where(m > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2) * bce
            terms.append(torch.stack([bce.mean(), dice, iou, focal.mean()]))
    return text / tokens, torch.stack(terms).mean(0)


@pytest.mark.parametrize("kind", POLICIES)
def test_loss_and_gradients_are_those_of_float64(tmp_path, kind):
    """Of four rows, of which two have no mask and one has two, with images of three sizes."""
    trainer = make_trainer(tmp_path, policy=kind, **WEIGHTS)
    micro = [trainer.train_dataset[i] for i in range(4)]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, micro)
    loss.backward()
    exact = in_float64(trainer.policy)
    text, terms = loss_by_hand(exact, [row | {"encoded": doubled(row["encoded"])} for row in micro])
    expected = 0.5 * text + (terms * torch.tensor([2.0, 3.0, 4.0, 5.0])).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.terms[0].tolist() == pytest.approx([text.item(), *terms.tolist()], rel=1e-4)
    for (name, own), other in zip(trainer.model.named_parameters(), exact.model.parameters(), strict=True):
        if own.requires_grad:
            wanted = torch.zeros_like(other) if other.grad is None else other.grad
            error = (own.grad.double() - wanted).norm() / max(wanted.norm().item(), 1e-2)
            assert error < 1e-3, (name, error)


def test_mixed_precision_draws_in_float32(tmp_path):
    """States in bfloat16, masks and their losses not: close to the losses without."""
    logged = []
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, policy="unimed", max_steps=2, bf16=bf16, use_cpu=True)
        trainer.train()
        logged.append([[row[f"loss/{name}"] for name in ("lm", "bce", "dice", "focal")] for row in trainer.state.log_history[:-1]])
    assert np.allclose(*logged, rtol=0.02) and logged[0] != logged[1]


@pytest.mark.parametrize("kind", POLICIES)
def test_a_step_is_the_same_however_it_is_divided(tmp_path, kind):
    """Twice four rows in one, two or four micro-batches, of which some have no mask: the same losses and weights."""
    runs = {}
    for size in (4, 2, 1):
        divided = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make_trainer(tmp_path, policy=kind, max_steps=2, **divided, **PLAIN, **WEIGHTS)
        trainer.train()
        runs[size] = trainer
    whole = runs.pop(4)
    names = ("loss", *(f"loss/{name}" for name in ("lm", "bce", "dice", "iou", "focal")))
    for trainer in runs.values():
        for one, other in zip(whole.state.log_history[:-1], trainer.state.log_history[:-1], strict=True):
            assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4)
        for (name, one), other in zip(whole.model.named_parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=3e-6, rtol=1e-4, msg=name)
    assert checksum(whole.model) != checksum(build(kind).model)


@pytest.mark.parametrize("kind, unused", [("llava", True), ("unimed", False)])
def test_two_processes_equal_one_with_twice_the_batch(tmp_path, kind, unused):
    """Most rows have no mask, so that now and then one process has one and the other none. Whether DDP looks for weights without
    a gradient or not, each has one, and the gate's comes from the auxiliary loss alone."""
    settings = {"policy": kind, "balance": 0.3 if kind == "llava" else None, "max_steps": 3, "gradient_accumulation_steps": 2}
    settings |= {**PLAIN, **WEIGHTS, "learning_rate": 1e-2, "ddp_find_unused_parameters": unused}
    two = settings | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 1}
    two = finish(start(two, processes=2, module="tests.engine.training.grounding_run"))
    one = make_trainer(tmp_path / "one", **settings | {"per_device_train_batch_size": 2})
    one.train()
    names = ("loss", "loss/lm", "loss/bce", "loss/dice", *(("loss/auxiliary",) if kind == "llava" else ()))
    for own, other in zip(two["logs"], one.state.log_history[:-1], strict=True):
        assert [own[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-4)
    assert two["checksum"] == pytest.approx(checksum(one.model), rel=1e-5)  # rounding, after three steps at a large rate


@pytest.mark.parametrize("kind", POLICIES)
def test_rows_without_masks_give_every_weight_a_gradient_of_zeros(tmp_path, kind):
    """Text alone, one row without an image: as SFT's loss, and no process waits for another's gradient."""
    data = [row | {"text": "CT", "masks": []} for row in rows(4)]
    data[1] |= {"images": [], "image_id": None}
    trainer = make_trainer(tmp_path, policy=kind, data=data)
    loss = trainer.compute_loss(trainer.model, [trainer.train_dataset[i] for i in range(4)])
    loss.backward()
    gradients = {name: own.grad for name, own in trainer.model.named_parameters() if own.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    drawing = [name for name in gradients if any(part in name for part in ("draw.", "text_hidden_fcs.", "mask_decoder."))]
    assert len(drawing) >= 2 and not any(gradients[name].any() for name in drawing)
    sft = sft_run.make_trainer("", tmp_path, policy=build(kind), data=data[:1])
    alone = make_trainer(tmp_path, policy=kind, data=data[:1])
    losses = [own.compute_loss(own.model, [own.train_dataset[0]]).item() for own in (sft, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def gate_after(policy, micro):
    """What its gate is after one step of SGD at rate 1 on the mean, over prompts, of the auxiliary loss alone."""
    gate = policy.model.gate.weight.detach().clone().requires_grad_(True)
    policy.model.eval()
    with torch.no_grad():
        last = torch.cat([states_of(policy, row)[0][:1] for row in micro])  # of each prompt
    loss = policy.balance * (last @ gate.T).softmax(-1).square().sum(-1).mean()
    loss.backward()
    return loss.item(), gate.detach() - gate.grad


@pytest.mark.parametrize("trainer", ["sft", "grounding", "grpo", "dapo", "grpo, nothing to learn"])
def test_the_auxiliary_loss_is_added_once_to_each_micro_batch(tmp_path, trainer):
    """Four prompts in two micro-batches: the step is that of the mean over all, also where no answer has an advantage."""
    policy, data = build("llava", balance=0.7), rows(4)
    answers = make_trainer(tmp_path, policy=policy, data=data).train_dataset
    expected, gate = gate_after(policy, [answers[i] for i in range(4)])
    settings = {"max_steps": 1, "learning_rate": 1.0, "gradient_accumulation_steps": 2, **PLAIN}
    if trainer == "sft":
        run = sft_run.make_trainer("", tmp_path, policy=policy, data=data, **settings)
    elif trainer == "grounding":
        run = make_trainer(tmp_path, policy=policy, data=data, **settings)
    else:

        def reward(completions, **columns):
            same = trainer.endswith("nothing to learn")
            return [0.0 if same else float(i % 4) for i in range(len(completions))]

        settings |= {"loss_type": "dapo" if trainer == "dapo" else "grpo", "num_generations": 4, "beta": 0.0}
        run = grpo_run.make_trainer("", tmp_path, policy=policy, rows=data, reward_funcs=[reward], **settings)
    run.train()
    assert run.state.log_history[0]["loss/auxiliary"] == pytest.approx(expected, rel=1e-5)
    moved = policy.model.gate.weight
    torch.testing.assert_close(moved, gate, atol=1e-6, rtol=1e-5)
    if trainer.endswith("nothing to learn"):
        assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_experts_are_balanced_while_they_learn_to_draw(tmp_path, checkpointing):
    """A Uni-MedVLM with two experts a layer: without the other losses its routers learn from their own, also where layers run
    again in the backward pass."""
    policy = build("unimed")
    torch.manual_seed(0)
    policy.model.ledger = add_experts(policy.model.llm.get_decoder(), 2)
    routers = {name: own for name, own in policy.model.named_parameters() if "router" in name or ".gate.weight" in name}
    none = {f"{name}_weight": 0.0 for name in ("ce", "bce", "dice", "iou", "focal")}
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(tmp_path, policy=policy, data=rows(4), max_steps=1, **settings, **none)
    micro = [trainer.train_dataset[i] for i in range(4)]
    trainer.model.train()
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = trainer.compute_loss(trainer.model, micro)
    expected = policy.auxiliary_loss()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and loss > 0
    wanted = torch.autograd.grad(expected, list(routers.values()), retain_graph=True)
    loss.backward()
    assert routers and all(gradient.any() for gradient in wanted)
    for (name, own), gradient in zip(routers.items(), wanted, strict=True):
        torch.testing.assert_close(own.grad, gradient, msg=name)


def test_without_an_auxiliary_loss_none_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    gate = trainer.model.gate.weight.detach().clone()
    trainer.train()
    assert "loss/auxiliary" not in trainer.state.log_history[0]
    assert torch.equal(trainer.model.gate.weight, gate)


@pytest.mark.parametrize("kind, frozen, file", [("llava", "none", "trained.pt"), ("unimed", "visual_model", "unimed.json"),
                                                ("unimed", "vision_tower", "unimed.json")])  # fmt: skip
def test_resume_is_bit_exact(tmp_path, kind, frozen, file):
    """Stopped after step 2 of 7, in the first epoch, and resumed into the third: the same weights to the last bit, though the
    resumed run has kept no features of images that the other has."""
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2}

    def trainer(name):
        policy = build(kind, 0.1 if kind == "llava" else None)
        for own, parameter in policy.model.named_parameters():
            if own.startswith(frozen):
                parameter.requires_grad_("mask_decoder" in own)
        return make_trainer(tmp_path / name, policy=policy, **settings)

    whole = trainer("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / file).is_file()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 7
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    logged = [[{k: row[k] for k in row if k.startswith("loss")} for row in t.state.log_history[:-1]] for t in (whole, resumed)]
    assert logged[0] == logged[1] and len(logged[0]) == 7


def test_the_parts_of_the_loss_are_logged(tmp_path):
    """Over two steps a line: each is the mean of the steps' means, and together they are the loss."""
    trainer = make_trainer(tmp_path, balance=0.2, max_steps=2, logging_steps=2, **WEIGHTS)
    trainer.train()
    (logged,) = [row for row in trainer.state.log_history if "loss" in row]
    parts = sum(WEIGHTS[f"{name}_weight"] * logged[f"loss/{name}"] for name in ("bce", "dice", "iou", "focal"))
    assert logged["loss"] == pytest.approx(0.5 * logged["loss/lm"] + parts + logged["loss/auxiliary"], rel=1e-5)
    assert min(logged[f"loss/{name}"] for name in ("lm", "bce", "dice", "iou", "focal", "auxiliary")) > 0


def test_it_says_where_to_draw_and_draws_what_it_was_taught(tmp_path):
    """Boxes on one side, which a Uni-MedVLM of random weights learns by heart: `<SEG>` where it belongs, and masks that overlap."""
    data = rows(4)
    for i in (0, 2):
        masks = np.zeros((len(data[i]["masks"]), *data[i]["images"][0].size[::-1]), np.uint8)
        masks[:, :, : masks.shape[2] // 2] = 255
        data[i]["masks"] = list(masks)
    trainer = make_trainer(tmp_path, policy="unimed", data=data, max_steps=80, learning_rate=3e-3, gradient_accumulation_steps=1,
                           per_device_train_batch_size=4, dice_weight=5.0)  # fmt: skip
    before = trainer.answer(data)
    trainer.train()
    answers = trainer.answer(data)
    assert [answer.text for answer in answers] == [row["text"] for row in data] != [answer.text for answer in before]
    for answer, row in zip(answers, data, strict=True):
        assert len(answer.masks) == len(row["masks"])
        if row["masks"]:
            assert score_masks(answer.masks, [mask > 0 for mask in row["masks"]], "default")[1] > 0.7


@pytest.mark.parametrize(
    "change, message",
    [
        ({"masks": []}, r"made.json: row 0: 0 masks for 1 <SEG> in the answer \(expected as many of each\)"),
        ({"text": "nothing"}, r"made.json: row 0: 1 masks for 0 <SEG> in the answer"),
        ({"masks": [np.ones((9, 7), np.uint8)]}, "made.json: row 0: a mask of 7 x 9 pixels on an image of 84 x 56"),
    ],
)
def test_masks_that_do_not_fit_their_row_are_one_line(tmp_path, change, message):
    data = rows(4)
    data[0] |= change
    trainer = make_trainer(tmp_path, data=data)
    with pytest.raises(InputError, match=message):
        trainer.train()


@pytest.mark.parametrize("name", ["ce", "bce", "dice", "iou", "focal"])
def test_a_weight_below_nothing_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"--{name}_weight -1: expected a number, at least 0"):
        GroundingConfig(output_dir=str(tmp_path), **{f"{name}_weight": -1})
