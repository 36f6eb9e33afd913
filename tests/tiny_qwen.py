"""Small random Qwen2-VL and Qwen2.5-VL checkpoints in the real format, and prompts of different lengths for them."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from models.qwen.processor import QwenProcessor

SPECIAL = "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["What imaging technique is used? A)CT, B)MRI <think> The image is an X-Ray. </think> <answer> C </answer>"] * 4


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [f"<|{name}|>" for name in SPECIAL]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny(folder, model_type="qwen2_5_vl", *, hidden=64, layers=2, seed=0, **text) -> str:
    """A random checkpoint of the given family in `folder`: 4 query heads, 2 key heads, vision depth 2."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    head_dim = hidden // 4
    text_config = {
        "vocab_size": 416,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
        },
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **text,
    }
    if model_type == "qwen2_5_vl":
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "out_hidden_size": hidden,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        config_class, model_class = Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    else:
        vision = {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2}
        config_class, model_class = Qwen2VLConfig, Qwen2VLForConditionalGeneration
    vision |= {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tokens = {f"{name}_token_id": ids(f"<|{token}|>") for name, token in [("image", "image_pad"), ("video", "video_pad")]}
    tokens |= {f"vision_{end}_token_id": ids(f"<|vision_{end}|>") for end in ("start", "end")}
    torch.manual_seed(seed)
    model = model_class(config_class(text_config=text_config, vision_config=vision, tie_word_embeddings=True, **tokens))
    with torch.no_grad():  # spread the logits: a random network is otherwise nearly uniform and hides mistakes
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 if "bias" in name or "norm" in name else 1.5 / parameter.shape[-1] ** 0.5)
            parameter.add_(1.0 if "norm" in name and "bias" not in name else 0.0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    QwenProcessor(tokenizer, Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112), model_type).save_pretrained(folder)
    return str(folder)


def noise_image(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    return Image.fromarray((np.random.default_rng(seed).random((height, width, 3)) * 255).astype("uint8"))


def ragged_prompts(num: int = 3):
    """`num` prompts that differ in text length and in image size -> (prompts, images)."""
    sizes = [(84, 56), (56, 56), (112, 84), (28, 28)]
    questions = [
        "What?",
        "What imaging technique is used? A)CT, B)MRI",
        "Is it a lesion?",
        "Name the organ: A)liver, B)lung, C)heart",
    ]
    prompts = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[i % 4]}]}] for i in range(num)]
    return prompts, [[noise_image(i, *sizes[i % 4])] for i in range(num)]


def encode(policy, prompts, images, image_keys=None):
    """The prompt batch that a policy makes of chat messages, lists of PIL images and what identifies these (one a prompt)."""
    keys = image_keys or [None] * len(prompts)
    return policy.batch([policy.processor.encode(*one) for one in zip(prompts, images, keys, strict=True)])
