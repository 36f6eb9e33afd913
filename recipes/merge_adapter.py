"""An adapter merged into its base model: one ordinary Hugging Face folder, for vLLM, transformers, or training all weights.

    python -m recipes.merge_adapter --model runs/medr1_sft/20261122-171455/checkpoint-100 --output_dir MERGED

The adapter is a checkpoint of a run with --use_peft, or any LoRA adapter of a Qwen2-VL or Qwen2.5-VL in PEFT's format. Its base is
--base_model_name_or_path, or else what adapter_config.json names, as it stands there or as a folder beside the adapter's. Weights
are merged in float32 and written in the base's own type: in float32 the merged model answers as base and adapter do, in bfloat16
within its rounding. MERGED must not exist, and is written whole or not at all. The last line is JSON: adapter, base, dtype, output.
"""

from dataclasses import dataclass
from pathlib import Path

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import REQUIRED, setting
from engine.errors import input_errors


@dataclass
class MergeArguments:
    """What is merged."""

    model: str = setting(REQUIRED, "The adapter: folder or hub name.", metavar="DIR")
    output_dir: str = setting(REQUIRED, "The folder to write; it must not exist.", metavar="DIR")
    base_model_name_or_path: str | None = setting(None, "Its base model. None: what its adapter_config.json names.")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(MergeArguments, argv, recipe="merge_adapter", description=__doc__)

    # Imported once the flags are known to be good, since this takes seconds.
    from models.loading import write_merged

    with input_errors("merge_adapter"):
        return write_merged(args.model, Path(args.output_dir), args.base_model_name_or_path)


if __name__ == "__main__":
    run_command(main)
