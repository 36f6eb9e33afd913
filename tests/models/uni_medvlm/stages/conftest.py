"""What stages 1 to 3 leave, made once: each from the one before it, with weights that differ from those it began with."""

import pytest

from models.uni_medvlm.experts import ExpertLoRA
from models.uni_medvlm.stages.artifacts import load_stage1, load_stage2, save_stage1, save_stage2, save_stage3
from models.uni_medvlm.stages.trainable import prepare_stage
from tests.models.uni_medvlm.small_unimed import disturb, small_unimed

LORA = ExpertLoRA(r=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """{name: folder} of stage1, stage2, stage3 (on stage 2's weights) and stage3_alone (on the bare language model)."""
    folder = tmp_path_factory.mktemp("stages")
    policy = small_unimed()
    prepare_stage(policy.model, 1)
    disturb(policy.model)
    save_stage1(policy.model, folder / "stage1")

    policy = small_unimed()
    load_stage1(policy.model, folder / "stage1")
    prepare_stage(policy.model, 2, LORA)
    disturb(policy.model)
    save_stage2(policy.model, folder / "stage2")

    for name in ("stage3", "stage3_alone"):
        policy = small_unimed()
        load_stage1(policy.model, folder / "stage1")
        if name == "stage3":
            load_stage2(policy.model, folder / "stage2")
        prepare_stage(policy.model, 3, LORA)
        disturb(policy.model)
        save_stage3(policy.model, folder / name)
    return {path.name: path for path in folder.iterdir()}
