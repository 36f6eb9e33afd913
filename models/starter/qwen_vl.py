"""A small Qwen2.5-VL with a tokenizer of its own, in the file format of Qwen's repositories: about 1.4 M parameters.

The architecture is Hugging Face's `Qwen2_5_VLForConditionalGeneration` with other sizes; pre-tokenizer, special tokens and chat
template have Qwen's form (without a default system message). An image of 112 x 112 pixels is 8 x 8 patches, merged to 16 tokens.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLImageProcessorPil
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from models.qwen.policy import QwenVLPolicy
from models.qwen.processor import QwenProcessor

SPECIAL_TOKENS = [
    f"<|{name}|>" for name in "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny_qwen_vl(corpus: Iterable[str], *, seed: int = 0, hidden_size: int = 128, num_layers: int = 4) -> QwenVLPolicy:
    """A randomly initialised policy whose tokenizer is trained on `corpus`; `save_tiny_qwen_vl` writes it to a folder."""
    tokenizer = train_tokenizer(corpus)
    processor = QwenProcessor(tokenizer, Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=392 * 392), "qwen2_5_vl")
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer, hidden_size, num_layers))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return QwenVLPolicy(model, processor)


def _config(tokenizer: Qwen2Tokenizer, hidden_size: int, num_layers: int) -> Qwen2_5_VLConfig:
    ids = tokenizer.get_vocab()
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 8) * 8,
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 32,
            "num_key_value_heads": hidden_size // 32,
            "max_position_embeddings": 2048,
            # heads of 32 dimensions turn 16 pairs: 4 with time, 6 with the row, 6 with the column
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 3,
            "out_hidden_size": hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def train_tokenizer(corpus: Iterable[str], vocab_size: int = 1024) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen's pre-tokenizer, trained on `corpus` up to `vocab_size` tokens; any text can be encoded."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = vocab_size - len(SPECIAL_TOKENS)
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learnt["merges"]]  # pairs are taken, though the annotation says strings
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_qwen_vl(policy: QwenVLPolicy, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write model (weights in `dtype`), generation config, tokenizer and image processor as Qwen's repositories have them.

    config.json keeps float32, which is what the small model is computed in. The head is the embedding, and is written once.
    """
    tied = policy.base.all_tied_weights_keys
    weights = {name: value.to(dtype) for name, value in policy.base.state_dict().items() if name not in tied}
    policy.base.save_pretrained(folder, state_dict=weights)
    policy.processor.save_pretrained(folder)
    tokenizer = Path(folder) / "tokenizer.json"
    table = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokenizer.write_text(json.dumps(table, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")  # not a token a line
