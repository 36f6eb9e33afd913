"""What GRPO does once: the processor runs once a group, and an image is decoded once a run."""

import numpy as np
import pytest

from engine.data.images import decode_pixels
from engine.data.loaders import decoded
from engine.data.questions import load_questions
from engine.files import write_json
from models.qwen.processor import QwenProcessor
from tests.engine.training.grpo_run import make_trainer
from tests.tiny_qwen import noise_image, save_tiny


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_prompt_is_encoded_once_a_group_and_an_image_decoded_once_a_run(tmp_path, monkeypatch, iterations):
    """Two epochs of four rows about four images; four answers each, a reference, and passes over the same answers."""
    monkeypatch.setenv(decoded.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("VESALIUS_CACHE", str(tmp_path / "checked"))
    encode, encoded, opened, answered = QwenProcessor.encode, [], [], []
    monkeypatch.setattr(QwenProcessor, "encode", lambda self, *args: encoded.append(1) or encode(self, *args))
    monkeypatch.setattr(decoded, "decode_pixels", lambda data, name: opened.append(name) or decode_pixels(data, name))
    for i in range(4):
        noise_image(i).save(tmp_path / f"{i}.png")
    rows = [{"image": f"{i}.png", "problem": f"What is {i}? A) CT, B) MRI", "solution": "A"} for i in range(4)]
    rows = load_questions(write_json(tmp_path / "q.json", rows))

    def counted(prompts, completions, **columns):
        answered.append(len(completions))
        return [float(np.sin(len(str(answer)))) for answer in completions]

    settings = {"num_generations": 4, "beta": 0.1, "num_iterations": iterations, "max_steps": 2 * iterations}
    trainer = make_trainer(save_tiny(tmp_path / "model"), tmp_path / "run", reward_funcs=[counted], rows=rows, **settings)
    encoded.clear()  # a checkpoint is tried when it is loaded
    trainer.train()
    assert sum(answered) == 2 * 4 * 4 and len(encoded) == sum(answered) // 4
    assert len(opened) == len(set(opened)) == 4
