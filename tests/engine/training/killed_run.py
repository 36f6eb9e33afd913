"""`grpo_run` that kills itself with SIGKILL in the middle of saving the checkpoint of step `kill_at`."""

import json
import os
import signal
import sys

from engine.training.grpo import GRPOTrainer
from tests.engine.training.grpo_run import make_trainer

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    kill_at = settings.pop("kill_at")
    save_optimizer = GRPOTrainer._save_optimizer_and_scheduler

    def save_or_die(trainer, folder):
        if trainer.state.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        save_optimizer(trainer, folder)

    GRPOTrainer._save_optimizer_and_scheduler = save_or_die
    make_trainer(**settings).train()
