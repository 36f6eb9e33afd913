"""MedVLM-R1, evaluation: accuracy on MRI, CT and X-ray questions (arXiv:2502.19634, section 3).

    python -m recipes.medvlm_r1_eval
    python -m recipes.medvlm_r1_eval --model JZPeterPan/MedVLM-R1 --data MRI_CT_XRAY_300each_dataset.json --image_root Huatuo

The second command scores the published model on the published test file, all three modalities at once (the published script needs
a run for each): the paper has a mean of 78.22 %, and 55.11 % for Qwen2-VL-2B before training. `Huatuo` holds images/, unpacked from
the images.zip of FreedomIntelligence/Medical_Multimodal_Evaluation_Data. `--modality` asks about one modality. Answers are greedy,
unless `--do_sample`. The published flags --model_path, --prompt_path, --base_path, --output_path and --bsz work too.
With no flags: the starter policy, before any GRPO, on the 150 starter test questions about MRI, CT and X-ray: 36.0 %, in about 10 s
on one CPU thread.

The run folder gets evaluation.json (the published `accuracy` in percent and `results`, and `scores` as fractions with Wilson 95 %
intervals), accuracy.png and report.html. The last line is JSON: accuracy, low, high (fractions), num_samples, unanswered, output,
by_modality (accuracy, low, high, num_correct, num_samples of each).

Differences from the published script: it counts `<answer>C</answer>` with one capital as an answer, or with `--prompt_type simple`
a text that is nothing but the letter; here `C)`, `(C)`, `c` and the option's text count too, and the last answer is read instead of
the first. `--compat reference` reads as it does. Its --do_sample, --temperature and --max_new_tokens have no effect (its call of
`generate` has its own); here they do, and what is drawn does not depend on the batch. Of the seven names of its --modality it has
rows for three, and divides by zero for the others; here whatever the data hold is asked about. The prompts are its own, letter for
letter; they are indented by 4 spaces where training has 8. The starter policy, a small model that knows one prompt, and what is
trained from it must be asked as in training: `--prompt_type train_complex`.
"""

from dataclasses import dataclass

from engine.command.arguments import parse_arguments
from engine.command.evaluation_settings import QuestionArguments
from engine.command.main import run_command
from engine.command.settings import setting
from engine.data.split_names import RADIOLOGY

TEMPLATES = {
    "complex": "medvlm_eval_complex",
    "simple": "medvlm_eval_simple",
    "train_complex": "medvlm_train_complex",
}
MODALITIES = {"Xray": "X-Ray"} | {name: name for name in ("CT", "MRI", "Ultrasound", "Dermoscopy", "Microscopy", "Fundus")}


@dataclass
class EvaluationArguments(QuestionArguments):
    """What is asked of which model."""

    modality: str | None = setting(
        None, "Ask about one modality. None: all in the data, of the starter data MRI, CT, X-ray.", choices=sorted(MODALITIES)
    )
    prompt_type: str | None = setting(
        None,
        "Ask for reasoning and a tagged answer, or for a bare letter; train_complex asks as training does. None: complex, for the "
        "starter policy train_complex.",
        choices=list(TEMPLATES),
    )
    max_new_tokens: int = setting(512, "Longest answer in tokens.", at_least=1, at_most=2**17)
    do_sample: bool = setting(False, "Draw answers instead of taking the likeliest.")
    temperature: float = setting(1.0, "Of drawn answers.", more_than=0)
    seed: int = setting(42, "Decides what is drawn.", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        self.prompt_type = self.prompt_type or ("complex" if self.model else "train_complex")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(EvaluationArguments, argv, recipe="medvlm_r1_eval", description=__doc__)

    # Imported once the flags are known to be good, since these take seconds.
    from engine.rollout.sampling import GREEDY, SamplingParams
    from engine.runs.evaluate import evaluate_questions
    from models.loading import load_policy

    template = TEMPLATES[args.prompt_type]
    modalities = [MODALITIES[args.modality]] if args.modality else None if args.data else RADIOLOGY
    sampling = SamplingParams(args.temperature) if args.do_sample else GREEDY
    title = "MedVLM-R1 evaluation"
    return evaluate_questions("medvlm_r1_eval", title, load_policy, template, args, modalities, sampling, args.seed)


if __name__ == "__main__":
    run_command(main)
