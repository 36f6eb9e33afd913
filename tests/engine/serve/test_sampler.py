"""The C++ sampler takes the tokens of kernels/sample.py's reference: at any temperature and nucleus, ties included."""

import json
import subprocess

import numpy as np
import pytest
import torch

from kernels.sample import sample_reference


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.1, 0.0])
def test_a_drawn_token_is_the_references(binaries, top_p):
    rng = np.random.default_rng(round(10 * top_p))
    asked = []
    for number in range(300):
        logits = rng.normal(scale=3, size=rng.integers(1, 60)).astype(np.float32)
        if number % 3 == 0:
            logits = np.round(logits)  # of equal ones at the nucleus' edge those of the higher ids stay
        asked.append((logits.tolist(), float(rng.choice([0.3, 1.0, 2.5])), top_p, float(rng.random())))
    lines = "\n".join(map(json.dumps, asked))
    done = subprocess.run([binaries / "sampler_probe"], input=lines, capture_output=True, text=True, check=True)
    expected = []
    for logits, temperature, p, uniform in asked:
        row, drawn = torch.tensor([logits], dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64)
        expected.append(int(sample_reference(row, drawn, temperature=temperature, top_p=p)[0]))
    assert list(map(int, done.stdout.split())) == expected
