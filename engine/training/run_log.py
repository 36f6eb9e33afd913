"""What a training run says while it runs: a progress bar with the numbers that matter, and a line in metrics.jsonl a step."""

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from engine.command.run_folder import RunFolder
from engine.progress import progress

SHOWN = {"reward": "reward", "kl": "kl", "completions/mean_length": "tokens", "loss": "loss"}


class RunLog(TrainerCallback):
    """Takes the place of transformers' progress and print callbacks, which write to standard output."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.truncate(state.global_step + 1)  # here, since all that a resumed run begins with has been read by now
        if state.is_world_process_zero:
            self.bar = progress(total=state.max_steps, initial=state.global_step, desc="training", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.run.append_metrics({"step": state.global_step, **logs})
        if self.bar is not None:
            self.bar.set_postfix({short: f"{logs[name]:.3g}" for name, short in SHOWN.items() if name in logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
