"""The command lines that the published systems document, with only the program replaced by ours.

Each is accepted: where its paths are not there, it ends with one line about the first of them; where they are, it runs. Sources:
the READMEs of Med-R1 and of its fork AdvMed-R1 with the pages that it links (src/utils/README.md, src/eval_vqa/QUICKSTART.md and
README_ADVERSARIAL.md), the scripts that MedVLM-R1's README names, and both READMEs of PRS-Med. The skin system prepares its data
and trains its stage 1 by scripts without flags, as our recipes may be run. `hf download` and `huggingface-cli download` are
Hugging Face's own.
"""

import json
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from engine.command.main import run_command
from engine.download import hub
from tests.tiny_qwen import save_tiny

MODEL = "/path/to/Qwen2.5-VL-3B-Instruct"
SPLITS = "../../Splits"
CT = rf"{SPLITS}/modality/test/CT\(Computed\ Tomography\)_test.json"
MEDR1_TRAINING = (
    "--output_dir ./output/Modality_CT --model_name_or_path ./checkpoints/Qwen2.5-VL-3B-Instruct --dataset_name ./data/VQA/CT_384 "
    "--max_prompt_length 1024 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --logging_steps 1 --bf16 "
    "--report_to wandb --gradient_checkpointing false --attn_implementation flash_attention_2 --max_pixels 401408 "
    "--num_train_epochs 2 --run_name Qwen2.5-VL-3B-GRPO-CT --save_steps 200 --save_only_model true --num_generations 4"
)
MEDVLM_TRAINING = (
    "--output_dir out/medvlm-r1/run --model_name_or_path ./Qwen2-VL-2B-Instruct --dataset_name data/Huatuo/ --dataset_selection MR "
    "--max_prompt_length 512 --max_completion_length 512 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 "
    "--logging_steps 1 --bf16 true --report_to wandb --gradient_checkpointing false --attn_implementation flash_attention_2 "
    "--max_pixels 401408 --num_train_epochs 2 --run_name run --save_steps 50 --save_only_model true --num_generations 4"
)
MEDVLM_TEST = (
    "--modality MRI --prompt_type complex --model_path ./MedVLM-R1 --bsz 1 --output_path out/Ours_MRI1600_OOD_MRI300.json "
    "--prompt_path MRI_CT_XRAY_300each_dataset.json --base_path data/Huatuo --max_new_tokens 512 --do_sample false "
    "--temperature 1.0"
)
PRS = "--vlm_path microsoft/llava-med-v1.5-mistral-7b --sam_ckpt weights/tinysam_42.3.pth --batch_size 8 --epochs 20"
PRS_AUTHORS = (
    "--model_path /path/to/your/based_model --data_path /path/to/your/images/data --annotation_path /path/to/your/annotations "
    "--batch_size 4 --epochs 50 --save_dir /path/to/your/save/dir --grad_accum_steps 8 --grad_clip_norm 1.0"
)
PRS_SETS = "brain_tumors_ct_scan breast_tumors_ct_scan lung_CT lung_Xray polyp_endoscopy skin_rgbimage".split()
PRS_ROOT = "/path/to/data/prs-med-dataset"
PRS_ALL = ",".join(f"{PRS_ROOT}/annotations/{name}.csv" for name in PRS_SETS)
PRS_OWN = "/path/to/data/our-dataset/annotations/head_and_neck.csv,/path/to/data/our-dataset/annotations/prostate.csv "
SINGLE = f"--model_path {MODEL} --test_data {CT} --dataset_root ../.. --output_path ../../results/ct.json"
BATCH = f"--model_path {MODEL} --splits_dir ../../Splits --dataset_root ../.. --output_dir ../../results/adversarial_eval"

PGD = "--pgd_alpha 0.01 --pgd_iters 10"
CT_GONE = "../../Splits/modality/test/CT(Computed Tomography)_test.json: no such file"
DATA_GONE, TEST_GONE = "data/VQA/CT_384: no such file", "MRI_CT_XRAY_300each_dataset.json: no such file"
UNREACHABLE = "http://127.0.0.1:9: cannot be reached"

LINES = [  # recipe, flags, what is said where nothing of it is there
    # Med-R1's README; then what its launch script for thought has otherwise, and its test scripts
    ("medr1_grpo", MEDR1_TRAINING, DATA_GONE),
    (
        "medr1_grpo",
        MEDR1_TRAINING
        + " --per_device_train_batch_size 2 --num_train_epochs 1 --save_steps 1000 --deepspeed configs/ds_zero2.json",
        "--deepspeed configs/ds_zero2.json: No such file",
    ),
    (
        "medr1_eval",
        f"--model_path {MODEL} --batch_size 64 --output_path out.json --prompt_path prompts/modality/test/CT.json",
        "prompts/modality/test/CT.json: no such file",
    ),
    # AdvMed-R1
    ("medr1_eval", f"{SINGLE} --batch_size 8", CT_GONE),
    ("medr1_eval", f"{SINGLE} --attn_implementation sdpa", CT_GONE),
    ("medr1_eval", f"{SINGLE} --attn_implementation eager", CT_GONE),
    ("medr1_adversarial_eval", f"{SINGLE} --batch_size 8 --attack_type clean", CT_GONE),
    ("medr1_adversarial_eval", f"{SINGLE} --batch_size 4 --attack_type fgsm --epsilon 0.03", CT_GONE),
    (
        "medr1_adversarial_eval",
        f"{SINGLE} --batch_size 4 --attack_type pgd --epsilon 0.03 --pgd_alpha 0.01 --pgd_iters 10",
        CT_GONE,
    ),
    ("medr1_adversarial_eval", f"{SINGLE} --attack_type pgd --save_sample_images 5 --attn_implementation auto", CT_GONE),
    ("medr1_batch_eval", f"{BATCH} --batch_size 8 --evaluation_type modality", f"{SPLITS}: no file"),
    ("medr1_batch_eval", f"{BATCH} --attacks clean --batch_size 8", f"{SPLITS}: no file"),
    (
        "medr1_batch_eval",
        f"{BATCH} --attacks clean fgsm pgd --epsilon 0.03 {PGD} --evaluation_type both",
        f"{SPLITS}: no file",
    ),
    (
        "medr1_batch_eval",
        f"{BATCH} --modalities 'CT(Computed Tomography)' X-Ray 'MR (Mag-netic Resonance Imaging)' --attacks clean fgsm",
        f"{SPLITS}: no file",
    ),
    # MedVLM-R1
    ("medvlm_r1_grpo", MEDVLM_TRAINING, "data/Huatuo: no such file"),
    (
        "medvlm_r1_grpo",
        f"{MEDVLM_TRAINING} --deepspeed local_scripts/zero3.json",
        "local_scripts/zero3.json: No such file",
    ),
    ("medvlm_r1_eval", MEDVLM_TEST, TEST_GONE),
    ("medvlm_r1_eval", MEDVLM_TEST.replace("complex", "simple").replace("false", "true"), TEST_GONE),
    # PRS-Med: the README of its second implementation, then the authors'
    (
        "prs_med_train",
        f'--data_root /path/to/data/prs-med-dataset --ann_paths "{PRS_ALL}" {PRS}',
        "/path/to/data/prs-med-dataset: no such",
    ),
    ("prs_med_train", f'--data_root /path/to/data/our-dataset --ann_paths "{PRS_OWN}" {PRS}', "/path/to/data/our-dataset: no such"),
    (
        "prs_med_train",
        f"--data_root ./data --learning_rate 1e-4 --num_epochs 20 --lora_rank 16 --lora_alpha 16 --lambda_txt 0.5 "
        f"--use_amp --gradient_accumulation_steps 4 --checkpoint_dir ./checkpoints {PRS}",
        "data: no such folder",
    ),
    ("prs_med_train", PRS_AUTHORS, "--vlm_path and --sam_ckpt belong together"),
    ("prs_med_train", f"{PRS_AUTHORS} --sam_ckpt tinysam.pth", "/path/to/your/images/data: no such folder"),
    ("prs_med_eval", "--checkpoint ./checkpoints/best --data_root ./data --batch_size 8", "data: no such folder"),
    ("prs_med_infer", "--model ./checkpoints/best --image scan.png --question Where?", "scan.png"),
    # the download of AdvMed-R1; then Hugging Face's, which it and MedVLM-R1 have
    ("download", "--model qwen2.5-vl-3b --output ./models/Qwen2.5-VL-3B-Instruct", UNREACHABLE),
    ("download", "--model med-r1 --output ./checkpoints/Med-R1", UNREACHABLE),
    ("download", "--model Qwen/Qwen2-VL-7B-Instruct --output ./models/Qwen2-VL-7B", UNREACHABLE),
    ("download", "--model facebook/opt-125m --output ./models/opt-125m", UNREACHABLE),
    ("download", "--model YOUR_MODEL --output ./models --token YOUR_HF_TOKEN", "--model YOUR_MODEL: expected OWNER/NAME"),
    ("download", "--model qwen2.5-vl-3b --output ./models --max-workers 16 --no-resume", UNREACHABLE),
    ("download", "Qwen/Qwen2.5-VL-3B-Instruct --local-dir ./models/Qwen2.5-VL-3B-Instruct", UNREACHABLE),
    (
        "download",
        "FreedomIntelligence/PubMedVision --repo-type dataset --local-dir data --local-dir-use-symlinks False --include '*'",
        UNREACHABLE,
    ),
    ("download", "-m qwen2-vl-7b -o ./models/Qwen2-VL-7B -t YOUR_HF_TOKEN", UNREACHABLE),
    # the skin system: its settings files, and its own script of stage 1, which has no flags
    ("skin_sft", "--config src/config.json", "--config src/config.json: No such file"),
    ("skin_grpo", "--config src/config_stage2.json", "--config src/config_stage2.json: No such file"),
    ("skin_grpo", "--config src/config_stage2_hf.json", "--config src/config_stage2_hf.json: No such file"),
]
REFUSED = ["--device cuda:0", "--specific_dataset head_and_neck", "--image_size 1024", "--lambda_seg 1.0", "--compile_model"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that AdvMed-R1's commands are typed in, src/eval_vqa, of a root without anything else."""
    folder = tmp_path / "src" / "eval_vqa"
    folder.mkdir(parents=True)
    (tmp_path / "installed" / "wandb").mkdir(parents=True)
    (tmp_path / "installed" / "wandb" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))  # --report_to wandb is refused where it is not installed
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    return folder


def run(recipe: str, line: str, capsys) -> tuple[int, str, str]:
    """(exit code, standard output, the last line of standard error) of a recipe with these flags."""
    code = 0
    try:
        run_command(import_module(f"recipes.{recipe}").main, shlex.split(line))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err.strip().splitlines()[-1] if err.strip() else ""


@pytest.mark.parametrize("recipe, line, gone", LINES)
def test_a_published_command_says_which_path_is_not_there(place, capsys, recipe, line, gone):
    code, out, last = run(recipe, line, capsys)
    assert code == 2 and out == "" and last.startswith("error: ") and gone in last
    assert list(place.iterdir()) == [], "nothing was written"


@pytest.mark.parametrize("flag", REFUSED)
def test_what_is_not_taken_is_refused_by_name(place, capsys, flag):
    code, _, last = run("prs_med_train", f"--data_root ./data {PRS} {flag}", capsys)
    assert code == 2 and last.startswith(f"error: {flag.split()[0]} is not taken: ")


@pytest.fixture
def filled(place):
    """The same folder, where all that the commands name is there: a tiny model, and two questions of each part."""
    root = place.parents[1]
    rows: list[dict] = []
    for number, subset in enumerate(["CT(Computed Tomography)", *["MR (Mag-netic Resonance Imaging)"] * 2]):
        problem, letter = "Which technique is it? A)CT, B)MRI", "BA"[number == 0]
        name = f"Images/Chest CT Scan/{number} (1).png"
        for base in (root / "OmniMedVQA", place / "data/VQA/CT_384", place / "data/Huatuo"):  # as their READMEs place them
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(base / name)
        rows.append({"image": name, "problem": problem, "solution": f"<answer> {letter} </answer>", "subset": subset})
    parts = ["modality/test/CT(Computed Tomography)", "modality/test/X-Ray", "modality/test/MR (Mag-netic Resonance Imaging)"]
    files = [root / "Splits" / f"{part}_test.json" for part in [*parts, "question_type/test/Disease Diagnosis"]]
    published = [{key: value for key, value in row.items() if key != "subset"} for row in rows]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(published))
    for folder in ("data/VQA/CT_384", "data/Huatuo"):
        (place / folder / "train.json").write_text(json.dumps(rows))
    (place / "MRI_CT_XRAY_300each_dataset.json").write_text(json.dumps([row | {"image": [row["image"]]} for row in rows]))
    save_tiny(root / "model")
    return root


@pytest.mark.parametrize(
    "recipe, line",
    [
        (recipe, line)
        for recipe, line, gone in LINES
        if gone in (CT_GONE, TEST_GONE, f"{SPLITS}: no file", DATA_GONE, "data/Huatuo: no such file")
    ],
)
def test_a_published_command_runs_where_its_paths_are_there(filled, capsys, recipe, line):
    for name in (MODEL, "./checkpoints/Qwen2.5-VL-3B-Instruct", "./Qwen2-VL-2B-Instruct", "./MedVLM-R1"):
        line = line.replace(f"{name} ", f"{filled / 'model'} ")
    short = "--report_to none --max_completion_length 4" if recipe.endswith("grpo") else "--max_new_tokens 2"
    code, out, last = run(recipe, f"{line} {short}", capsys)
    assert code == 0, last
    headline = json.loads(out)
    if "--output_path" in line:
        flags = shlex.split(line)
        written = json.loads(Path(flags[flags.index("--output_path") + 1]).read_text())
        assert {"accuracy"} <= set(written) and 0 <= written["accuracy"] <= 100
    if recipe == "medvlm_r1_eval":
        assert headline["num_samples"] == 2, "those about MRI"
    elif recipe == "medr1_batch_eval":
        assert headline["parts"] == (4 if "both" in line else 3)
    elif recipe.endswith("grpo"):
        assert Path(headline["checkpoint"]).is_dir()
