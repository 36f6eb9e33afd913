"""Uni-MedVLM's five stages, each on what those before it have left; evaluation and chat of the last; mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch

from engine.data.starter.unimed import build_starter_unimed
from engine.errors import InputError
from engine.training.warm_up import unimed
from models.starter.uni_medvlm import build_tiny_unimed
from models.uni_medvlm.checkpoints.loading import load_pretrained
from recipes import (
    unimed_chat,
    unimed_eval,
    unimed_grounding_subset,
    unimed_stage1_align,
    unimed_stage2_vqa,
    unimed_stage3_grounding,
    unimed_stage4_router,
    unimed_stage5_grpo,
)
from tests.recipes.unimed_small import FAST, save_small

RECIPES = [unimed_stage1_align, unimed_stage2_vqa, unimed_stage3_grounding, unimed_stage4_router, unimed_stage5_grpo]
KEYS = [
    {"loss_before", "loss_after"},
    {"accuracy_before", "closed_accuracy_after", "open_recall_after"},
    {"mDice_before", "mDice_after", "seg_share_after", "full_mask_dice"},
    {"answer_accuracy_after", "mDice_after"},
    {"reward_before", "reward_after", "reward_first", "reward_last"},
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = save_small(tmp_path_factory.mktemp("small"))
        patch.setattr(unimed, "small_networks", lambda build: folder)
        yield folder


@pytest.fixture(scope="module")
def stages(small, tmp_path_factory):
    """{stage: (its last line, its run folder)}."""
    root, done = tmp_path_factory.mktemp("stages"), {}
    sources = {2: [1], 3: [1, 2], 4: [1, 2, 3], 5: [4]}
    for stage, recipe in enumerate(RECIPES, 1):
        flags = [flag for of in sources.get(stage, []) for flag in (f"--stage{of}", done[of][0]["artifact"])]
        more = ["--num_generations", "2", "--cold_start_steps", "1"] if stage == 5 else []
        done[stage] = recipe.main(["--output_dir", str(root / str(stage)), *FAST, *flags, *more]), root / str(stage)
    return done


@pytest.mark.parametrize("stage", range(1, 6))
def test_a_stage_leaves_what_is_documented(stages, stage):
    headline, folder = stages[stage]
    assert KEYS[stage - 1] <= set(headline)
    files = {
        1: ["stage1_projector_cvfm.bin"],
        2: ["stage2/adapter_model.safetensors", "stage2/adapter_config.json"],
        3: ["stage3/stage3_grounding_weights.bin", "stage3/adapter_model.safetensors"],
        4: ["stage4/unimed.json", "usage.png", "usage.json"],
        5: ["stage5/unimed.json"],
    }
    for name in [*files[stage], "report.html", "evaluation_after.json"]:
        assert (folder / name).stat().st_size > 0, name


def test_stage_1_saves_projector_and_cvfms_alone(stages):
    state = torch.load(stages[1][1] / "stage1_projector_cvfm.bin", weights_only=True)
    assert {key.split(".")[1] if "cvfm" not in key else "cvfm" for key in state} == {"mm_projector", "cvfm"}


def test_usage_is_a_share_of_each_layers_tokens_by_kind(stages):
    usage = json.loads((stages[4][1] / "usage.json").read_text())
    assert set(usage) == {"complex", "region", "grounding"}
    assert all(sum(layer) == pytest.approx(1, abs=1e-6) and len(layer) == 2 for shares in usage.values() for layer in shares)


def test_the_last_stage_is_evaluated_and_answers(stages, tmp_path):
    model = str(stages[5][1] / "stage5")
    flags = ["--model", model, "--max_new_tokens", "4"]
    headline = unimed_eval.main([*flags, "--limit", "12", "--output_dir", str(tmp_path / "eval")])
    assert headline["num_samples"] == 12 and {"accuracy", "closed_accuracy", "mDice"} <= set(headline)
    answer = unimed_chat.main([*flags, "--output_dir", str(tmp_path / "chat")])
    assert answer["question"] and isinstance(answer["answer"], str) and len(answer["masks"]) == answer["answer"].count("<SEG>")


def test_a_box_is_a_region_of_a_chat(stages, tmp_path):
    image = sorted((build_starter_unimed() / "images").iterdir())[0]
    flags = ["--model", str(stages[5][1] / "stage5"), "--image", str(image), "--output_dir", str(tmp_path / "chat")]
    answer = unimed_chat.main([*flags, "--box", "10,10,60,50", "--question", "What is here?", "--max_new_tokens", "3"])
    assert answer["pictures"] and os.path.getsize(answer["pictures"][0]) > 0
    wrong = {"60,10,10,500": "x1 < x2 and y1 < y2 within 112 x 112 pixels", "\u00b2,1,2,3": "expected four whole numbers"}
    for box, words in wrong.items():
        with pytest.raises(InputError, match=words):
            unimed_chat.main([*flags, "--box", box, "--question", "What is here?"])
    with pytest.raises(InputError, match="expected UTF-8 text"):
        unimed_chat.main([*flags, "--question", "What \udcff?"])


def test_one_step_of_stage_3_is_simulated_and_leaves_nothing(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = unimed_stage3_grounding.main(["--stage1", stages[1][0]["artifact"], "--simulate_one_step", *FAST])
    assert min(found["lm_loss"], found["bce_loss"], found["dice_loss"]) > 0
    assert found["trained_parameters"] < found["parameters"] and not list(tmp_path.iterdir())
    counted = unimed_stage3_grounding.main(["--stage1", stages[1][0]["artifact"], "--check_model", *FAST])
    assert counted["trained_parameters"] == found["trained_parameters"]
    assert unimed_grounding_subset.main(["--check_model"])["trained_parameters"] == found["trained_parameters"]
    assert {"LoRA", "visual_model.mask_decoder", "text_hidden_fcs", "token_rows"} == set(counted["by_part"])


@pytest.mark.parametrize("stage", range(1, 6))
def test_a_stage_that_was_interrupted_goes_on_as_if_it_had_not_been(stages, tmp_path, stage):
    sources = {1: [], 2: [1], 3: [1], 4: [1, 2, 3], 5: [4]}[stage]
    flags = [flag for of in sources for flag in (f"--stage{of}", stages[of][0]["artifact"])]
    flags += [*FAST, "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--eval_limit", "0"]
    flags += ["--num_generations", "2", "--cold_start_steps", "2"] if stage == 5 else []
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    recipe = RECIPES[stage - 1]
    at_once = recipe.main([*flags, "--max_steps", "4", "--output_dir", whole])
    recipe.main([*flags, "--output_dir", cut])
    resumed = recipe.main([*flags, "--max_steps", "4", "--output_dir", cut, "--resume_from_checkpoint", "true"])
    first, second = (load_weights(headline["checkpoint"]) for headline in (at_once, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def load_weights(folder):
    return load_pretrained(folder).model.state_dict()


@pytest.mark.parametrize(
    "recipe, flags, line",
    [
        (unimed_stage2_vqa, [], "--stage1 is missing.*recipes.unimed_stage1_align"),
        (unimed_stage2_vqa, ["--stage1", "nowhere"], "--stage1 nowhere.*recipes.unimed_stage1_align"),
        (unimed_stage3_grounding, ["--stage1", "{1}", "--stage2", "nowhere"], "--stage2 nowhere.*recipes.unimed_stage2_vqa"),
        (unimed_stage4_router, ["--stage1", "{1}"], "--stage2 is missing.*recipes.unimed_stage2_vqa"),
        (unimed_stage5_grpo, [], "--stage4 is missing.*recipes.unimed_stage4_router"),
        (unimed_stage1_align, ["--vision_tower", "clip"], "belong together"),
        (unimed_stage1_align, ["--tiling", "true"], "the small networks have no"),
        (unimed_eval, [], "--stage4 is missing"),
    ],
)
def test_what_is_missing_is_one_line_that_names_the_command(stages, recipe, flags, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs here
    given = [flag.format(*[None, stages[1][0]["artifact"]]) for flag in flags]
    with pytest.raises(InputError, match=line) as caught:
        recipe.main(given)
    assert "\n" not in str(caught.value)


def test_small_networks_learn_their_lessons_and_lie_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(unimed, "starter_folder", lambda folder, name, marker, build: (build(tmp_path / name), tmp_path / name)[1])
    for lesson in ("DESCRIBED", "REASONED", "SEEN"):
        monkeypatch.setattr(unimed, lesson, 2)
    folder = unimed.small_networks(build_tiny_unimed)
    policy = load_pretrained(folder)
    assert not policy.model.training and (folder / "unimed.json").is_file()


def test_all_stages_in_order_as_a_process_and_again_without_work(small, tmp_path):
    """With settings of one's own; a second run of the same folder finds every stage done."""
    settings = {"max_steps": 1, "eval_limit": 3, "use_cpu": True, "max_completion_length": 4, "per_device_train_batch_size": 2}
    (tmp_path / "settings").mkdir()
    for stage in range(1, 6):
        own = settings | ({"num_generations": 2} if stage == 5 else {})
        (tmp_path / "settings" / f"stage{stage}.yaml").write_text(json.dumps(own))
    cache, data = tmp_path / "cache", build_starter_unimed()
    cache.mkdir()
    (cache / data.name).symlink_to(data)
    (cache / f"{data.name}-networks-{unimed.VERSION}").symlink_to(small)
    command = [sys.executable, "-m", "recipes.unimed_run_all", "--output_dir", str(tmp_path / "out"), "--settings"]
    environment = {**os.environ, "VESALIUS_CACHE": str(cache)}
    for _ in range(2):
        done = subprocess.run([*command, str(tmp_path / "settings")], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("is done") == 5
    other = subprocess.run([*command, str(tmp_path / "settings"), "--seed", "3"], capture_output=True, text=True, env=environment)
    assert other.returncode == 2 and other.stderr.endswith("done with another --seed: expected the same, or another --output_dir\n")
    headline = json.loads(done.stdout.splitlines()[-1])
    names = "stage1_loss stage2_accuracy stage3_dice stage5_reward".split()
    assert {f"{name}_{when}" for name in names for when in ("before", "after")} <= set(headline)
    assert {"stage4_accuracy", "stage4_dice", "seconds"} <= set(headline)
