"""Experts in a Hugging Face Llama: what they begin as, what learns, padding, checkpointing, and the way out of their losses."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.uni_medvlm.experts import (
    ExpertLoRA,
    MixtureOfExperts,
    RoutingOptions,
    SwiGLU,
    add_experts,
    present_keys,
    put_experts,
)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()


@pytest.fixture
def batch():
    input_ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def test_copies_with_weights_of_sum_one_are_the_model_that_they_replace(llama, batch):
    dense = llama(**batch).logits
    for options in (RoutingOptions(1), RoutingOptions(2), RoutingOptions(3)):
        model = copy.deepcopy(llama)
        add_experts(model.get_decoder(), 3, options, lora=ExpertLoRA())
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(model(**batch).logits[real], dense[real], rtol=1e-4, atol=1e-5)
    raw = copy.deepcopy(llama)
    add_experts(raw.get_decoder(), 3, RoutingOptions(1, renormalize=False))
    assert not torch.allclose(raw(**batch).logits, dense, atol=1e-3)  # as published: an FFN times p


def test_swiglu_is_llamas_ffn(llama):
    expert, mlp = SwiGLU(32, 48), llama.model.layers[0].mlp
    expert.load_state_dict(mlp.state_dict(), strict=True)
    x = torch.randn(5, 32)
    torch.testing.assert_close(expert(x), mlp(x))


@pytest.mark.parametrize("lora", [None, ExpertLoRA(r=2, alpha=4, dropout=0.0)])
def test_what_learns_are_routers_and_experts_or_their_adapters(llama, batch, lora):
    llama.requires_grad_(False)
    for layer in llama.model.layers:
        layer.mlp.requires_grad_(True)
    ledger = add_experts(llama.get_decoder(), 2, RoutingOptions(2), layers=[0, 2], lora=lora)
    llama.model.layers[1].mlp.requires_grad_(False)
    trainable = {name: p for name, p in llama.named_parameters() if p.requires_grad}
    part = "lora_" if lora else "experts."
    assert trainable and all(name.endswith("mlp.router") or part in name for name in trainable)
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    optimizer = torch.optim.SGD(list(trainable.values()), lr=0.5)
    for _ in range(2):  # a LoRA's second matrix opens the way to its first
        optimizer.zero_grad()
        loss = llama(**batch, labels=batch["input_ids"]).loss + ledger.auxiliary_loss(balance=0.01, z=0.001)
        loss.backward()
        optimizer.step()
    changed = {name for name, p in llama.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trainable)


def test_in_a_bfloat16_model_routers_and_adapters_are_float32(llama, batch):
    ledger = add_experts(llama.bfloat16().get_decoder(), 2, RoutingOptions(2), lora=ExpertLoRA())
    loss = llama(**batch, labels=batch["input_ids"]).loss + ledger.auxiliary_loss()
    loss.backward()
    learning = {name: p for name, p in llama.named_parameters() if "router" in name or "lora_" in name}
    assert {p.dtype for p in learning.values()} == {torch.float32} and all(p.grad is not None for p in learning.values())
    assert llama.model.layers[0].mlp.experts[0].up_proj.base_layer.weight.dtype == torch.bfloat16
    assert ledger.routings[0].weights.dtype == torch.float32


def test_the_balance_loss_spreads_tokens_over_the_experts():
    """From a router that sends almost all tokens to one expert, by the ledger's loss alone."""
    torch.manual_seed(2)
    moe = MixtureOfExperts([SwiGLU(8, 8) for _ in range(4)], 8, RoutingOptions(1))
    x = torch.randn(4, 64, 8)
    x[..., 0] = 1
    with torch.no_grad():
        moe.router[1, 0] += 2

    def share():
        moe.ledger.begin()
        moe.ledger.reset_usage()
        moe(x)
        return moe.ledger.usage()[0].max().item()

    assert share() > 0.7
    optimizer = torch.optim.Adam([moe.router], lr=0.05)
    for _ in range(60):
        share()
        optimizer.zero_grad()
        moe.ledger.auxiliary_loss(balance=1.0).backward()
        optimizer.step()
    assert share() < 0.4


@pytest.mark.parametrize("lora", [None, ExpertLoRA()])
def test_given_experts_stand_where_they_are_put_each_with_its_own_weights(llama, batch, lora):
    """Two experts of other weights: a router that knows one only makes the model with that one's FFNs."""
    torch.manual_seed(5)
    given = {number: [SwiGLU(32, 48) for _ in range(2)] for number in (2, 0)}
    alone = []
    for e in range(2):
        model = copy.deepcopy(llama)
        for number, experts in given.items():
            model.model.layers[number].mlp.load_state_dict(experts[e].state_dict())
        alone.append(model(**batch).logits)
    put_experts(llama.get_decoder(), given, RoutingOptions(1), lora=lora)
    layers, real = {number: llama.model.layers[number].mlp for number in given}, batch["attention_mask"].bool()
    assert all(list(layer.experts) == given[number] for number, layer in layers.items())
    for e in range(2):
        for number, layer in layers.items():
            layer.router.data.zero_()  # equal logits choose the first
            layer.experts = torch.nn.ModuleList(given[number] if e == 0 else given[number][::-1])
        torch.testing.assert_close(llama(**batch).logits[real], alone[e][real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    trainable = {name for name, p in llama.named_parameters() if p.requires_grad and ".mlp.experts." in name}
    assert all("lora_" in name for name in trainable) == (lora is not None) and trainable


def test_padding_is_not_routed_and_changes_no_answer(llama, batch):
    ledger = add_experts(llama.get_decoder(), 3, RoutingOptions(2))
    padded = llama(**batch).logits
    assert all(routing.counts.sum() == 2 * (18 - 4) for routing in ledger.routings.values())
    alone = llama(input_ids=batch["input_ids"][:1, 4:]).logits
    torch.testing.assert_close(padded[:1, 4:], alone, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_meets_the_tokens_of_each_step(llama, batch):
    ledger = add_experts(llama.get_decoder(), 3, RoutingOptions(2))
    answer = llama.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert ledger.usage().sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert next(iter(ledger.routings.values())).counts.sum() == 2 * 2  # the last step: one token of each row
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    whole = llama(input_ids=answer, attention_mask=mask).logits[:, 8:-1].argmax(-1)
    assert torch.equal(whole, answer[:, 9:])


def test_checkpointed_layers_have_the_same_gradients_and_are_counted_once(llama, batch):
    gradients, usage = [], []
    for checkpointed in (False, True):
        model = copy.deepcopy(llama)
        torch.manual_seed(7)
        ledger = add_experts(model.get_decoder(), 3, RoutingOptions(2, capacity_factor=0.8))
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        (model(**batch, labels=batch["input_ids"]).loss + ledger.auxiliary_loss(0.1, 0.1)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        usage.append((ledger.counts(), ledger.dropped()))
    assert usage[0][0].sum() == 3 * 2 * batch["attention_mask"].sum() and usage[0][1].min() > 0
    assert all(torch.equal(one, two) for one, two in zip(*usage, strict=True))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_tokens_are_dropped_in_training_only(llama, batch):
    ledger = add_experts(llama.get_decoder(), 3, RoutingOptions(1, capacity_factor=0.5))
    llama(**batch)
    assert not ledger.dropped().any()
    llama.train()
    llama(**batch)
    assert ledger.dropped().min() > 0


def test_real_tokens_can_be_named_where_the_mask_has_four_dimensions(llama, batch):
    ledger = add_experts(llama.get_decoder(), 3, RoutingOptions(2))
    plain = llama(**batch).logits
    real = batch["attention_mask"].bool()
    causal = torch.ones(9, 9, dtype=torch.bool).tril() & real[:, None, None]
    causal |= torch.eye(9, dtype=torch.bool)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    ledger.real_tokens = real
    y = llama(batch["input_ids"], attention_mask=causal, position_ids=positions).logits
    assert ledger.routings[0].counts.sum() == 2 * real.sum()
    plain = llama(**batch, position_ids=positions).logits
    torch.testing.assert_close(y[real], plain[real], rtol=1e-4, atol=1e-5)
    ledger.real_tokens = real[:1]
    with pytest.raises(ValueError, match=r"the mask of real tokens is \(1, 9\), and the tokens are \(2, 9\)"):
        llama(**batch)


def test_a_copied_model_keeps_its_own_ledger(llama, batch):
    ledger = add_experts(llama.get_decoder(), 2)
    llama(**batch)
    twin = copy.deepcopy(llama)
    known = ledger.routings[0]
    twin(**batch)
    theirs = {id(layer.mlp.ledger) for layer in twin.model.layers}
    assert len(theirs) == 1 and id(ledger) not in theirs and ledger.routings[0] is known
    assert twin.model.layers[0].mlp.ledger.routings[0].counts.sum() == 2 * batch["attention_mask"].sum()


def test_the_state_dict_makes_the_same_model_again(llama, batch):
    plain = copy.deepcopy(llama)
    add_experts(llama.get_decoder(), 2, lora=ExpertLoRA())
    add_experts(plain.get_decoder(), 2, lora=ExpertLoRA())
    plain.load_state_dict(llama.state_dict(), strict=True)
    assert torch.equal(plain(**batch).logits, llama(**batch).logits)


def test_medplibs_keys_are_ours(llama):
    """Its experts are FFNs that PEFT wrapped before DeepSpeed copied them."""
    add_experts(llama.get_decoder(), 2, lora=ExpertLoRA())
    medplib = {
        "model.layers.0.mlp.deepspeed_moe.gate.wg.weight",
        "model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.1.up_proj.base_layer.weight",
        "model.layers.2.mlp.deepspeed_moe.experts.deepspeed_experts.0.down_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.weight",
    }
    present = present_keys(dict.fromkeys(medplib, torch.empty(0)))
    assert len(present) == 4 and present.keys() <= llama.state_dict().keys()


def test_what_cannot_have_experts_is_refused(llama):
    with pytest.raises(ValueError, match="layer 3 can have no experts: it has some, or is none of the 3 layers"):
        add_experts(llama.get_decoder(), 2, layers=[3])
    with pytest.raises(ValueError, match="top_k is 2, and there are 1 experts"):
        add_experts(llama.get_decoder(), 1)
    with pytest.raises(ValueError, match=r"experts must be of width 32 and one inner width, not \[\(16, 48\)\]"):
        put_experts(llama.get_decoder(), {0: [SwiGLU(32, 48)] * 2, 1: [SwiGLU(16, 48)] * 2}, lora=ExpertLoRA())
    assert not any(isinstance(layer.mlp, MixtureOfExperts) for layer in llama.model.layers)
    ledger = add_experts(llama.get_decoder(), 2, layers=[1])
    with pytest.raises(ValueError, match="layer 1 can have no experts"):
        add_experts(llama.get_decoder(), 2)
    with pytest.raises(ValueError, match="no layer with experts has run"):
        ledger.auxiliary_loss()
