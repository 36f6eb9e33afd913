"""Published data sets, fetched over HTTPS: resumed where they stopped, checked by size and MD5.

    python -m recipes.download --dataset prs-med --output data
    python -m recipes.prs_med_prepare --data_root data/prs-med-dataset

prs-med is the public bucket of the PRS-Med experiments: `prs-med-dataset` (six sets) and `our-dataset` (two), each with images,
masks and annotations. `--include our-dataset/annotations/` fetches a part. Started again it goes on where it stopped; what is there
already is kept. The last line is JSON: files, fetched, kept, bytes (received), output.

The published setup needs root rights and installs the AWS command line; this needs neither.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from engine.bucket import Bucket
from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.settings import setting
from engine.errors import InputError
from engine.files import cache_folder

DATASETS = {"prs-med": Bucket("https://prs-med-experiments.s3.us-east-1.amazonaws.com", "data/")}


@dataclass
class DownloadArguments:
    """What to fetch, and where to."""

    dataset: str = setting("prs-med", "The published data set.", choices=list(DATASETS))
    output: str | None = setting(None, "Where to. None: a folder of that name in the cache.", metavar="DIR")
    include: str = setting("", "Only files whose name begins so.", metavar="PREFIX")
    url: str | None = setting(None, "Another address of the same bucket, e.g. a mirror.", metavar="URL")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(DownloadArguments, argv, recipe="download", description=__doc__)
    bucket = DATASETS[args.dataset]
    if args.url is not None:
        bucket = Bucket(args.url, bucket.prefix)
    output = Path(args.output) if args.output else cache_folder() / args.dataset
    files = bucket.files(args.include)
    if not files:
        raise InputError(f"{bucket.shown}: no file begins with {bucket.prefix + args.include!r}")
    log = logging.getLogger(__name__)
    log.info("%s: %d files, %.2f GB, into %s", args.dataset, len(files), sum(file.size for file in files) / 1e9, output)
    try:
        counts = bucket.fetch(files, output)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from None
    return {"files": len(files), **counts, "output": str(output)}


if __name__ == "__main__":
    run_command(main)
