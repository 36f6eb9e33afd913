"""`--torch_compile`: what a compiled run learns is what an uncompiled one does, from few programs, and nothing of it is saved.

Fine-tuning and GRPO are compiled by Inductor; the others go as far as the graphs that it would be given: a tenth of the time.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import config as inductor

from engine.errors import InputError
from engine.training.compiled.layers import MOST_PROGRAMS
from engine.training.config.sft import SFTConfig
from models.loading import load_policy
from tests.engine.training import grounding_run, grpo_run, sft_run, test_masks
from tests.engine.training.test_recovery import finish, start
from tests.tiny_qwen import noise_image, save_tiny

PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def ragged(rows: list[dict]) -> list[dict]:
    """Images of other sizes, from one window to several of several lengths."""
    return [row | {"images": [noise_image(i, 28 * (i % 3 + 1), 56)]} for i, row in enumerate(rows)]


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history[:-1]]


def assert_same(compiled, eager) -> None:
    """Losses and weights; with PLAIN settings the weights' changes are sums of gradients. GRPO's loss is a sum of terms of about 1
    that cancel, advantages times ratios: it is compared on their scale."""
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5, abs=1e-6)
    for (name, one), other in zip(compiled.model.named_parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=name)


def assert_few_programs(trainer) -> None:
    """Regions are of the model's parts, two programs with gradients and two without at most, and the last log says how many."""
    said = next(row for row in reversed(trainer.state.log_history) if "loss" in row)
    made = [number for region in trainer.compiled.regions for number in region.compilations.values()]
    assert 1 <= max(made) <= MOST_PROGRAMS
    assert said["compile/compilations"] == sum(made) and said["compile/most_of_a_region"] == max(made)


@pytest.fixture(scope="module")
def sft(model, tmp_path_factory):
    """(compiled, eager, the compiled run's folder): fine-tuning of all weights, the tower's too."""
    folder = tmp_path_factory.mktemp("sft")
    settings = {"data": ragged(sft_run.rows()), "save_strategy": "steps", "save_steps": 2, **PLAIN}
    runs = [sft_run.make_trainer(model, folder / str(flag), torch_compile=flag, **settings) for flag in (True, False)]
    for trainer in runs:
        trainer.train()
    return *runs, folder / "True"


def test_fine_tuning_learns_the_same(sft):
    compiled, eager, _ = sft
    assert_same(compiled, eager)


def test_ragged_rows_need_few_programs(sft):
    compiled, eager, _ = sft
    assert_few_programs(compiled)
    assert {region.part for region in compiled.compiled.regions} == {"language model", "vision tower"}
    assert all(region.compilations[True] for region in compiled.compiled.regions)
    assert not any(name.startswith("compile/") for row in eager.state.log_history for name in row)


def test_a_resumed_run_is_the_same_to_the_last_bit(sft, model):
    compiled, _, folder = sft
    settings = {"data": ragged(sft_run.rows()), "save_strategy": "no", **PLAIN}
    resumed = sft_run.make_trainer(model, folder / "resumed", torch_compile=True, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert losses(resumed)[-2:] == losses(compiled)[-2:]
    for one, other in zip(compiled.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_saved_and_what_is_left_are_those_of_an_uncompiled_run(sft, model):
    compiled, eager, folder = sft
    saved = [load_file(run / "checkpoint-4" / "model.safetensors") for run in (folder, folder.parent / "False")]
    assert saved[0].keys() == saved[1].keys()
    assert list(compiled.model.state_dict()) == list(eager.model.state_dict()) == list(load_policy(model).model.state_dict())
    assert not [name for name, module in compiled.model.named_modules() if ".layers." in name and "forward" in vars(module)]


def test_grpo_learns_the_same_with_a_reference(model, tmp_path):
    settings = {"rows": ragged(grpo_run.questions()), "beta": 0.04, **PLAIN}
    compiled, eager = (grpo_run.make_trainer(model, tmp_path / str(flag), torch_compile=flag, **settings) for flag in (True, False))
    for trainer in (compiled, eager):
        trainer.train()
    assert_same(compiled, eager)
    assert_few_programs(compiled)
    policy, reference = (
        [region for region in compiled.compiled.regions if next(region.layers[0].parameters()).requires_grad is trained]
        for trained in (True, False)
    )
    assert all(region.compilations[True] for region in policy)
    assert reference[0].compilations[False] and not any(region.compilations[True] for region in reference)


def test_adapters_and_checkpointed_layers_learn_the_same(model, tmp_path):
    """The backward pass runs the compiled layers again."""
    trainers = []
    for backend in ("aot_eager", None):
        torch.manual_seed(0)
        policy = load_policy(model, lora={"r": 4, "alpha": 8, "dropout": 0.0})
        settings = {"data": ragged(sft_run.rows()), "gradient_checkpointing": True, "torch_compile_backend": backend, **PLAIN}
        trainers.append(sft_run.make_trainer(model, tmp_path / str(backend), policy=policy, **settings | {"learning_rate": 1e-1}))
        trainers[-1].train()
    assert_same(*trainers)
    assert_few_programs(trainers[0])
    assert losses(trainers[0])[-1] < losses(trainers[0])[0]


def test_two_processes_learn_the_same(model, tmp_path):
    settings = {"model": model, "max_steps": 2, "gradient_accumulation_steps": 1, "torch_compile_backend": "aot_eager", **PLAIN}
    two = finish(start(settings | {"output_dir": str(tmp_path / "two")}, processes=2, module="tests.engine.training.sft_run"))
    one = sft_run.make_trainer(
        model, tmp_path / "one", max_steps=2, gradient_accumulation_steps=1, per_device_train_batch_size=4, **PLAIN
    )
    one.train()
    assert two["losses"] == pytest.approx(losses(one), rel=1e-5)
    assert two["checksum"] == pytest.approx(grpo_run.checksum(one.model), rel=1e-6)


def test_masks_are_learnt_the_same(tmp_path):
    trainers = []
    for backend in ("aot_eager", None):
        trainer = test_masks.make_trainer(tmp_path / str(backend), torch_compile_backend=backend, **PLAIN)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # compiled, it draws other numbers
        trainer.train()
        trainers.append(trainer)
    assert_same(*trainers)
    assert_few_programs(trainers[0])
    parts = {region.part for region in trainers[0].compiled.regions if sum(region.compilations.values())}
    assert parts == {"language model", "vision tower", "image encoder"}


def test_grounding_learns_the_same(tmp_path):
    compiled, eager = (
        grounding_run.make_trainer(tmp_path / str(backend), policy="unimed", torch_compile_backend=backend, **PLAIN)
        for backend in ("aot_eager", None)
    )
    for trainer in (compiled, eager):
        trainer.train()
    assert_same(compiled, eager)
    assert_few_programs(compiled)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"torch_compile_backend": "tvm"}, "--torch_compile_backend tvm: expected inductor, aot_eager or eager"),
        ({"torch_compile_mode": "reduce-overhead"}, "--torch_compile_mode reduce-overhead is not supported: its CUDA graphs"),
        ({"torch_compile_mode": "slow"}, "--torch_compile_mode slow: expected default or max-autotune-no-cudagraphs"),
        ({"torch_compile_mode": "default", "torch_compile_backend": "eager"}, "--torch_compile_mode is not for"),
        ({"torch_compile": True, "use_liger_kernel": True}, "--torch_compile and --use_liger_kernel fuse the same layers"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(tmp_path, settings, message):
    with pytest.raises(InputError) as error:
        SFTConfig(output_dir=str(tmp_path), **settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_without_a_compiler_it_is_one_line(tmp_path):
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(InputError, match="--torch_compile needs a C.. compiler"),
    ):
        SFTConfig(output_dir=str(tmp_path), torch_compile=True, use_cpu=True)


def test_quantized_layers_are_refused(model, tmp_path):
    trainer = sft_run.make_trainer(model, tmp_path, torch_compile=True)
    layer = trainer.policy.layers[0]
    layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="--torch_compile: quantized layers are not supported"):
        trainer.train()
