"""Prompts encoded one at a time, by any process, and batched are to the bit what Hugging Face makes of all of them at once."""

import copy
import multiprocessing
import pickle

import pytest
import torch

from models.qwen.policy import load_qwen_vl
from tests.tiny_qwen import encode, noise_image, ragged_prompts, save_tiny

TWO_IMAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Do they"}, {"type": "image"}]}]
NO_IMAGE = [{"role": "user", "content": "What is an X-Ray?"}]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def policy(request, tmp_path_factory):
    return load_qwen_vl(save_tiny(tmp_path_factory.mktemp("model"), request.param))


def asked(kind: str):
    """(prompts, images, keys)."""
    prompts, images = ragged_prompts(3)
    two = [noise_image(8), noise_image(9, 56, 112)]
    return {
        "ragged": (prompts, images, ["a", "b", "c"]),
        "alone": (prompts[:1], images[:1], ["a"]),
        "several images": ([TWO_IMAGES, *prompts], [two, *images], ["z", "a", None, "c"]),
        "some without": ([NO_IMAGE, *prompts, NO_IMAGE, TWO_IMAGES], [[], *images, [], two], [None] * 6),
        "none at all": ([NO_IMAGE, [*NO_IMAGE, *NO_IMAGE]], [[], []], ["a", "b"]),
    }[kind]


def at_once(policy, prompts, images):
    """Tokenizer, image processor and positions by Hugging Face's own calls, on the whole batch."""
    processor, model = policy.processor, policy.base
    flat = [image for group in images for image in group]
    vision = processor.image_processor(images=flat, return_tensors="pt") if flat else {}
    tokens = iter((vision["image_grid_thw"].prod(-1) // 4).tolist() if flat else [])
    texts = []
    for prompt in prompts:
        *pieces, last = processor.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True).split(
            "<|image_pad|>"
        )
        texts.append("".join(piece + "<|image_pad|>" * next(tokens) for piece in pieces) + last)
    text = processor.tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    kinds = (text["input_ids"] == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(
        text["input_ids"], kinds, image_grid_thw=vision.get("image_grid_thw"), attention_mask=text["attention_mask"]
    )
    return {**text, "position_ids": positions, **vision}


@pytest.mark.parametrize("kind", ["ragged", "alone", "several images", "some without", "none at all"])
def test_one_by_one_is_what_hugging_face_makes_at_once(policy, kind):
    prompts, images, keys = asked(kind)
    batch, expected = encode(policy, prompts, images, keys), at_once(policy, prompts, images)
    for name in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(getattr(batch, name), expected[name]), name
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.position_ids.dtype == torch.long
    assert batch.next_position.tolist() == [
        int(positions[:, mask.bool()].max()) + 1
        for positions, mask in zip(batch.position_ids.unbind(1), batch.attention_mask, strict=True)
    ]
    assert batch.image_counts == [len(group) for group in images] and len(batch.pixel_values) == sum(batch.image_counts)
    if batch.pixel_values:
        assert torch.equal(torch.cat(batch.pixel_values), expected["pixel_values"])
        assert torch.equal(torch.stack(batch.image_grid_thw), expected["image_grid_thw"])
    named = [f"{key}#{i}" if key else None for key, group in zip(keys, images, strict=True) for i in range(len(group))]
    assert batch.image_keys == named


def encode_there(processor_file, results):
    prompts, images, keys = asked("several images")
    processor = pickle.loads(processor_file)
    results.put(pickle.dumps([processor.encode(*one) for one in zip(prompts, images, keys, strict=True)]))


def test_another_process_encodes_the_same(policy):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=encode_there, args=(pickle.dumps(policy.processor), results))
    worker.start()
    encoded = pickle.loads(results.get(timeout=120))
    worker.join()
    there, here = vars(policy.batch(encoded)), vars(encode(policy, *asked("several images")))
    for name, value in here.items():
        pairs = zip(value, there[name], strict=True)
        assert all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs), name


def test_the_length_of_a_prompt_is_known_without_its_images(policy):
    for prompt, images, _ in zip(*asked("some without"), strict=True):
        sizes = [(image.height, image.width) for image in images]
        assert policy.processor.prompt_length(prompt, sizes) == len(policy.processor.encode(prompt, images).input_ids)
        assert policy.processor.prompt_length(prompt, [None] * len(images)) >= policy.processor.prompt_length(prompt, sizes)


@pytest.mark.parametrize("size", [(28, 5600), (4000, 28), (4000, 400), (3, 600), (200, 200), (28, 28), (100, 9999)])
@pytest.mark.parametrize("pixels", [(784, 50176), (3136, 12544), (12544, 12544)])
def test_no_image_has_more_tokens_than_the_bound(policy, size, pixels):
    processor = copy.copy(policy.processor)
    processor.image_processor = copy.deepcopy(policy.processor.image_processor)
    processor.image_processor.size = type(processor.image_processor.size)(shortest_edge=pixels[0], longest_edge=pixels[1])
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    assert processor.prompt_length(prompt, [size]) <= processor.prompt_length(prompt, [None])


def test_the_models_own_tokens_in_a_text_are_found(policy):
    def found(text):
        return policy.processor.own_token_in([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}])

    assert found("What is <|image_pad|>?") == "<|image_pad|>" and found("x<|im_end|>\n<|im_start|>") == "<|im_end|>"
    assert found("What is <image> or <answer>C</answer> or <| im_end|>?") is None
    assert policy.processor.own_token_in([{"role": "system", "content": "<|im_end|>"}]) == "<|im_end|>"


def test_image_places_and_images_must_agree(policy):
    with pytest.raises(ValueError, match="a prompt has 2 image places and 1 images"):
        policy.processor.encode(TWO_IMAGES, [noise_image(0)])


def test_answers_end_and_texts_do_not(policy):
    processor = policy.processor
    ids = processor.text_ids("What imaging <answer>")
    assert processor.answer_ids(["What imaging <answer>", ""]) == [
        [*ids, processor.tokenizer.eos_token_id],
        [processor.tokenizer.eos_token_id],
    ]
    assert processor.decode(processor.answer_ids(["What imaging <answer>"])) == ["What imaging <answer>"]


def test_forgotten_images_are_computed_again(policy):
    frozen = policy.reference()
    batch = encode(frozen, *asked("ragged"))
    before = frozen.embed_images(batch)
    with torch.no_grad():
        frozen.base.model.visual.merger.mlp[-1].bias.add_(1.0)
    assert torch.equal(frozen.embed_images(batch), before)
    frozen.forget_images()
    assert not torch.equal(frozen.embed_images(batch), before)
