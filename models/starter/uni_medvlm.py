"""A small Uni-MedVLM with a tokenizer of its own, built on the spot: every part of the real one, in small sizes.

The ViT reads 56 x 56 pixels as 49 patches, the ConvNeXt 224 x 224, SAM's encoder 64 x 64. The mask decoder has its real size.
"""

from collections.abc import Iterable

import torch
from transformers import CLIPVisionModel, ConvNextModel, LlamaConfig, LlamaForCausalLM

from models.starter.encoder import starter_sam
from models.starter.llava import train_tokenizer
from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder, convnext_large, vit_large
from models.uni_medvlm.model import UniMedConfig, UniMedVLM
from models.uni_medvlm.policy import UniMedPolicy
from models.uni_medvlm.processor import Sizes, UniMedProcessor
from models.uni_medvlm.tokens import SEG

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}</s>"
    "{% else %}USER: {{ message['content'] }} ASSISTANT: {% endif %}{% endfor %}"
)
VIT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 8,
    "projection_dim": 64,
}
CONVNEXT = {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
FUSED_AFTER = (1, 2, 3, 4)


def build_tiny_unimed(
    corpus: Iterable[str],
    *,
    seed: int = 0,
    hidden_size: int = 128,
    num_layers: int = 3,
    vocab_size: int = 512,
    tiling: bool = False,
    compat: str = "default",
) -> UniMedPolicy:
    """A policy with random weights in eval mode, whose tokenizer is byte-level BPE trained on `corpus`, so any text will do."""
    tokenizer = train_tokenizer(corpus, vocab_size, SPECIAL_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    start = len(tokenizer)
    torch.manual_seed(seed)
    vision = HybridEncoder(
        CLIPVisionModel(vit_large(**VIT)),
        ConvNextModel(convnext_large(**CONVNEXT)),
        fused_after=FUSED_AFTER,
        tiling=tiling,
        compat=compat,
    )
    config = LlamaConfig(
        vocab_size=start,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    sam = starter_sam()
    model = UniMedVLM(vision, LlamaForCausalLM(config), sam, start, UniMedConfig(tiling=tiling, compat=compat))
    processor = UniMedProcessor(tokenizer, Sizes.of(vision, sam), tiling, compat)
    assert processor.ids[SEG] == model.token_id(SEG)
    model.eval()
    return UniMedPolicy(model, processor)
