"""New tokens have rows that learn, beside an embedding and a head that do not."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.uni_medvlm.token_rows import TokenRows, averaged_rows

OWN, NEW, H = 10, 3, 6


@pytest.fixture
def parts():
    torch.manual_seed(0)
    embedding, head = nn.Embedding(OWN + 2, H), nn.Linear(H, OWN + 2, bias=False)  # two rows of padding
    embedding.requires_grad_(False), head.requires_grad_(False)
    return embedding, head, averaged_rows(embedding.weight, head.weight, OWN, NEW)


def test_a_new_token_begins_as_the_mean_of_its_own_kind_of_rows(parts):
    embedding, head, rows = parts
    assert torch.allclose(rows.input, embedding.weight[:OWN].mean(0).expand(NEW, H), atol=1e-7)
    assert torch.allclose(rows.head, head.weight[:OWN].mean(0).expand(NEW, H), atol=1e-7)
    assert not torch.allclose(rows.input, rows.head, atol=1e-2)


def test_ids_are_read_and_scored_as_by_one_grown_vocabulary(parts):
    embedding, head, rows = parts
    with torch.no_grad():
        rows.input.add_(torch.randn(NEW, H)), rows.head.add_(torch.randn(NEW, H))
    grown = torch.cat([embedding.weight[:OWN], rows.input])
    ids = torch.randint(0, OWN + NEW, (4, 7), generator=torch.Generator().manual_seed(1))
    ids[0, :3] = torch.tensor([OWN - 1, OWN, OWN + NEW - 1])
    assert torch.equal(rows.embed(ids, embedding), grown[ids])
    weight = rows.head_weight(head.weight)
    assert weight.shape == (OWN + NEW, H) and torch.equal(weight[:OWN], head.weight[:OWN]) and torch.equal(weight[OWN:], rows.head)


def test_gradients_are_those_of_the_grown_vocabulary_and_reach_nothing_else(parts):
    embedding, head, rows = parts
    ids = torch.tensor([[1, OWN, 2, OWN + 2, OWN]])
    states = rows.embed(ids, embedding)
    (states @ rows.head_weight(head.weight).T).logsumexp(-1).sum().backward()
    grown = [
        torch.cat([part.weight[:OWN], row.detach()]).requires_grad_() for part, row in ((embedding, rows.input), (head, rows.head))
    ]
    (grown[0][ids] @ grown[1].T).logsumexp(-1).sum().backward()
    assert torch.allclose(rows.input.grad, grown[0].grad[OWN:], atol=1e-6)
    assert torch.allclose(rows.head.grad, grown[1].grad[OWN:], atol=1e-6)
    assert embedding.weight.grad is None and head.weight.grad is None


class Copies(TorchDispatchMode):
    """Counts what is written that is as large as the head."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        written = isinstance(out, torch.Tensor) and out.numel() >= OWN * H and not function.is_view
        self.count += written and function is not torch.ops.aten.detach.default
        return out


@pytest.mark.parametrize("tuned", [True, False])
def test_a_frozen_head_is_not_copied_again(parts, tuned):
    _, head, rows = parts
    rows.requires_grad_(tuned)
    first = rows.head_weight(head.weight)
    with torch.no_grad():
        rows.head.add_(1)  # as a step does
    with Copies() as copies:
        second = rows.head_weight(head.weight)
    assert copies.count == 0 and second.data_ptr() == first.data_ptr() and second.requires_grad == tuned
    assert torch.equal(second, torch.cat([head.weight[:OWN], rows.head]))


def test_another_head_is_seen_and_a_trained_one_learns(parts):
    _, head, rows = parts
    rows.head_weight(head.weight)
    with torch.no_grad():
        head.weight.mul_(2)  # as loading a checkpoint does
    assert torch.equal(rows.head_weight(head.weight)[:OWN], head.weight[:OWN])
    moved = torch.cat([head.weight, head.weight]).double()
    assert torch.equal(rows.head_weight(moved)[:OWN], moved[:OWN])
    head.requires_grad_(True)
    rows.head_weight(head.weight).sum().backward()
    assert head.weight.grad[:OWN].eq(1).all() and head.weight.grad[OWN:].eq(0).all() and rows.head.grad.eq(1).all()


def test_two_forward_passes_before_a_backward_add_up(parts):
    _, head, rows = parts
    states = torch.randn(4, H, generator=torch.Generator().manual_seed(2))
    losses = [(part @ rows.head_weight(head.weight).T).logsumexp(-1).sum() for part in states.split(2)]
    sum(losses).backward()
    grown = torch.cat([head.weight[:OWN], rows.head.detach()]).requires_grad_()
    (states @ grown.T).logsumexp(-1).sum().backward()
    assert torch.allclose(rows.head.grad, grown.grad[OWN:], atol=1e-6)


def test_without_a_new_token_the_gradient_is_zero_and_not_absent(parts):
    embedding, _, rows = parts
    rows.embed(torch.tensor([[1, 2]]), embedding).sum().backward()
    assert torch.equal(rows.input.grad, torch.zeros(NEW, H))


def test_rows_stay_in_float32_and_come_out_in_the_models_type(parts):
    embedding, head, _ = parts
    rows = averaged_rows(embedding.bfloat16().weight, head.bfloat16().weight, OWN, NEW)
    assert {parameter.dtype for parameter in rows.parameters()} == {torch.float32}
    assert rows.embed(torch.tensor([0, OWN]), embedding).dtype == rows.head_weight(head.weight).dtype == torch.bfloat16


def test_rows_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"the first new token is 12, and the language model has 10 rows"):
        averaged_rows(torch.zeros(12, H), torch.zeros(10, H), 12, 1)
    with pytest.raises(ValueError, match=r"input rows are \(1, 6\), head rows \(2, 6\)"):
        TokenRows(3, torch.zeros(1, H), torch.zeros(2, H))
