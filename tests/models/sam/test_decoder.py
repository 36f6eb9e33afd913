"""The mask decoder: transformers' on the same weights, batching, gradients, and the work that prompts of an image share."""

import copy

import pytest
import torch

from bench.mask_decoder import to_transformers
from models.sam import two_way_transformer
from models.sam.mask_decoder import MaskDecoder
from models.sam.prompt_encoder import PromptEncoder
from models.sam.two_way_transformer import TwoWayTransformer, folded_matrices

B, P, SIDE = 2, 3, 8


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return MaskDecoder(TwoWayTransformer()).eval()


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(1)
    return PromptEncoder((SIDE, SIDE), 128)


@pytest.fixture
def prompts():
    torch.manual_seed(2)
    return {
        "points": torch.rand(B, P, 2, 2) * 128,
        "labels": torch.tensor([1, 0]).expand(B, P, 2),
        "boxes": torch.rand(B, P, 2, 2).sort(2).values.flatten(2) * 128,
        "masks": torch.randn(B, P, 1, 4 * SIDE, 4 * SIDE),
        "text_embeddings": torch.randn(B, P, 1, 256),
    }


def decode(decoder, encoder, image, multimask=True, **prompts):
    sparse, dense = encoder(**prompts)
    return decoder(image, encoder.dense_pe(), sparse, dense, multimask)


@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("multimask", [True, False])
def test_masks_iou_and_gradients_are_those_of_transformers(decoder, num_prompts, multimask):
    decoder = copy.deepcopy(decoder).double()
    theirs = to_transformers(decoder).double()
    torch.manual_seed(3)
    image, sparse = torch.randn(B, 256, SIDE, SIDE).double(), torch.randn(B, num_prompts, 2, 256).double()
    pe, dense = torch.randn(256, SIDE, SIDE).double(), torch.randn(1, 1, 256, SIDE, SIDE).double()
    results = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (image, sparse, dense)]
        if ours:
            masks, iou = decoder(leaves[0], pe, leaves[1], leaves[2], multimask)
        else:
            masks, iou, *_ = theirs(
                leaves[0], pe.expand(B, -1, -1, -1), leaves[1], leaves[2][0].expand(B, -1, -1, -1), multimask_output=multimask
            )
        (masks.square().mean() + iou.sum()).backward()
        results.append([masks, iou, *(leaf.grad for leaf in leaves)])
        results[-1].append((decoder if ours else theirs).transformer.layers[0].cross_attn_token_to_image.k_proj.weight.grad)
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, atol=5e-5, rtol=1e-4)  # theirs takes its softmax in float32


@pytest.mark.parametrize(
    "names", [["points", "labels"], ["boxes"], ["text_embeddings"], ["points", "labels", "boxes", "masks", "text_embeddings"]]
)
def test_batched_prompts_and_images_give_what_each_gives_alone(decoder, encoder, prompts, names):
    image = torch.randn(B, 256, SIDE, SIDE)
    given = {name: prompts[name] for name in names}
    with torch.no_grad():
        masks, iou = decode(decoder, encoder, image, **given)
        for b in range(B):
            for p in range(P):
                one = {name: prompt[b : b + 1, p : p + 1] for name, prompt in given.items()}
                mask, one_iou = decode(decoder, encoder, image[b : b + 1], **one)
                torch.testing.assert_close(masks[b, p], mask[0, 0], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(iou[b, p], one_iou[0, 0], atol=1e-5, rtol=1e-4)


def test_a_dense_prompt_that_is_the_same_for_all_equals_one_for_each(decoder, encoder, prompts):
    image = torch.randn(B, 256, SIDE, SIDE)
    sparse, dense = encoder(boxes=prompts["boxes"])
    assert dense.shape[:2] == (1, 1)
    with torch.no_grad():
        shared = decoder(image, encoder.dense_pe(), sparse, dense, False)
        each = decoder(image, encoder.dense_pe(), sparse, dense.expand(B, P, -1, -1, -1), False)
    torch.testing.assert_close(shared, each, atol=1e-5, rtol=1e-4)


def test_autocast_reaches_the_ops_and_spares_positions(decoder, encoder, prompts):
    image = torch.randn(B, 256, SIDE, SIDE, requires_grad=True)
    exact, _ = decode(decoder, encoder, image, boxes=prompts["boxes"])
    with torch.autocast("cpu", torch.bfloat16):
        masks, _ = decode(decoder, encoder, image, boxes=prompts["boxes"])
        positions = encoder.dense_pe()
    assert torch.equal(positions, encoder.dense_pe())
    masks.float().square().mean().backward()
    assert masks.dtype == torch.bfloat16 and image.grad.isfinite().all()
    assert (masks.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_first_block_projects_an_image_once_whatever_the_number_of_prompts(decoder, encoder):
    rows = []
    attention = decoder.transformer.layers[0].cross_attn_token_to_image
    hook = attention.k_proj.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    with torch.no_grad():
        decode(decoder, encoder, torch.randn(1, 256, SIDE, SIDE), boxes=torch.rand(1, 16, 4) * 128)
    hook.remove()
    assert rows == [SIDE * SIDE]


@pytest.fixture
def folded_and_plain(decoder, monkeypatch):
    """A function that decodes seeded inputs in float64 by folded projections, as on CUDA, and by the projections themselves."""
    torch.manual_seed(4)
    image, pe, dense = torch.randn(1, 256, SIDE, SIDE), torch.randn(256, SIDE, SIDE), torch.randn(1, 1, 256, SIDE, SIDE)

    def both(decoder, num_prompts):
        dtype = decoder.iou_token.weight.dtype
        sparse = torch.randn(1, num_prompts, 2, 256, generator=torch.Generator().manual_seed(5))
        inputs = [tensor.to(dtype) for tensor in (image, pe, sparse, dense)]
        results = []
        for devices in (("cpu",), ()):
            monkeypatch.setattr(two_way_transformer, "FOLDED_ON", devices)
            with torch.no_grad():
                results.append(torch.cat([output.flatten() for output in decoder(*inputs, True)]))
        monkeypatch.setattr(two_way_transformer, "FOLDED_ON", ("cpu",))
        return results

    return both


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_folded_projections_are_the_projections(decoder, folded_and_plain, num_prompts):
    decoder = copy.deepcopy(decoder).double()
    folded, plain = folded_and_plain(decoder, num_prompts)
    assert len(folded_matrices(decoder)) == 3 * 4 + 2 * 6 - (
        0 if num_prompts == 1 else 4
    )  # the first block's queries of several prompts have one image
    torch.testing.assert_close(folded, plain, atol=1e-12, rtol=1e-12)


def test_folded_projections_are_made_once_and_again_where_weights_change(decoder, folded_and_plain):
    decoder = copy.deepcopy(decoder).double()
    folded_and_plain(decoder, 1)
    before = [matrix.data_ptr() for matrix in folded_matrices(decoder)]
    folded_and_plain(decoder, 1)
    assert [matrix.data_ptr() for matrix in folded_matrices(decoder)] == before

    def in_place():
        with torch.no_grad():
            decoder.transformer.layers[1].cross_attn_image_to_token.out_proj.bias.add_(1.0)
            decoder.transformer.final_attn_token_to_image.k_proj.weight.mul_(1.5)

    def loaded():
        decoder.load_state_dict({name: 0.9 * tensor for name, tensor in decoder.state_dict().items()})

    def assigned():
        decoder.load_state_dict({name: 0.9 * tensor for name, tensor in decoder.state_dict().items()}, assign=True)

    def rounded_and_back():
        decoder.half().double()

    for change in (in_place, loaded, assigned, rounded_and_back):
        old = folded_and_plain(decoder, 1)[0]
        change()
        folded, plain = folded_and_plain(decoder, 1)
        assert (folded - old).abs().max() > 1e-6
        torch.testing.assert_close(folded, plain, atol=1e-10, rtol=1e-10)
    assert all(
        tensor.dtype == torch.float32
        for tensors in (folded_and_plain(decoder.float(), 1), *folded_matrices(decoder))
        for tensor in tensors
    )


def test_folded_projections_stay_out_of_training_and_checkpoints(decoder, folded_and_plain):
    decoder = copy.deepcopy(decoder)
    names = list(decoder.state_dict())
    folded_and_plain(decoder, 1)
    assert folded_matrices(decoder) and list(decoder.state_dict()) == names and not folded_matrices(copy.deepcopy(decoder))
    assert not folded_matrices(decoder.train())
    folded_and_plain(decoder, 1)
    assert not folded_matrices(decoder)
    inputs = [
        torch.randn(1, 256, SIDE, SIDE),
        torch.randn(256, SIDE, SIDE),
        torch.randn(1, 1, 2, 256),
        torch.zeros(1, 1, 256, 1, 1),
    ]
    decoder.eval()(*inputs, False)[0].sum().backward()
    assert not folded_matrices(decoder)
    assert decoder.transformer.layers[0].cross_attn_token_to_image.k_proj.weight.grad.abs().max() > 0


def test_prompts_that_do_not_fit_together_are_refused(encoder, prompts):
    with pytest.raises(ValueError, match="give points with labels"):
        encoder()
    with pytest.raises(ValueError, match="give points with labels"):
        encoder(points=prompts["points"])
    with pytest.raises(ValueError, match=r"differ in their \[B, P\]"):
        encoder(boxes=prompts["boxes"], text_embeddings=prompts["text_embeddings"][:, :1])
