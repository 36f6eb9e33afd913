"""What a GRPO log says is of all processes and all steps since the last one."""

import json
from types import SimpleNamespace

import pytest
import torch

from engine.training.config.grpo import GRPOConfig
from engine.training.groups import Group
from engine.training.step_log import Spread, StepLog
from tests.engine.training.grpo_run import TextTask, make_trainer
from tests.engine.training.test_recovery import finish, start
from tests.tiny_qwen import save_tiny

NAN = float("nan")


def group(rewards, lengths, truncated=False):
    """Answers of these lengths; rewards of two functions each."""
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    row = {"problem": "?", "solution": "!", "images": []}
    cut = torch.full((len(lengths),), truncated)
    return Group(row, mask.long(), mask.long(), cut, ["x"] * len(lengths), torch.tensor(rewards), torch.zeros(len(lengths)))


STEPS = [  # of each of two processes, a step's groups
    [[group([[1.0, NAN], [3.0, NAN]], [2, 4]), group([[2.0, 5.0], [2.0, NAN]], [8, 6])], [group([[NAN, NAN]] * 2, [3, 3])]],
    [[group([[NAN, NAN]] * 2, [1, 5]), group([[0.0, NAN], [NAN, NAN]], [7, 7])], [group([[4.0, 1.0], [8.0, 2.0]], [5, 5])]],
]
LOSSES = [  # (entropy, kl, least share clipped, most)
    [(1.0, 0.0, 0.1, 0.2), (2.0, 0.5, 0.3, 0.9)],
    [(6.0, 0.1, 0.0, 0.4)],
]
TASK = TextTask()


def logs_of(tmp_path, processes):
    """The log of each process, which exchange what they have seen."""
    args = GRPOConfig(output_dir=str(tmp_path), beta=0.1)
    made = []
    for rank in range(processes):
        log = StepLog(args, TASK, ["f", "g"])
        log.start_step()
        for step, groups in enumerate(STEPS[rank]):
            rewards = torch.cat([one.rewards for one in groups])
            log.add_groups(groups, rewards.nansum(1).masked_fill(rewards.isnan().all(1), NAN), step)
        for entropy, kl, low, high in LOSSES[rank]:
            clips = {"low_mean": 0.0, "high_mean": 0.0, "region_mean": 0.0, "low_min": low, "high_max": high}
            metrics = {"entropy": entropy, "kl": kl} | {f"clip_ratio/{name}": value for name, value in clips.items()}
            log.add_tensors({name: torch.tensor(value) for name, value in metrics.items()})
        made.append(log)
    sent, calls = [], []

    def collected(log, rank, gather):
        accelerator = SimpleNamespace(
            num_processes=processes, process_index=rank, is_main_process=rank == 0, device="cpu", gather=gather
        )
        return log.collect(accelerator, {}, {}, 2)

    class Sent(Exception):
        pass

    def note(numbers):
        sent.append(numbers)
        raise Sent

    for rank, log in enumerate(made if processes > 1 else []):
        with pytest.raises(Sent):
            collected(log, rank, note)

    def gather(numbers):
        calls.append(len(numbers))
        return torch.cat(sent)

    logs = [collected(log, rank, gather) for rank, log in enumerate(made)]
    assert len(calls) == (processes if processes > 1 else 0)  # one exchange a process
    return logs


def test_a_log_is_of_all_processes_and_steps(tmp_path):
    first, second = logs_of(tmp_path, 2)
    for name in first.keys() - {"tokens_per_second", "seconds/step", "seconds/train"}:
        assert first[name] == second[name], name
    totals = [[1.0, 3, 7, 2, 0], [5.0, 10.0]]  # by step, of the answers that were scored
    means = [sum(step) / len(step) for step in totals]
    assert first["reward"] == pytest.approx(sum(means) / 2)
    f = [[1.0, 3, 2, 2, 0], [4.0, 8.0]]
    assert first["rewards/f/mean"] == pytest.approx((sum(f[0]) / 5 + 6) / 2)
    assert first["rewards/f/std"] == pytest.approx((torch.tensor(f[0]).std().item() + torch.tensor(f[1]).std().item()) / 2)
    assert first["rewards/g/mean"] == pytest.approx((5 + 1.5) / 2)
    assert first["rewards/g/std"] == pytest.approx(0.5**0.5)  # of the one step that has two
    stds = [[2**0.5, torch.tensor([7.0, 2.0]).std().item()], [torch.tensor([5.0, 10.0]).std().item()]]
    assert first["reward_std"] == pytest.approx((sum(stds[0]) / 2 + stds[1][0]) / 2)
    assert (first["completions/min_length"], first["completions/max_length"]) == (1, 8)
    assert first["entropy"] == pytest.approx(3) and first["kl"] == pytest.approx(0.2)
    assert first["clip_ratio/low_min"] == 0 and first["clip_ratio/high_max"] == pytest.approx(0.9)


def test_what_nothing_was_seen_of_is_left_out(tmp_path):
    log = StepLog(GRPOConfig(output_dir=str(tmp_path)), TASK, ["f", "g"])
    log.start_step()
    unscored = [group([[NAN, NAN]] * 2, [3, 3])]
    log.add_groups(unscored, torch.full((2,), NAN), 0)
    alone = SimpleNamespace(num_processes=1, is_main_process=True, device="cpu")
    logs = log.collect(alone, {}, {}, 1)
    assert "completions/mean_length" in logs and not [name for name in logs if "reward" in name and "frac" not in name]
    assert "entropy" not in logs and "kl" not in logs
    log.start_step()
    assert set(log.collect(alone, {}, {}, 2)) == {"tokens_per_second", "seconds/train", "seconds/step"}


def test_deviations_of_parts_are_those_of_the_whole():
    values = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) + 1e6
    values[3, 1] = values[7, 2] = NAN
    parts = [Spread.of(part) for part in values.split([5, 1, 6])]
    whole = Spread(*(torch.stack(column) for column in zip(*parts, strict=True))).join()
    for i, column in enumerate(values.double().T):
        known = column[~column.isnan()]
        assert whole.mean[i].item() == pytest.approx(known.mean().item(), rel=1e-12)
        assert whole.std[i].item() == pytest.approx(known.std().item(), rel=1e-6)


def test_equal_rewards_have_no_deviation():
    assert Spread.of(torch.full((7, 1), 0.3)).std.item() == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_two_processes_log_what_one_does(model, tmp_path):
    """Also where a reward applies to the rows of one process only, and where steps are logged two at a time."""
    settings = {"model": model, "max_steps": 4, "gradient_accumulation_steps": 1, "logging_steps": 2, "sometimes": True}
    two = start(settings | {"output_dir": str(tmp_path / "two"), "per_device_train_batch_size": 1}, processes=2)
    two = finish(two)["logs"]
    one = finish(start(settings | {"output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 2}))["logs"]
    assert len(two) == len(one) == 3
    for a, b in zip(two[:2], one[:2], strict=True):
        assert a.keys() == b.keys() and "logged/both" in a
        for name in a.keys() - {name for name in a if "second" in name or "memory" in name}:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_an_answer_with_separators_of_lines_is_logged_in_one_line(tmp_path):
    """Tokens of byte-level vocabularies can spell them, and halves of letters."""
    texts = ["a\u2028b", "c\u2029d\x85", "\ud83d"]
    row = {"problem": "first\u2028second?", "solution": "\u2028", "images": []}
    answers = Group(row, *[torch.ones(3, 8).long()] * 2, torch.zeros(3).bool(), texts, torch.ones(3, 2), torch.zeros(3))
    log = StepLog(GRPOConfig(output_dir=str(tmp_path), log_completions=True), TASK, ["f", "g"])
    log.last_groups = [answers, answers]
    log._show_answers(1)
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [[answer["text"] for answer in line["completions"]] for line in lines] == [texts, texts]
    assert lines[0]["question"] == row["problem"]


def test_what_rewards_log_and_give_up_on_is_in_the_files(model, tmp_path):
    def scoring(completions, log_metric, log_extra, **columns):
        log_metric("my metric", 2.0)
        log_extra("place", list(range(len(completions))))
        return [None, *range(1, len(completions))]

    trainer = make_trainer(model, tmp_path, reward_funcs=[scoring], max_steps=1, log_completions=True)
    trainer.train()
    assert trainer.state.log_history[0]["my metric"] == 2
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [answer["place"] for line in lines for answer in line["completions"]] == list(range(16))
    assert [answer["rewards"] for answer in lines[0]["completions"]] == [{}, {"scoring": 1}, {"scoring": 2}, {"scoring": 3}]
