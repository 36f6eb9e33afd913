"""PRS-Med's claims: prompt states without the answer, nothing from padding, adapters that are applied, checkpoints that reload."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil

from models.checkpoint import CheckpointError
from models.prs_med.decoder import PooledMaskDecoder
from models.prs_med.model import PRSMed, PRSMedConfig, build_prs_med, load_prs_med
from models.prs_med.processor import REFERENCE_INFERENCE_PROMPT, REFERENCE_LENGTH
from models.sam.sam import PIXEL_MEAN, PIXEL_STD, tiny_sam
from models.starter.llava import build_tiny_llava

QUESTIONS = ["Where is the lesion?", "Which part of this image shows the dark lesion, and is it near the center?"]
ANSWERS = ["The lesion is top left.", "In the center."]


def image(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    return Image.fromarray((np.random.default_rng(seed).random((height, width, 3)) * 255).astype("uint8"))


def rows(answers=ANSWERS) -> list[dict]:
    masks = [Image.fromarray((np.random.default_rng(9).random((90, 120)) > 0.5).astype("uint8") * 255)] * 2
    return [
        {"image": image(i), "mask": masks[i], "question": QUESTIONS[i], "answer": answers[i], "label": [3, None][i]}
        for i in range(2)
    ]


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **config) -> PRSMed:
    """A small model whose adapters do something."""
    vlm, tokenizer = build_tiny_llava([*QUESTIONS, *ANSWERS], seed=seed)
    model = PRSMed(vlm.to(dtype), tokenizer, PRSMedConfig(image_encoder="starter", **config))
    model.prepare_training(r=4, alpha=8, dropout=0.1, frozen_norms=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return model.eval()


def forward(model: PRSMed, batch: dict):
    with torch.no_grad():
        return model(**{name: tensor for name, tensor in batch.items() if name not in ("masks", "class_labels")})


@pytest.fixture(scope="module")
def model() -> PRSMed:
    return build()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("compat, leaks", [("default", False), ("reference", True)])
def test_the_answer_does_not_reach_the_mask(compat, leaks):
    """The published code leaks it in training; by default the logits are the same bits for any answer."""
    model = build(compat=compat)
    one, other = (
        forward(model, model.processor.collate(rows(answers)))
        for answers in (ANSWERS, ["The lesion is far right now.", "Top left and far away."])
    )
    change = (one.mask_logits - other.mask_logits).abs().max()
    assert change > 1e-3 if leaks else change < 1e-5


@pytest.mark.parametrize("compat, depends", [("default", False), ("reference", True)])
def test_a_mask_does_not_depend_on_the_batch_it_is_in(compat, depends):
    """The first question is shorter: in a batch it is padded."""
    model = build(compat=compat)
    together = forward(model, model.processor.collate(rows())).mask_logits[:1]
    alone = forward(model, model.processor.collate(rows()[:1])).mask_logits
    change = (together - alone).abs().max()
    assert change > 1e-3 if depends else change < 1e-5


def test_the_mask_is_the_same_in_training_and_at_inference(model):
    trained = forward(model, model.processor.collate(rows())).mask_logits
    prompts = model.processor.prompts([row["image"] for row in rows()], QUESTIONS)
    with torch.no_grad():
        states = model.base.model(
            **{key: prompts[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        ).last_hidden_state
        inferred, _ = model._segment(states, prompts["prompt_mask"], prompts["images"])
    assert (trained - inferred).abs().max() < 1e-5
    for (_, logits), mask in zip(model.segment_batch([image(0), image(1)], QUESTIONS, max_new_tokens=0), inferred, strict=True):
        assert logits.shape == (90, 120)
        assert torch.allclose(logits, torch.nn.functional.interpolate(mask[None], (90, 120), mode="bilinear")[0, 0], atol=1e-5)


def test_targets_are_the_answer_and_its_end(model):
    processor = model.processor
    batch, output = processor.collate(rows()), forward(model, processor.collate(rows()))
    for i, answer in enumerate(ANSWERS):
        counted = batch["labels"][i][batch["labels"][i] != -100].tolist()
        assert counted[-1] == processor.tokenizer.eos_token_id and processor.decode(counted) == answer
        assert counted == output.token_labels[i][output.token_labels[i] != -100].tolist()
    reference = build(compat="reference").processor.collate(rows())
    text = processor.decode(reference["labels"][0][reference["labels"][0] != -100].tolist())
    assert (
        "Where is the lesion?" in text and text.endswith(ANSWERS[0]) and processor.tokenizer.eos_token_id not in reference["labels"]
    )


def test_token_logits_are_those_of_the_language_model(model):
    batch = model.processor.collate(rows())
    output = forward(model, batch)
    with torch.no_grad():
        out = model.vlm(**{key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "labels")})
    counted = output.token_labels != -100
    loss = torch.nn.functional.cross_entropy(output.token_logits[counted], output.token_labels[counted])
    assert torch.allclose(loss, out.loss, atol=1e-5)


def test_answers_are_greedy_also_in_a_padded_batch(model):
    answers = [answer for answer, _ in model.segment_batch([image(0), image(1)], QUESTIONS, max_new_tokens=12)]
    for i, question in enumerate(QUESTIONS):
        prompt = model.processor.prompts([image(i)], [question])
        inputs = {key: prompt[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        out = model.base.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert model.processor.decode(out[0, inputs["input_ids"].shape[1] :].tolist()) == answers[i]
        assert model.segment(image(i), question, max_new_tokens=12)[0] == answers[i]


def test_text_that_looks_like_a_special_token_is_text(model):
    ids = model.processor.prompts([image(0)], ["Is <image> or </s> here?"])["input_ids"][0].tolist()
    assert ids.count(model.base.config.image_token_id) == 49 and model.processor.tokenizer.eos_token_id not in ids


def test_images_reach_clip_padded_to_a_square_as_its_own_processor_has_them(model):
    picture = image(3, 80, 120)
    square = Image.new("RGB", (120, 120), (122, 116, 104))
    square.paste(picture, (20, 0))
    expected = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)(square, return_tensors="pt")["pixel_values"][0]
    assert (model.processor.prompts([picture], ["?"])["pixel_values"][0] - expected).abs().max() < 1e-5


def test_images_reach_the_encoder_stretched_with_interpolation(model):
    picture = image(3, 200, 120)
    pixels = np.asarray(picture.resize((128, 128), Image.Resampling.BILINEAR), dtype=np.float32)
    expected = torch.from_numpy(((pixels - PIXEL_MEAN) / PIXEL_STD).astype(np.float32)).permute(2, 0, 1)
    assert torch.allclose(model.processor.prompts([picture], ["?"])["images"][0], expected, atol=1e-5)


def test_only_the_language_model_has_adapters_and_they_are_float32(tmp_path):
    """In the published code the vision tower has some too, without gradient, and all of them are in bfloat16."""
    model = build(dtype=torch.bfloat16)
    trained = {name: parameter for name, parameter in model.vlm.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 4 * 2 and all("language_model" in name and "lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert {parameter.dtype for parameter in model.vlm.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    reference = build(dtype=torch.bfloat16, compat="reference")
    assert {parameter.dtype for parameter in reference.vlm.parameters()} == {torch.bfloat16}
    assert {name for name, parameter in reference.vlm.named_parameters() if parameter.requires_grad} == set(trained)
    reference.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "lora_adapter" / "adapter_model.safetensors")
    of_vision = [key for key in saved if ".vision_tower." in key]
    assert len(saved) - len(of_vision) == len(trained) and len(of_vision) == 3 * 3 * 2  # q, k and v; its o is called out_proj
    names = [name for name, _ in load_prs_med(tmp_path).vlm.named_parameters() if "lora_" in name]
    assert len(names) == len(saved)  # the published checkpoints' adapters find their places


def test_the_published_inference_loses_the_adapters_and_has_its_own_prompt(model, checkpoint):
    again, published = load_prs_med(checkpoint), load_prs_med(checkpoint, compat="reference")
    question = QUESTIONS[0]
    asked = published.processor.prompts([image(0)], [question])["input_ids"][0].tolist()
    assert published.processor.decode(asked) == REFERENCE_INFERENCE_PROMPT.format(question=question).strip()
    again.processor = published.processor
    (answer, logits), (lost_answer, lost) = (m.segment(image(0), question, max_new_tokens=12) for m in (again, published))
    assert (lost - logits).abs().max() > 1e-2 and answer != lost_answer
    with again.vlm.disable_adapter():
        assert torch.equal(again.segment(image(0), question)[1], lost)


def test_the_published_code_cuts_long_texts_and_ours_does_not():
    long = [{**row, "answer": "far away " * 400} for row in rows()]
    lengths = {}
    for compat in ("default", "reference"):
        processor = build(compat=compat).processor
        batch = processor.collate(long)
        lengths[compat] = batch["input_ids"].shape[1] - len(processor.image_ids) + 2
        assert batch["labels"].shape == batch["input_ids"].shape
    assert lengths["reference"] == REFERENCE_LENGTH < lengths["default"]


def test_a_checkpoint_reloads_to_the_same_bits_and_its_adapters_are_applied(model, checkpoint):
    again = load_prs_med(checkpoint)
    for i, question in enumerate(QUESTIONS):
        (answer, logits), (same_answer, same) = (m.segment(image(i), question, max_new_tokens=12) for m in (model, again))
        assert answer == same_answer and torch.equal(logits, same)
        with again.vlm.disable_adapter():
            bare_answer, bare = again.segment(image(i), question, max_new_tokens=12)
        assert (bare - logits).abs().max() > 1e-2 and bare_answer != answer


def test_adapters_that_do_not_fit_are_an_error(model, checkpoint, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "lora_adapter" / "adapter_model.safetensors"
    nested = {f"base_model.model.{key}": tensor for key, tensor in load_file(file).items()}
    save_file(nested, file)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors: not adapters of this model: .* missing"):
        load_prs_med(tmp_path)


def test_a_published_checkpoint_loads(model, checkpoint, tmp_path):
    """As the published code leaves it: adapter keys in LLaVA-Med's layout, the encoder twice in one file, no prs_med.json.

    Its encoder is TinySAM's, so the small one is put under that name here.
    """
    model.save_pretrained(tmp_path / "llm_seg_1")
    folder = tmp_path / "llm_seg_1"
    file = folder / "lora_adapter" / "adapter_model.safetensors"
    original = {key.replace("model.language_model.", "model."): tensor for key, tensor in load_file(file).items()}
    assert all(key.startswith("base_model.model.model.layers.") for key in original)
    save_file(original, file)
    encoder = torch.load(folder / "image_encoder.pth", weights_only=True)
    torch.save(encoder | {f"sam.{key}": tensor for key, tensor in encoder.items()}, folder / "image_encoder.pth")
    again = load_prs_med(folder)
    assert torch.equal(again.segment(image(0), QUESTIONS[0])[1], model.segment(image(0), QUESTIONS[0])[1])
    (folder / "prs_med.json").unlink()
    with pytest.raises(CheckpointError, match="a published checkpoint; name the VLM"):
        load_prs_med(folder)


def test_a_model_of_published_parts_reloads(tmp_path):
    """A LLaVA folder and TinySAM's checkpoint, 1024 pixels: the checkpoint says where the VLM is and does not hold it."""
    vlm, tokenizer = build_tiny_llava(QUESTIONS)
    for part in (vlm, tokenizer):
        part.save_pretrained(tmp_path / "vlm")
    sam = tiny_sam()
    torch.save(sam.state_dict(), tmp_path / "tinysam.pth")
    model = build_prs_med(str(tmp_path / "vlm"), str(tmp_path / "tinysam.pth"), PRSMedConfig())
    assert all(torch.equal(a, b) for a, b in zip(model.image_encoder.parameters(), sam.image_encoder.parameters(), strict=True))
    model.prepare_training(r=4, alpha=4, dropout=0.0, frozen_norms=True)
    model.eval().save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint" / "vlm").exists()
    again = load_prs_med(tmp_path / "checkpoint")
    assert torch.equal(again.segment(image(0), "Where?")[1], model.segment(image(0), "Where?")[1])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "tinysam.pth")
    with pytest.raises(CheckpointError, match="tinysam.pth: not a checkpoint of tiny_sam"):
        build_prs_med(str(tmp_path / "vlm"), str(tmp_path / "tinysam.pth"), PRSMedConfig())


@pytest.mark.parametrize("part", ["image_encoder", "mask_decoder", "cls"])
def test_a_part_with_a_wrong_key_is_an_error(model, tmp_path, part):
    model.save_pretrained(tmp_path)
    state = torch.load(tmp_path / f"{part}.pth", weights_only=True)
    state["image_encoder.more" if part == "image_encoder" else "more"] = torch.zeros(1)
    torch.save(state, tmp_path / f"{part}.pth")
    with pytest.raises(CheckpointError, match=f"{part}.pth: more unexpected"):
        load_prs_med(tmp_path)


@pytest.mark.parametrize("compat", ["default", "reference"])
@pytest.mark.parametrize("part", ["lora_adapter", "tokenizer", "vlm", "image_encoder.pth", "mask_decoder.pth", "cls.pth"])
def test_a_checkpoint_without_a_part_is_refused(checkpoint, tmp_path, part, compat):
    shutil.copytree(checkpoint, tmp_path / "copy")
    load_prs_med(tmp_path / "copy", compat=compat)
    place = tmp_path / "copy" / part
    place.unlink() if place.is_file() else shutil.rmtree(place)
    with pytest.raises(CheckpointError, match=f"not a whole PRS-Med checkpoint: {part} is missing"):
        load_prs_med(tmp_path / "copy", compat=compat)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_without_a_file_are_refused_by_name(checkpoint, tmp_path, file):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "lora_adapter" / file).unlink()
    with pytest.raises(CheckpointError, match=f"{file}: no such file"):
        load_prs_med(tmp_path / "copy")


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "expected a JSON object, not a list"),
        ("{", "not JSON"),
        ("", "is empty"),
        ('{"x": 1}', "unknown setting 'x'; there are vlm"),
        ('{"decoder": "v9"}', "decoder is 'v9': expected v5 or v6 or paper"),
        ('{"image_encoder": []}', "image_encoder is"),
        ('{"vlm": 3}', "vlm is '3': expected a folder, a hub name or null"),
        ('{"compat": null}', "compat is 'None': expected default or reference"),
    ],
)
def test_settings_that_say_nothing_known_are_refused(checkpoint, tmp_path, content, message):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "prs_med.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"prs_med.json: {message}"):
        load_prs_med(tmp_path / "copy")


def test_a_vlm_that_has_moved_is_asked_for(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "prs_med.json").write_text('{"vlm": "/gone/vlm", "image_encoder": "starter"}')
    with pytest.raises(OSError, match="/gone/vlm: no checkpoint there .*: name it with --vlm_path"):
        load_prs_med(tmp_path / "copy")
    load_prs_med(tmp_path / "copy", vlm=str(checkpoint / "vlm"))


def test_adapters_record_the_vlm_beside_them(checkpoint):
    config = json.loads((checkpoint / "lora_adapter" / "adapter_config.json").read_text())
    assert (checkpoint / "lora_adapter" / config["base_model_name_or_path"]).samefile(checkpoint / "vlm")


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(OSError, match="expected prs_med.json or mask_decoder.pth"):
        load_prs_med(tmp_path)


@pytest.mark.parametrize("decoder", ["v6", "paper"])
def test_other_decoders_train_and_reload(decoder, tmp_path):
    model = build(decoder=decoder)
    model.train()(
        **{name: tensor for name, tensor in model.processor.collate(rows()).items() if name not in ("masks", "class_labels")}
    ).mask_logits.sum().backward()
    still = [name for name, p in model.mask_decoder.named_parameters() if p.requires_grad and p.grad is None]
    assert not still, still
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(load_prs_med(tmp_path).segment(image(0), "Where?")[1], model.segment(image(0), "Where?")[1])


def test_the_papers_decoder_doubles_sixteen_pixels_to_the_image():
    decoder = PooledMaskDecoder(prompt_dim=32, image_size=1024).eval()
    assert [stage[0].out_channels for stage in list(decoder.upscale)[:-1]] == [128, 64, 32, 16, 8, 4]
    states, valid = torch.randn(1, 5, 32), torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        short = decoder(torch.ones(1, 256, 64, 64), states[:, :3])
        padded = decoder(torch.ones(1, 256, 64, 64), states, valid)
    assert padded.shape == (1, 1, 1024, 1024) and torch.allclose(short, padded, atol=1e-5)


def test_frozen_norms_keep_their_statistics(model):
    for frozen in (True, False):
        again = build()
        again.frozen_norms = frozen
        before = again.image_encoder.patch_embed.seq[0].bn.running_mean.clone()
        forward(again.train(), again.processor.collate(rows()))
        assert torch.equal(before, again.image_encoder.patch_embed.seq[0].bn.running_mean) == frozen


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = model.processor.collate(rows())
        output = model(**{name: tensor for name, tensor in batch.items() if name not in ("masks", "class_labels")})
        (output.token_logits.square().mean() + output.mask_logits.square().mean()).backward()
        gradients.append({name: p.grad for name, p in model.vlm.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys() and len(plain) == 24
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)
