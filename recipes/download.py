"""Published models and data sets, fetched over HTTPS: resumed where they stopped, checked by size and hash.

    python -m recipes.download                                                   # the names of the five systems' models and data
    python -m recipes.download --model med-r1 --output checkpoints/Med-R1        # or --model OWNER/NAME, any other of the Hub
    python -m recipes.download --model med-r1 --include VQA_CT/ --output Med-R1  # one of its 13 models
    python -m recipes.download --dataset prs-med --output data                   # then recipes.prs_med_prepare

Started again it goes on where it stopped, within a file too; what is there already is kept. Nothing is fetched unless all of it
fits on the disk. The last line is JSON: path, files, size (of all, in bytes), fetched, kept (files), bytes (received).

Models and data sets come from the Hugging Face Hub, or from HF_ENDPOINT. `--token`, or HF_TOKEN, opens what is private or gated,
and is neither printed nor stored; the published script logs in with it, which writes it to the disk. The data set prs-med is a
public bucket: `prs-med-dataset` (six sets) and `our-dataset` (two), each with images, masks and annotations. The published setup of
that needs root rights and installs the AWS command line; this needs neither.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import refuse, setting
from engine.download.bucket import Bucket
from engine.download.hub import Repository
from engine.errors import InputError
from engine.files import cache_folder

BUCKETS = {"prs-med": Bucket("https://prs-med-experiments.s3.us-east-1.amazonaws.com", "data/")}
# name: (repository of the Hub, the systems that use it, its size where it is published)
MODELS = {
    "qwen2.5-vl-3b": ("Qwen/Qwen2.5-VL-3B-Instruct", "Med-R1", ""),
    "qwen2-vl-2b": ("Qwen/Qwen2-VL-2B-Instruct", "MedVLM-R1, Skin", ""),
    "qwen2-vl-7b": ("Qwen/Qwen2-VL-7B-Instruct", "Med-R1", ""),
    "med-r1": ("yuxianglai117/Med-R1", "Med-R1", "13 models"),
    "medvlm-r1": ("JZPeterPan/MedVLM-R1", "MedVLM-R1", ""),
    "llava-med": ("microsoft/llava-med-v1.5-mistral-7b", "PRS-Med", "15.1 GB"),
    "llava-med-hf": ("chaoyinshe/llava-med-v1.5-mistral-7b-hf", "PRS-Med", ""),
    "prs-med": ("huyquoctrinh/PRS-Med", "PRS-Med", ""),
    "clip-vit-l-336": ("openai/clip-vit-large-patch14-336", "PRS-Med, Uni-MedVLM", ""),
}
DATASETS = {
    "omnimedvqa": ("foreverbeliever/OmniMedVQA", "Med-R1", "88,996 questions"),
    "huatuo-eval": ("FreedomIntelligence/Medical_Multimodal_Evaluation_Data", "MedVLM-R1", ""),
    "pubmedvision": ("FreedomIntelligence/PubMedVision", "MedVLM-R1", ""),
    "ham10000-bbox": ("abaryan/ham10000_bbox", "Skin", ""),
    "prs-med": (BUCKETS["prs-med"].url, "PRS-Med", ""),
    "prs-med-hub": ("huyquoctrinh/PRS-Med", "PRS-Med", "116 K questions"),
    "sa-med2d": ("OpenGVLab/SA-Med2D-20M", "Uni-MedVLM", "3,772,180 images"),
}
NAMES = {"model": MODELS, "dataset": DATASETS}


@dataclass
class DownloadArguments:
    """What to fetch, and where to."""

    list: bool = setting(False, "List the names, and fetch nothing; so without flags.", aliases=["-l"])
    model: str | None = setting(None, "A model: one of the names, or OWNER/NAME on the Hub.", aliases=["-m"], metavar="NAME")
    dataset: str | None = setting(None, "A data set: one of the names, or OWNER/NAME on the Hub.", metavar="NAME")
    output: str | None = setting(
        None, "Where to. None: a folder in the cache.", aliases=["-o", "--local_dir", "--local-dir"], metavar="DIR"
    )
    include: str = setting("", "Only files whose path begins so, or on the Hub is like it: *.json.", metavar="PREFIX")
    token: str | None = setting(None, "Token of the Hub, for what is private or gated. None: HF_TOKEN.", aliases=["-t"])
    max_workers: int = setting(4, "Files fetched at the same time.", at_least=1, at_most=64)
    resume: bool = setting(True, "Go on within a file that an earlier call left unfinished.")
    url: str | None = setting(None, "Another address of the bucket, e.g. a mirror.", metavar="URL")
    repo_type: str = setting("model", "What a name without --model or --dataset is of.", choices=["model", "dataset"])
    local_dir_use_symlinks: bool = setting(False, "Must stay false: files are written where they are to be.")


def main(argv: list[str]) -> dict:
    first = argv[:1] if argv and not argv[0].startswith("-") else []  # a name, as `hf download NAME` has it
    (args,) = parse_arguments(DownloadArguments, argv[len(first) :], recipe="download", description=__doc__)
    log = logging.getLogger(__name__)
    if args.list or not argv:
        return listed(log)
    places = [("model", args.model), ("dataset", args.dataset), (args.repo_type, "".join(first))]
    named = [(kind, name) for kind, name in places if name]
    refuse(
        [
            (bool(named), "expected --model NAME or --dataset NAME (--list shows the names)"),
            (len(named) <= 1, "--model and --dataset: expected one of them, once"),
            (not args.local_dir_use_symlinks, "--local_dir_use_symlinks is not supported: files are written where they are to be"),
        ]
    )
    ((kind, name),) = named
    source = source_of(kind, name, args.url, args.token)
    files = source.files(args.include)
    if not files:
        raise InputError(f"{source.shown}: no file begins with {source.prefix + args.include!r}")
    output = Path(args.output) if args.output else cache_folder() / name.replace("/", "--")
    size = sum(file.size for file in files)
    log.info("%s: %d files, %.2f GB, into %s", name, len(files), size / 1e9, output)
    try:
        counts = source.fetch(files, output, workers=args.max_workers, resume=args.resume)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    return {"path": str(output), "files": len(files), "size": size, **counts}


def source_of(kind: str, name: str, url: str | None, token: str | None) -> Bucket | Repository:
    """Where the files come from; InputError for a name that is neither listed nor OWNER/NAME."""
    known = name.lower()
    if kind == "dataset" and known in BUCKETS:
        return BUCKETS[known] if url is None else Bucket(url, BUCKETS[known].prefix)
    refuse([(url is None, f"--url: is for {', '.join(BUCKETS)} (expected HF_ENDPOINT for another Hub)")])
    repository = NAMES[kind][known][0] if known in NAMES[kind] else name
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise InputError(f"--{kind} {name}: expected OWNER/NAME on the Hub, or one of {', '.join(NAMES[kind])}")
    return Repository(kind, repository, token)


def listed(log: logging.Logger) -> dict:
    """The names, on standard error as a table."""
    for kind, names in NAMES.items():
        log.info("--%s", kind)
        for name, (repository, systems, size) in names.items():
            log.info("  %-15s %-56s %-20s %s", name, repository, systems, size)
    keys = ("repository", "systems", "size")
    return {f"{kind}s": {name: dict(zip(keys, row, strict=True)) for name, row in names.items()} for kind, names in NAMES.items()}


if __name__ == "__main__":
    run_command(main)
