"""Which experts a model's tokens go to, by kind of question: as JSON and as a picture."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.data.rows import Rows, evenly_spread
from engine.files import write_json, write_whole
from engine.report.charts import as_png
from engine.report.heatmap import HeatMap, heat_figure
from engine.rollout.policy import Policy
from engine.tasks.task import Task
from engine.training.sft import padded_answers

ROWS, BATCH = 64, 8  # looked at of each kind, and at once


class Ledger(Protocol):
    """What routing leaves behind."""

    def reset_usage(self) -> None: ...

    def usage(self) -> Tensor:
        """[L, E]: each expert's share of its layer's tokens since `reset_usage`."""


def write_usage(policy: Policy, ledger: Ledger, task: Task, rows: Rows, folder: str | Path) -> dict[str, list[list[float]]]:
    """{kind: [[share of expert e in layer l]]}, written as usage.json and usage.png to `folder`: of prompts and true answers."""
    usage = expert_usage(policy, ledger, task, rows)
    write_json(Path(folder) / "usage.json", usage)
    maps = [_map(kind, shares) for kind, shares in usage.items()]
    write_whole(Path(folder) / "usage.png", as_png(heat_figure(maps)))
    return usage


@torch.no_grad()
def expert_usage(policy: Policy, ledger: Ledger, task: Task, rows: Rows) -> dict[str, list[list[float]]]:
    """Of each kind of question the shares [L][E]."""
    policy.model.eval()
    of_kind: dict[str, list[int]] = {}
    for index in range(len(rows)):
        of_kind.setdefault(rows.record(index)["kind"], []).append(index)
    usage = {}
    for kind, places in of_kind.items():
        ledger.reset_usage()
        chosen = [places[i] for i in evenly_spread(len(places), ROWS)]
        for start in range(0, len(chosen), BATCH):
            _read(policy, task, [rows[i] for i in chosen[start : start + BATCH]])
        usage[kind] = ledger.usage().tolist()
    return usage


def _read(policy: Policy, task: Task, rows: list[dict]) -> None:
    encode = policy.processor.encode
    batch = policy.batch([encode(task.prompt(row), row["images"], row.get("image_id")) for row in rows])
    ids, _ = padded_answers(policy.processor.answer_ids([task.target(row) for row in rows]), policy)
    policy.model(**policy.answer_inputs(batch, ids[:, None]), head=lambda hidden, weight: hidden)


def _map(kind: str, shares: list[list[float]]) -> HeatMap:
    layers, experts = [f"layer {i}" for i in range(len(shares))], [f"{i}" for i in range(len(shares[0]))]
    cells = {(layers[i], experts[e]): 100 * share for i, row in enumerate(shares) for e, share in enumerate(row)}
    return HeatMap(kind, layers, experts, cells, row_label="", column_label="expert")
