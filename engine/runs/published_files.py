"""Results in the layouts of Med-R1's, MedVLM-R1's and AdvMed-R1's test scripts, for programs that read those: `--output_path`.

Med-R1, MedVLM-R1    {accuracy in percent, results: [{question, ground_truth, model_output, extracted_answer}]}
AdvMed-R1            {test_data_path, attack_type, epsilon, pgd_alpha, pgd_iters, accuracy, num_samples, num_correct,
                     detailed_results: [{model_output, model_answer, ground_truth, gt_answer, correct}]}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.command.evaluation_settings import AttackArguments
from engine.data.options.answers import tagged
from engine.files import plain, write_json
from engine.tasks.evaluation import Evaluation

KEYS = ("question", "ground_truth", "model_output", "extracted_answer")


def write_results(path: str, evaluation: Evaluation) -> None:
    """Write an evaluation as Med-R1's and MedVLM-R1's scripts do."""
    results = [{key: result[key] for key in KEYS} for result in evaluation.results]
    write_json(path, plain({"accuracy": evaluation.summary["accuracy"], "results": results}))


def write_published(path: str, evaluations: Mapping[str, Evaluation], args: AttackArguments) -> None:
    """Write evaluations as AdvMed-R1's script does, which has one attack a file.

    Where there is one attack, or the clean images alone, `path` is its file; of more each has its own, `<path>_<attack>.json`.
    """
    asked = args.attacks or ["clean"]
    for name in asked if len(asked) == 1 else evaluations:
        file = Path(path) if len(asked) == 1 else Path(path).with_name(f"{Path(path).stem}_{name}.json")
        write_json(file, plain(_advmed(name, evaluations[name], args)))


def _advmed(name: str, evaluation: Evaluation, args: AttackArguments) -> dict[str, Any]:
    share: Any = evaluation.measures["accuracy"]
    return {
        "test_data_path": " ".join(args.data or ["starter data"]),
        "attack_type": name,
        "epsilon": args.epsilon if name != "clean" else None,
        "pgd_alpha": args.pgd_alpha if name == "pgd" else None,
        "pgd_iters": args.pgd_iters if name == "pgd" else None,
        "accuracy": 100 * share["accuracy"],
        "num_samples": share["num_samples"],
        "num_correct": share["num_correct"],
        "detailed_results": [
            {
                "model_output": result["model_output"],
                "model_answer": result["extracted_answer"],
                "ground_truth": result["ground_truth"],
                "gt_answer": (tagged(result["ground_truth"]) or result["ground_truth"]).strip(),
                "correct": result["correct"],
            }
            for result in evaluation.results
        ],
    }
