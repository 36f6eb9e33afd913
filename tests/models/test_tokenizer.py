"""A tokenizer that lost its vocabulary, or belongs to another model, is refused by name before anything is made of it."""

import json
import shutil

import pytest
from sentencepiece import SentencePieceTrainer

from models.checkpoint import CheckpointError
from models.loading import STARTER_POLICY, load_policy
from models.starter.llava import train_tokenizer
from models.tokenizer import PROBE, check_vocabulary, load_tokenizer
from tests.tiny_qwen import save_tiny

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with a tokenizer.model and nothing else."""
    folder = tmp_path_factory.mktemp("pieces")
    text = folder / "text.txt"
    text.write_text("\n".join([PROBE, "Is the lesion on the left or on the right?"] * 20))
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, user_defined_symbols=[],
    )  # fmt: skip
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture
def qwen(tmp_path):
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_tokenizer_model_is_read(pieces):
    tokenizer = load_tokenizer(pieces)
    assert tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False)).strip() == PROBE


@pytest.mark.parametrize("cut", [0, 2, 0.1, 0.5, 0.9, "lfs", "missing"])
def test_a_damaged_tokenizer_model_is_refused_by_name(pieces, tmp_path, cut):
    whole = (pieces / "tokenizer.model").read_bytes()
    if cut != "missing":
        size = int(cut * len(whole)) if isinstance(cut, float) else cut
        (tmp_path / "tokenizer.model").write_bytes(LFS if cut == "lfs" else whole[:size])
    with pytest.raises(CheckpointError, match="expected tokenizer.json" if cut == "missing" else "tokenizer.model: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {}}', LFS])
def test_a_damaged_tokenizer_json_is_refused_by_name(qwen, content):
    (qwen / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer.json: ") as error:
        load_tokenizer(qwen)
    assert "\n" not in str(error.value)


def test_vocabulary_and_merges_belong_together(tmp_path):
    qwen = shutil.copytree(STARTER_POLICY, tmp_path / "model")
    (qwen / "tokenizer.json").unlink()
    merges = (qwen / "merges.txt").read_text()
    load_tokenizer(qwen)
    (qwen / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="merges.txt: no such file"):
        load_tokenizer(qwen)
    (qwen / "merges.txt").write_text(merges)
    vocabulary = json.loads((qwen / "vocab.json").read_text())
    (qwen / "vocab.json").write_text(json.dumps(vocabulary | {f"x{i}": len(vocabulary) + i for i in range(400)}))
    with pytest.raises(CheckpointError, match="merges.txt: .* lines are too few"):
        load_tokenizer(qwen)


def test_tokenizer_and_model_must_belong_together(qwen, tmp_path):
    tokenizer = train_tokenizer(["Where?"])
    check_vocabulary(tokenizer, len(tokenizer), tmp_path, start=True, special={"<image>": 3})
    for rows in (len(tokenizer) - 1, 2 * len(tokenizer) + 1):
        with pytest.raises(CheckpointError, match="do not belong together"):
            check_vocabulary(tokenizer, rows, tmp_path)
    with pytest.raises(CheckpointError, match="makes .3. of <image>, where config.json has 7"):
        check_vocabulary(tokenizer, len(tokenizer), tmp_path, special={"<image>": 7})
    tokenizer.bos_token = None
    with pytest.raises(CheckpointError, match="has no bos_token"):
        check_vocabulary(tokenizer, len(tokenizer), tmp_path, start=True)


def test_another_models_tokenizer_is_refused(qwen, tmp_path):
    shutil.copytree(qwen, tmp_path / "mixed")
    train_tokenizer(["Where?"]).save_pretrained(tmp_path / "mixed")
    with pytest.raises(CheckpointError, match=r"of <\|image_pad\|>, where config.json has"):
        load_policy(str(tmp_path / "mixed"))
