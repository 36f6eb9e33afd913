"""How a decoder comes to attend over shared prompts, and what it may not ask for."""

import pytest
import torch
from transformers import LlamaConfig

from models.checkpoint import CheckpointError
from models.decoder.shared_prefix import attend_by_prefix, prefix_layout
from models.loading import load_policy
from tests.tiny_qwen import save_tiny


def test_dropout_of_attention_is_refused_in_one_line_where_a_checkpoint_is_loaded(tmp_path):
    with pytest.raises(CheckpointError, match=r"attention_dropout is 0.1: .* \(expected 0 in config.json\)") as error:
        load_policy(save_tiny(tmp_path, attention_dropout=0.1))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="attention_dropout is 0.2"):
        attend_by_prefix(LlamaConfig(attention_dropout=0.2))


def test_a_layout_knows_where_prompts_start():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    layout = prefix_layout(mask, 3)
    assert (layout.prompt_length, layout.num_answers, layout.start.tolist()) == (4, 3, [2, 0])
