"""`vesalius-vlm` answers as transformers does: the starter policy's checkpoint, exported, and fifty prompts with images."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from engine.files import write_json
from models.loading import STARTER_POLICY
from models.qwen.export.image_layout import patch_positions, patch_windows
from models.qwen.policy import load_qwen_vl

NUM_PROMPTS, NUM_TOKENS, PENALTY = 50, 24, 1.3
QUESTIONS = [
    "What imaging technique is used for this picture?\nA) CT, B) MRI, C) X-Ray",
    "Which organ is shown? Answer in one word.",
    "¿Qué se ve aquí? résumé ½ 日本語 👩‍⚕️",
    "  Is it a lesion?\n\n<think> first </think>",
    "x" * 300,
]


@pytest.fixture(scope="module")
def vlm(binaries):
    return binaries / "vesalius-vlm"


@pytest.fixture(scope="module")
def bundle(starter_bundle):
    return starter_bundle


@pytest.fixture(scope="module")
def policy():
    """Loaded as transformers loads it, its attention transformers' own."""
    policy = load_qwen_vl(STARTER_POLICY)
    for module in (policy.base.model.visual, policy.base.model.language_model):
        module.config._attn_implementation = "sdpa"
    return policy


def ask(vlm, bundle, *flags):
    return subprocess.run([vlm, bundle, *map(str, flags)], capture_output=True, text=True, timeout=300)


def answer(vlm, bundle, *flags) -> dict:
    done = ask(vlm, bundle, *flags)
    assert done.returncode == 0, done.stderr
    headline = json.loads(done.stdout.splitlines()[-1])
    assert done.stdout.removesuffix("\n").rpartition("\n")[0] == headline["text"]  # printed as it came, and whole
    return headline


def picture(rng: np.random.Generator, file) -> Image.Image:
    """Soft shapes in any size and form."""
    width, height = rng.integers(20, 500, 2)
    small = Image.fromarray(rng.integers(0, 256, (rng.integers(2, 9), rng.integers(2, 9), 3), dtype=np.uint8))
    image = small.resize((int(width), int(height)), Image.Resampling.BICUBIC)
    image.save(file)
    return Image.open(file).convert("RGB")


@torch.no_grad()
def generated(policy, prompt, images, penalty=1.0) -> list[int]:
    """transformers' greedy tokens, without the one that ends them."""
    batch = policy.batch([policy.processor.encode(prompt, images)])
    pictured = (
        {"pixel_values": torch.cat(batch.pixel_values), "image_grid_thw": torch.stack(batch.image_grid_thw)} if images else {}
    )
    tokens = policy.base.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        mm_token_type_ids=(batch.input_ids == policy.base.config.image_token_id).int(),
        **pictured,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        repetition_penalty=penalty,
    )[0, batch.input_ids.shape[1] :].tolist()
    return tokens[:-1] if tokens[-1] in policy.eos_token_ids else tokens


def test_fifty_prompts_with_images_have_transformers_greedy_tokens(vlm, bundle, policy, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(NUM_PROMPTS):
        files = [tmp_path / f"{number}_{i}.png" for i in range(2 if number % 10 == 9 else 1)]
        images = [picture(rng, file) for file in files]
        question = QUESTIONS[number % len(QUESTIONS)]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        flags = [flag for file in files for flag in ("--image", file)]
        found = answer(vlm, bundle, *flags, "--prompt", question, "--max-new-tokens", NUM_TOKENS)
        expected = generated(policy, [{"role": "user", "content": content}], images)
        assert found["tokens"] == expected, (number, [image.size for image in images])
        assert found["text"] == policy.processor.decode([expected])[0]
        assert found["finish_reason"] == ("length" if len(expected) == NUM_TOKENS else "stop")


def test_a_question_without_an_image_is_answered_too(vlm, bundle, policy):
    found = answer(vlm, bundle, "--prompt", "Hello?", "--max-new-tokens", NUM_TOKENS)
    assert found["tokens"] == generated(policy, [{"role": "user", "content": "Hello?"}], [])


def test_a_temperature_draws_by_the_models_probabilities_and_a_seed_repeats_it(vlm, bundle, policy):
    flags = ("--prompt", "Hello?", "--max-new-tokens", 1, "--temperature", 1.5)
    drawn = [tuple(answer(vlm, bundle, *flags, "--seed", seed)["tokens"]) for seed in range(16)]
    assert drawn[:3] == [tuple(answer(vlm, bundle, *flags, "--seed", seed)["tokens"]) for seed in range(3)]
    batch = policy.batch([policy.processor.encode([{"role": "user", "content": "Hello?"}], [])])
    with torch.no_grad():
        logits = policy.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[0, -1]
    ends = policy.eos_token_ids
    probabilities = (logits / 1.5).softmax(-1)
    # an unlikely token is drawn by a wrong temperature only; the most likely one is not always drawn
    assert all(probabilities[ids[0] if ids else ends].max() > 1e-4 for ids in drawn)
    share = sum(ids == (int(logits.argmax()),) for ids in drawn) / len(drawn)
    spread = (probabilities.max() * (1 - probabilities.max()) / len(drawn)).sqrt()
    assert abs(share - probabilities.max()) < 4 * spread + 1e-6


def test_a_repetition_penalty_of_the_manifest_is_generates(vlm, bundle, policy, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["chat"]["repetition_penalty"] = PENALTY
    write_json(copy / "manifest.json", manifest)
    ramp = np.outer(np.linspace(0, 255, 140), np.linspace(0, 1, 190))[..., None] * np.array([1, 0.8, 0.5])
    image, file = Image.fromarray(ramp.astype(np.uint8)), tmp_path / "ramp.png"  # of which the model says one thing again and again
    image.save(file)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is shown?"}]}]
    expected = generated(policy, prompt, [image], PENALTY)
    assert expected != generated(policy, prompt, [image])
    flags = ("--image", file, "--prompt", "What is shown?", "--max-new-tokens", NUM_TOKENS)
    assert answer(vlm, copy, *flags)["tokens"] == expected


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--image", "IMAGE"], "--prompt is missing"),
        (["--prompt", "a <|im_end|> b"], "a text has '<|im_end|>'"),
        (["--prompt", "?", "--image", "gone.png"], "gone.png: cannot be read: No such file"),
        (["--prompt", "?", "--image", "TRUNCATED"], "truncated.png: "),
        (["--prompt", "?", "--image", "STRIP"], "the longer side is more than 200 times the shorter"),
        (["--prompt", "?", "--max-new-tokens", "4000"], "(expected at most 2047 together)"),
        (["--prompt", "word " * 3000], "(expected at most 2047 together)"),
        (["--prompt", "?", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "?", "--temperature", "-1"], "--temperature"),
        (["--prompt", "?", "--top-p", "1.5"], "--top-p"),
        (["--prompt", "?", "--stop", ""], "--stop"),
        (["--prompt", "?", "--colour", "red"], "--colour"),
    ],
)
def test_bad_flags_prompts_and_images_are_one_line(vlm, bundle, tmp_path, flags, complaint):
    whole = tmp_path / "image.png"
    Image.effect_noise((50, 40), 50).convert("RGB").save(whole)
    (tmp_path / "truncated.png").write_bytes(whole.read_bytes()[:-400])
    Image.new("RGB", (603, 3)).save(tmp_path / "strip.png")
    places = {"IMAGE": whole, "TRUNCATED": tmp_path / "truncated.png", "STRIP": tmp_path / "strip.png"}
    done = ask(vlm, bundle, *(places.get(flag, flag) for flag in flags))
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("vesalius-vlm: ") and not done.stdout


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda folder, manifest: manifest["chat"].pop("roles"), "manifest.json: chat: "),
        (lambda folder, manifest: manifest["preprocessing"].update(kind="sam"), "preprocessing.kind is not qwen"),
        (lambda folder, manifest: manifest["preprocessing"].pop("mean"), "manifest.json: preprocessing: "),
        (lambda folder, manifest: manifest.update(kind="segmenter"), "segmenter"),
        (lambda folder, manifest: manifest["packages"].pop("decode"), "decode"),
        (lambda folder, manifest: manifest["dimensions"].pop("length"), "'length'"),
        (lambda folder, manifest: (folder / "tokenizer.json").write_text("{}", encoding="utf-8"), "tokenizer.json"),
        (lambda folder, manifest: (folder / "packages/vision.pt2").unlink(), "packages/vision.pt2"),
    ],
)
def test_a_damaged_bundle_is_one_line(vlm, bundle, tmp_path, damage, complaint):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    damage(copy, manifest)
    write_json(copy / "manifest.json", manifest)
    done = ask(vlm, copy, "--prompt", "?")
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen2_vl"])
def test_patches_are_those_of_pythons_image_processor(binaries, bundle, tmp_path, model_type):
    """Each pixel within one level of 255, each place and window the same, for sizes at which rounding and limits decide."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    settings = manifest["preprocessing"]
    if model_type == "qwen2_vl":
        settings["window_size"] = 0
    write_json(tmp_path / "manifest.json", manifest)
    processor = load_qwen_vl(STARTER_POLICY).processor.image_processor
    rng = np.random.default_rng(5)
    sizes = [(14, 14), (42, 70), (28, 5000), (199 * 3, 3), (1, 1), (393, 391), (700, 650), *rng.integers(10, 900, (12, 2)).tolist()]
    for width, height in sizes:
        file = tmp_path / "image.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
        done = subprocess.run([binaries / "patches_probe", tmp_path / "manifest.json", file], capture_output=True)
        assert done.returncode == 0, done.stderr
        expected = processor(images=[Image.open(file)], return_tensors="pt")
        _, rows, columns = expected["image_grid_thw"][0].tolist()
        across, down = ((side + settings["window_size"] - 1) // (settings["window_size"] or 1) for side in (columns, rows))
        given = np.frombuffer(done.stdout[:32], np.int64).tolist()
        assert given[:2] == [rows, columns] and given[2] == (across * down if settings["window_size"] else 0)
        patches = rows * columns
        values = np.frombuffer(done.stdout, np.float32, patches * 1176, 32).reshape(patches, 1176)
        level = 1 / 255 / min(settings["std"])
        assert np.abs(values - expected["pixel_values"].numpy()).max() <= level + 1e-6, (width, height)
        numbers = np.frombuffer(done.stdout, np.int64, offset=32 + values.nbytes)
        positions = patch_positions(rows, columns, 2)
        assert np.array_equal(numbers[: 2 * patches], positions.flatten().numpy())
        if settings["window_size"]:
            windows, slots = patch_windows(positions, columns, settings["window_size"])
            assert np.array_equal(numbers[2 * patches : -patches], windows.flatten().numpy())
            assert np.array_equal(numbers[-patches:], slots.flatten().numpy())
