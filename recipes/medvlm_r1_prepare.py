"""MedVLM-R1, data: the published radiology questions and images become a folder that `recipes.medvlm_r1_grpo` trains on.

    python -m recipes.medvlm_r1_prepare --data Medical_Multimodal_Evaluation_Data --output data/MR \\
        --test MRI_CT_XRAY_300each_dataset.json
    python -m recipes.medvlm_r1_grpo --dataset_name data/MR --model_name_or_path Qwen/Qwen2-VL-2B-Instruct

`Medical_Multimodal_Evaluation_Data` is a copy of FreedomIntelligence's hub data set of that name with its images.zip unpacked; a
Parquet file, a save_to_disk folder or the hub name itself (then with --images DIR) will do. `--test` takes the file in
MedVLM-R1's repository, whose images are in the same images.zip. Out of it come the test part, on which training is evaluated per
modality before and after, and the leaked rows: test questions about an image that train shows too, by file name or by pixels. The
last line counts train and test rows, missing images, bad rows and leaked rows; DIR/report.json lists each of them.

As in the published code (arXiv:2502.19634, section 3): the first 500 rows of each modality, shuffled with seed 42, images as they
are. The paper speaks of 600 MRI samples (`--rows 600`). The differences: its README sends users to PubMedVision, which has not
these images; rows and test come from one collection and are not compared there. Leaked rows stay by default, since the published
numbers may have them; `--drop_leaked` takes their images out of train.
"""

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.data.prepare.radiology import RadiologyPreparation, prepare_radiology


def main(argv: list[str]) -> dict:
    (options,) = parse_arguments(RadiologyPreparation, argv, recipe="medvlm_r1_prepare", description=__doc__)
    return prepare_radiology(options)


if __name__ == "__main__":
    run_command(main)
