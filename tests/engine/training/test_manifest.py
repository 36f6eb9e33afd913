"""A checkpoint's manifest: what is damaged offers the one before it, other settings are refused by name, an end is an end."""

import json
import shutil
from dataclasses import dataclass

import pytest
import torch

from engine.command.run_folder import open_run
from engine.data.rows import Rows
from engine.errors import InputError
from engine.runs.train import train_to_end
from engine.training.checkpoints import find_checkpoint
from engine.training.config.masks import MaskConfig
from engine.training.manifest import Manifest, check_same, deciding_settings, is_whole, row_identity
from models.lora import add_lora
from models.qwen.policy import load_qwen_vl
from tests.engine.training.grpo_run import checksum, make_trainer
from tests.tiny_qwen import save_tiny

SAVING = {"save_strategy": "steps", "save_steps": 1}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """A run of 3 steps with its checkpoints, and the trainer."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(model, folder, max_steps=3, num_iterations=2, **SAVING)
    trainer.train()
    return folder, trainer


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_manifest_names_every_file_and_what_decides(finished):
    folder, trainer = finished
    for step in (1, 2, 3):
        checkpoint = folder / f"checkpoint-{step}"
        manifest = Manifest.read(checkpoint)
        there = {path.name for path in checkpoint.rglob("*") if path.is_file()}
        assert set(manifest.files) | {"manifest.json"} == there and {"optimizer.pt", "scheduler.pt"} <= there
        assert ("answers_0.pt" in there) == (step != 2)
        assert manifest.step == step and manifest.settings["num_iterations"] == 2
        assert manifest.settings["number of processes"] == 1 and manifest.settings["seed"] == 42
        assert not {"output_dir", "max_steps", "save_steps", "logging_steps", "log_completions"} & set(manifest.settings)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "pointer", "folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_offers_the_one_before_it(run, name, damage):
    file = run / "checkpoint-3" / name
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "pointer": LFS}[damage])
    with pytest.raises(InputError) as caught:
        find_checkpoint(str(run), "true")
    expected = {"gone": "is missing", "folder": "is not a file", "pointer": "is a Git LFS pointer, not the file itself"}
    assert f"checkpoint-3: {name} {expected.get(damage, 'has')}" in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith(f"the one before it is whole: --resume_from_checkpoint {run / 'checkpoint-2'}")
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match="--resume_from_checkpoint .*checkpoint-1$"):
        find_checkpoint(str(run), "true")
    (run / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no whole one is before it: start anew with another --output_dir"):
        find_checkpoint(str(run), "true")
    assert not any(is_whole(run / f"checkpoint-{step}") for step in (1, 2, 3))


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"step": 3}', '{"step": NaN}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_none_is_damage(run, text):
    file = run / "checkpoint-3" / "manifest.json"
    file.unlink() if text is None else file.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"checkpoint-3: (no )?manifest.json.*--resume_from_checkpoint .*checkpoint-2$"):
        find_checkpoint(str(run), "true")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "answers_0.pt"])
def test_what_has_its_size_and_cannot_be_read_is_one_line(run, model, tmp_path, name):
    """And nothing of the run is cut back, since the load is not known to work."""
    file = run / "checkpoint-3" / name
    file.write_bytes(bytes(file.stat().st_size))
    folder = open_run("demo", run)
    for step in range(1, 6):
        folder.append_metrics({"step": step})
    kept = (run / "metrics.jsonl").read_bytes()
    trainer = make_trainer(model, run, max_steps=6, num_iterations=2, **SAVING)
    with pytest.raises(InputError, match=r"checkpoint-3: cannot be loaded \(\w+.*--resume_from_checkpoint .*checkpoint-2$"):
        train_to_end(trainer, folder, run / "checkpoint-3")
    assert (run / "metrics.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": 1}, "--num_iterations 2, not 1"),
        ({"sync_ref_model": True}, "--sync_ref_model False, not True"),
        ({"beta": 0.0}, "--beta 0.04, not 0.0"),
        ({"seed": 7}, "--seed 42, not 7"),
        ({"learning_rate": 1e-2}, "--learning_rate 0.001, not 0.01"),
        ({"lr_scheduler_type": "cosine"}, "--lr_scheduler_type linear, not cosine"),
        ({"gradient_accumulation_steps": 1}, "--gradient_accumulation_steps 2, not 1"),
        ({"optim": "sgd"}, "--optim adamw_torch(_fused)?, not sgd"),
        ({"num_generations": 2}, "--num_generations 4, not 2"),
    ],
)
def test_other_settings_are_refused_by_name(finished, model, tmp_path, settings, message):
    trainer = make_trainer(model, tmp_path, **({"max_steps": 4, "num_iterations": 2} | SAVING | settings))
    with pytest.raises(InputError, match=f"checkpoint-3: was trained with {message}: expected the same, or another --output_dir"):
        trainer.train(resume_from_checkpoint=str(finished[0] / "checkpoint-3"))


def test_what_decides_nothing_may_change(finished, model, tmp_path):
    """A longer run goes on, and how it is saved and logged is free."""
    settings = {"max_steps": 4, "num_iterations": 2, "save_strategy": "no", "logging_steps": 2, "rollout_batch_size": 1}
    trainer = make_trainer(model, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(finished[0] / "checkpoint-3"))
    assert trainer.state.global_step == 4


@dataclass
class Group:
    model_name_or_path: str | None = None
    dataset_name: list[str] | None = None
    use_peft: bool = False
    eval_limit: int = 10


def test_model_data_and_processes_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Rows([{"problem": "a", "source": "x.json"}, {"problem": "b", "source": "x.json"}], [None, None])
    args = MaskConfig(output_dir="out", use_cpu=True)
    (tmp_path / "data").mkdir()
    settings = deciding_settings([Group("base", ["data"]), args], 2)
    manifest = Manifest(1, False, {}, settings, {"training": row_identity(rows), "held-out": None})
    manifest.write(tmp_path)
    manifest = Manifest.read(tmp_path)
    same = deciding_settings([Group("base", [str(tmp_path / "data")], eval_limit=0), args], 2)
    check_same(tmp_path, manifest, same, row_identity(rows))
    moved = Rows([record | {"source": "y.json"} for record in rows.records], [None, None])
    check_same(tmp_path, manifest, same, row_identity(moved))
    for other, message in [
        (deciding_settings([Group("other", ["data"]), args], 2), "--model_name_or_path base, not other"),
        (deciding_settings([Group("base", ["data"], True), args], 2), "--use_peft False, not True"),
        (deciding_settings([Group("base", ["elsewhere"]), args], 2), "--dataset_name data, not elsewhere"),
        (deciding_settings([Group("base", ["data"]), args], 1), "with number of processes 2, not 1"),
    ]:
        with pytest.raises(InputError, match=message):
            check_same(tmp_path, manifest, other)
    fewer, edited = rows.select([0]), Rows([{"problem": "a"}, {"problem": "c"}], [None, None])
    with pytest.raises(InputError, match="was trained on 2 training rows, now there are 1: expected the same rows"):
        check_same(tmp_path, manifest, same, row_identity(fewer))
    with pytest.raises(InputError, match="was trained on other training rows, though as many: expected the same rows"):
        check_same(tmp_path, manifest, same, row_identity(edited))


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"num_train_epochs": 2, "max_steps": -1}])
def test_a_finished_run_trains_no_more_and_keeps_its_checkpoints(model, tmp_path, caplog, settings):
    """Three steps an epoch: a run of 5 ends within one. Of two checkpoints kept none is rotated away."""
    settings = {"save_total_limit": 2, **SAVING, **settings}
    whole = make_trainer(model, tmp_path, **settings)
    whole.train()
    before = sorted(path.name for path in tmp_path.glob("[!.]*"))
    last = find_checkpoint(str(tmp_path), "true")
    resumed = make_trainer(model, tmp_path, **settings)
    with caplog.at_level("INFO"):
        assert train_to_end(resumed, open_run("demo", tmp_path), last) == last
    assert resumed.state.global_step == whole.state.global_step and checksum(resumed.model) == checksum(whole.model)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == before  # beside the lock, which lasts as long as the run
    end = whole.state.global_step
    assert f"{last}: the run was at its end (step {end} of {end}): nothing was trained" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.5},
        {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0},
        {"beta": 0.0, "top_entropy_quantile": 0.3},
        {"beta": 0.04, "bf16": True},
        {"beta": 0.5, "lora": True},
    ],
    ids=["plain", "sync", "entropy", "bf16", "lora"],
)
def test_between_two_passes_over_the_same_answers_nothing_is_lost(model, tmp_path, settings):
    lora = settings.get("lora")
    settings = {key: value for key, value in settings.items() if key != "lora"}
    settings |= {"num_iterations": 2, "max_steps": 5, "save_strategy": "steps", "save_steps": 3}

    def trainer(folder):
        policy = load_qwen_vl(model)
        if lora:
            policy = type(policy)(add_lora(policy.base, r=4, alpha=8, dropout=0.0), policy.processor)
        return make_trainer(model, folder, policy=policy, **settings)

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = [[{key: row.get(key) for key in ("kl", "loss")} for row in t.state.log_history[:5]] for t in (whole, resumed)]
    assert logs[0] == logs[1]


def test_adapters_that_lack_a_weight_are_one_line(model, tmp_path):
    from safetensors.torch import load_file, save_file

    def trainer():
        policy = load_qwen_vl(model)
        policy = type(policy)(add_lora(policy.base, r=4, alpha=8, dropout=0.0), policy.processor)
        return make_trainer(model, tmp_path, policy=policy, max_steps=2, **SAVING)

    trainer().train()
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    state = load_file(file)
    lost = state.pop(sorted(state)[0])
    save_file(state | {"padding": torch.zeros(lost.numel())}, file, metadata={"format": "pt"})
    manifest = Manifest.read(file.parent)
    manifest.files[file.name] = file.stat().st_size
    manifest.write(file.parent)
    with pytest.raises(InputError, match=r"cannot be loaded \(ValueError: .*lora_A.* is missing in its weights\); the one before"):
        trainer().train(resume_from_checkpoint=str(file.parent))


def test_the_manifest_is_the_last_file_of_a_save(model, tmp_path):
    """What is not all written has none."""
    trainer = make_trainer(model, tmp_path, max_steps=1, **SAVING)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert max(written, key=written.__getitem__) == "manifest.json"
    assert json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"] > 1000
