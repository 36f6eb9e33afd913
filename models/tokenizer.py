"""Tokenizers from a checkpoint folder, tried out at once: one without its vocabulary still loads, and makes nothing of any text."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from models.checkpoint import CheckpointError, check_file, read_json, reading

PROBE = "Where is the lesion? A) left, B) right."
WHOLE, PIECES, PAIR = "tokenizer.json", "tokenizer.model", ("vocab.json", "merges.txt")
DESCRIPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BYTES = 256  # tokens of a byte-level vocabulary that no merge has made; special tokens come on top


def load_tokenizer(folder: Path, config: PreTrainedConfig | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, which gives tokens for a text and the text back. No code of the folder is run.

    `options` are `from_pretrained`'s. Raises CheckpointError that names the file.
    """
    source = _vocabulary_file(folder)
    for name in DESCRIPTIONS:
        if (folder / name).exists():
            read_json(folder / name)
    with reading(source):
        if source.name == PIECES:
            tokenizer: Any = LlamaTokenizer.from_pretrained(folder, **options)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False, **options)
        ids = tokenizer.encode(PROBE, add_special_tokens=False)
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    if text != PROBE or not 0 < len(ids) < len(PROBE):
        raise CheckpointError(f"{source}: not a whole vocabulary: {PROBE!r} becomes {len(ids)} tokens and then {text[:60]!r}")
    return tokenizer


def _vocabulary_file(folder: Path) -> Path:
    """The file that the vocabulary is read from, looked at."""
    if (folder / WHOLE).exists():
        read_json(folder / WHOLE)
        return folder / WHOLE
    if (folder / PIECES).exists():
        if importlib.util.find_spec("sentencepiece") is None:
            raise CheckpointError(f"{folder / PIECES}: reading it needs sentencepiece (pip install sentencepiece protobuf)")
        return check_file(folder / PIECES)
    if not any((folder / name).exists() for name in PAIR):
        raise CheckpointError(f"{folder}: no tokenizer (expected {WHOLE}, {PIECES}, or {' and '.join(PAIR)})")
    vocabulary, merges = folder / PAIR[0], check_file(folder / PAIR[1])
    lines = len(merges.read_text(encoding="utf-8", errors="replace").splitlines())
    if lines < len(read_json(vocabulary)) - 2 * BYTES:
        raise CheckpointError(f"{merges}: {lines} lines are too few for the vocabulary of {PAIR[0]}: is it cut short?")
    return vocabulary


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    folder: Path,
    *,
    special: Mapping[str, int | None] | None = None,
    start: bool = False,
) -> None:
    """Raise CheckpointError where a tokenizer and the `rows` of a model's embedding do not belong together.

    `special`: the ids that tokens must have, by the tokens; `start`: a start token is needed as well as an end token.
    """
    tokens = len(tokenizer)
    if tokens > rows or 2 * tokens < rows:
        raise CheckpointError(f"{folder}: its tokenizer has {tokens} tokens, its model {rows}: they do not belong together")
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise CheckpointError(f"{folder}: its tokenizer's largest id is {max(vocabulary.values())}, its model has {rows} tokens")
    for token, expected in (special or {}).items():
        ids = tokenizer.encode(token, add_special_tokens=False)
        if ids != [expected]:
            raise CheckpointError(f"{folder}: its tokenizer makes {ids[:4]} of {token}, where config.json has {expected}")
    for name, needed in (("eos_token", True), ("bos_token", start)):
        if needed and getattr(tokenizer, f"{name}_id") is None:
            raise CheckpointError(f"{folder}: its tokenizer has no {name}")
