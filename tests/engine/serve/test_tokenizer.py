"""The C++ tokenizer gives Hugging Face's tokens for any text, and its text for any tokens.

VESALIUS_FUZZ=1000000 pytest tests/engine/serve/test_tokenizer.py -k fuzz     as many texts, half of them for each tokenizer
"""

import json
import os
import random
import subprocess

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from models.loading import STARTER_POLICY
from tests.engine.serve.texts import WORDS, text

NUM_TEXTS, AT_ONCE = int(os.environ.get("VESALIUS_FUZZ", 50_000)), 25_000
QWEN_SPECIAL = [f"<|{name}|>" for name in "endoftext im_start im_end vision_start vision_end image_pad video_pad".split()]


@pytest.fixture(scope="module")
def tokenizer(binaries):
    return binaries / "vesalius-tokenize"


def tokenize(tokenizer, file, given) -> list[tuple[list[int], str]]:
    """(tokens, what they give back) of each text, or of each list of tokens."""
    lines = "\n".join(map(json.dumps, given))
    done = subprocess.run([tokenizer, file], input=lines, capture_output=True, encoding="utf-8", check=True)
    answers = done.stdout.split("\n")[:-1]  # not splitlines: other characters end a line to it
    assert len(answers) == len(given)
    return [tuple(json.loads(answer)) for answer in answers]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """tokenizer.json of the starter policy; with Qwen2's pattern, special and added tokens; and with GPT-2's pattern."""
    folder = tmp_path_factory.mktemp("files")
    rng = random.Random(7)
    corpus = [" ".join(rng.choices(WORDS, k=30)) + text(rng) for _ in range(2000)]
    files = {"starter": STARTER_POLICY / "tokenizer.json"}
    for name in ("qwen2", "gpt2"):
        trained = Tokenizer(models.BPE())
        by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=name == "gpt2", use_regex=name == "gpt2")
        if name == "qwen2":
            trained.normalizer = normalizers.NFC()
            by_bytes = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"), by_bytes])
        trained.pre_tokenizer, trained.decoder = by_bytes, decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False))
        trained.add_special_tokens([AddedToken(token, normalized=False) for token in QWEN_SPECIAL])
        trained.add_tokens([AddedToken(token, normalized=False) for token in ("<tool_call>", "</tool_call>")])
        if name == "gpt2":
            trained.add_tokens([AddedToken("<|im_start|>x", normalized=True), AddedToken("lesion", normalized=True)])
        files[name] = folder / f"{name}.json"
        trained.save(str(files[name]))
    return files


@pytest.mark.parametrize("name, seed, share", [("starter", 1, 0.4), ("qwen2", 2, 0.5), ("gpt2", 3, 0.1)])
def test_fuzzed_texts_have_hugging_faces_tokens(tokenizer, files, name, seed, share):
    theirs, rng = Tokenizer.from_file(str(files[name])), random.Random(seed)
    theirs.no_padding()
    left = round(NUM_TEXTS * share)
    while left > 0:
        texts = [text(rng) for _ in range(min(left, AT_ONCE))]
        expected = [encoding.ids for encoding in theirs.encode_batch(texts)]
        back = theirs.decode_batch(expected)
        for given, ids, decoded, answer in zip(texts, expected, back, tokenize(tokenizer, files[name], texts), strict=True):
            assert answer == (ids, decoded), repr(given)
        left -= AT_ONCE


@pytest.mark.parametrize("name", ["starter", "qwen2"])
def test_any_tokens_give_hugging_faces_text(tokenizer, files, name):
    theirs, rng = Tokenizer.from_file(str(files[name])), random.Random(3)
    size = theirs.get_vocab_size()
    lists = [[rng.randrange(size) for _ in range(rng.randint(0, 20))] for _ in range(2000)]
    lists += [[rng.randrange(256) for _ in range(rng.randint(1, 8))] for _ in range(2000)]  # single bytes: seldom whole characters
    answers = tokenize(tokenizer, files[name], lists)
    for ids, answer in zip(lists, answers, strict=True):
        assert answer[1] == theirs.decode(ids), ids


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda file: file["model"].update(type="Unigram"), "model is Unigram (expected BPE)"),
        (lambda file: file["normalizer"].update(type="NFKC"), "normalizer is NFKC (expected NFC or none)"),
        (lambda file: file.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer Whitespace is not supported"),
        (lambda file: file.update(pre_tokenizer=None), "pre_tokenizer: no ByteLevel"),
        (lambda file: file["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a"), "pattern '(a'"),
        (lambda file: file["model"]["merges"].append(["q", "zz"]), "merge 'q zz' is of tokens that the vocabulary lacks"),
        (lambda file: file["added_tokens"][0].update(lstrip=True), "lstrip is not supported"),
        (lambda file: file.update(decoder=None), "decoder: expected ByteLevel"),
        (lambda file: file.pop("model"), "not a tokenizer"),
    ],
)
def test_a_tokenizer_it_cannot_be_is_refused_in_one_line(tokenizer, files, tmp_path, change, complaint):
    content = json.loads(files["starter"].read_text(encoding="utf-8"))
    change(content)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    done = subprocess.run([tokenizer, file], input="", capture_output=True, text=True)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1 and str(file) in done.stderr
