"""Each of the six but train.py shows on nano what it is, in a few lines and seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOWN = {
    "model": ["layer 7: z has norm", "logits (1, 16, 4096)"],
    "lora": ["with B = 0 nothing has changed: True", "merged, logits differ by at most"],
    "molex": ["with alpha = 1 it is the LoRA model: True", "slot 7: votes"],
    "eval": ["output: ", "BLEU", "CIDEr"],
    "data": ["prompt  'name : The Broken Oar", "of them real, rest padding"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_a_file_demonstrates_itself(tmp_path, name):
    command = [sys.executable, ROOT / f"{name}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in SHOWN[name])
    assert len(done.stdout.splitlines()) <= 30


def test_the_loras_demonstration_learns(tmp_path):
    command = [sys.executable, ROOT / "lora.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith("step")]
    losses = [float(x.partition("loss ")[2].partition(",")[0]) for x in lines]
    assert losses[-1] < losses[0] / 2 and "a Thai restaurant by the river" in lines[-1]
