"""What README.md says is what the manifest says, and its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

from kn_zoo.evaluation import results  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if ".pth" not in code]


def test_generated_parts_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT / "docs/render.py", "--check"])
    assert done.returncode == 0, "run `make docs`"


def test_runs_are_averaged_by_norm_and_batch_size():
    runs = [("kernel", 2, 30.0), ("batch", 2, 10.0), ("kernel", 256, 20.0), ("batch", 256, 20.5)]
    rows = [
        {"norm": norm, "batch_size": str(size), "top1": str(top1 + seed), "seed": str(seed)}
        | {"epochs": "8", "lr": str(size / 1000)}
        for seed in (0, 1)
        for norm, size, top1 in runs
    ]
    machine = dict.fromkeys(["cpu", "cores", "torch", "timm", "python", "kn_zoo"], "x")
    text = "\n".join(results.small_batch_section(rows, machine))
    assert "| 2 | 30.5 (0.7) | 10.5 (0.7) | 0.002 / 0.002 |" in text
    assert "| 256 | 20.5 (0.7) | 21.0 (0.7) | 0.256 / 0.256 |" in text
    assert "seeds 0 and 1" in text and "kernel +10.0, BatchNorm -10.5" in text
    assert "kernel at 2, BatchNorm at 256" in text
    assert len(results.small_batch(rows).axes[0].lines) == 2 * (1 + 2)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split("\n")[0])
def test_examples_run(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 3
    assert [link for link in links if not (ROOT / link).exists()] == []
