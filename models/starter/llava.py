"""A small LLaVA with a tokenizer of its own, built on the spot: CLIP, projector and Mistral with small sizes, 0.5 M parameters.

An image of 56 x 56 pixels is 49 tokens. The tokenizer is byte-level BPE trained on `corpus`, so any text can be encoded.
"""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<image>"]


def build_tiny_llava(
    corpus: Iterable[str], *, seed: int = 0, hidden_size: int = 96, num_layers: int = 3
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerFast]:
    """(randomly initialised LlavaForConditionalGeneration, its tokenizer)."""
    tokenizer = train_tokenizer(corpus)
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=8
    )
    text = MistralConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=49,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval(), tokenizer


def train_tokenizer(
    corpus: Iterable[str], vocab_size: int = 512, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama's special tokens, and those behind them; <unk> is the padding, as in LLaVA-Med."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(special_tokens[3:]),
    )
