"""Checkpoints load strictly, from every documented container, and a wrong one is named in one line."""

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint import CheckpointError
from models.sam.loading import load_sam
from models.sam.sam import BUILDERS, lite_medsam


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return lite_medsam().state_dict()


@pytest.mark.parametrize(("name", "count"), [("sam_vit_b", 93_735_472), ("sam_vit_l", 312_342_832), ("sam_vit_h", 641_090_608)])
def test_sams_own_sizes_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in BUILDERS[name]().parameters()) == count


@pytest.mark.parametrize("container", ["plain", "model", "state_dict", "safetensors"])
def test_every_container_gives_the_same_weights_back(state, container, tmp_path):
    path = tmp_path / ("weights.safetensors" if container == "safetensors" else "weights.pth")
    if container == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if container == "plain" else {container: state, "epoch": 3}, path)
    model = load_sam("lite_medsam", path)
    assert not model.training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "sam.", "model.", "module._orig_mod.", "_orig_mod.module.sam."])
def test_prefixes_that_all_keys_have_are_left_out_and_named(state, tmp_path, prefix, caplog):
    torch.save({"model": {prefix + key: tensor for key, tensor in state.items()}}, tmp_path / "x.pth")
    model = load_sam("lite_medsam", tmp_path / "x.pth")
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert f"x.pth: its keys begin with {prefix}, which is left out" in caplog.text


def test_prefixes_of_some_keys_are_not_left_out(state, tmp_path):
    torch.save({f"module.{key}": tensor for key, tensor in state.items()} | {"step": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"and 1 more unexpected|module\."):
        load_sam("lite_medsam", tmp_path / "x.pth")


def test_missing_unexpected_and_misshapen_keys_are_named(state, tmp_path):
    wrong = dict(state)
    del wrong["mask_decoder.iou_token.weight"]
    wrong["mask_decoder.hq_token.weight"] = torch.zeros(1, 256)
    wrong["mask_decoder.mask_tokens.weight"] = torch.zeros(3, 256)
    torch.save(wrong, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError) as error:
        load_sam("lite_medsam", tmp_path / "wrong.pth")
    message = str(error.value)
    assert "mask_decoder.iou_token.weight missing" in message
    assert "mask_decoder.hq_token.weight unexpected" in message
    assert "mask_decoder.mask_tokens.weight is [3, 256] instead of [4, 256]" in message and "\n" not in message


def test_a_checkpoint_of_another_model_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "lite_medsam.pth")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of tiny_sam: image_encoder\.norm_head\.weight.* missing"):
        load_sam("tiny_sam", tmp_path / "lite_medsam.pth")
