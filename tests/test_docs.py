"""Generated parts of the documentation are up to date, and its examples run."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kn_zoo.checkpoints import manifest
from kn_zoo.checkpoints.manifest import Accuracy, Checkpoint, Privacy, Run
from kn_zoo.evaluation import measurements, result_figures, results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README} | {
    f"docs/{path.name}": path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")
}
# the code of a page, in one piece, because later blocks use names of earlier ones
EXAMPLES = {
    page: blocks
    for page, text in PAGES.items()
    if (blocks := re.findall(r"```python\n(.*?)```", text, re.S))
}
NEEDS_NETWORK = re.compile(r'"knresnet\d+", pretrained=True|\.pth')
RECIPE = {
    "model_args": {"depths": [1, 1, 1]},
    "dataset": "cifar100",
    "train_split": "train",
    "preprocessing": {"input_size": [3, 16, 16]},
}
RATES = [{"epochs": "2", "images": "5000"}]  # of the search
MACHINE = dict.fromkeys(["cpu", "cores", "torch", "timm", "python", "kn_zoo"], "x")


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/render.py", "--check"])
    assert done.returncode == 0, "run `make docs`"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if page == "docs/deployment.md":
        pytest.importorskip("onnxruntime")
        monkeypatch.chdir(tmp_path)  # it writes files
    else:
        monkeypatch.chdir(ROOT)
    code = "\n".join(block for block in EXAMPLES[page] if not NEEDS_NETWORK.search(block))
    exec(compile(code, page, "exec"), {})


def test_readme_shows_the_output_of_its_first_example(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code, shown = re.findall(r"```python\n(.*?)```\s*```\n(.*?)```", README, re.S)[0]
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_files_that_are_named_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)[)#]", README)
    named = [
        path
        for text in PAGES.values()
        for path in re.findall(r"\b(?:train_scripts|eval|tests|docs)/[\w/.-]+\.\w+", text)
    ]
    assert len(links) >= 10 and len(named) >= 20
    assert [path for path in [*links, *named] if not (ROOT / path).exists()] == []


def test_every_recipe_file_is_described() -> None:
    recipes = {path.name for path in (ROOT / "train_scripts" / "recipes").glob("*.yaml")}
    assert {name for name in recipes if name not in PAGES["docs/training.md"]} == set()


def test_runs_are_averaged_by_norm_and_batch_size() -> None:
    runs = [("kernel", 2, 30.0), ("batch", 2, 10.0), ("kernel", 256, 20.0), ("batch", 256, 20.5)]
    rows = [
        {"norm": norm, "batch_size": str(size), "top1": str(top1 + seed), "seed": str(seed)}
        | {"epochs": "8", "lr": str(size / 1000)}
        for seed in (0, 1)
        for norm, size, top1 in runs
    ]
    text = "\n".join(results.small_batch_section(rows, RATES, RECIPE, MACHINE))
    assert "| 2 | 30.5 (0.7) | 10.5 (0.7) |" in text
    assert "| 256 | 20.5 (0.7) | 21.0 (0.7) |" in text
    assert "at 16x16, 8 epochs" in text and "2 epochs for each rate, on 5,000 held-out" in text
    assert "seeds 0 and 1" in text and "128 times as many" in text and "PreActResNet-8" in text
    answer = results.most_accurate([], rows)
    assert "kernel normalization at batch size 2; BatchNorm at batch size 256." in answer
    assert "top-1 changes by +10.0 (kernel normalization) and -10.5 (BatchNorm) points." in text
    assert "+20.0 (BatchNorm) at batch size 2; -0.5 (BatchNorm) at batch size 256." in text
    kernel, batch = result_figures.by_batch_size(rows, "top1", "").axes[0].containers
    assert list(kernel.lines[0].get_ydata()) == [30.5, 20.5]
    (bars,) = batch.lines[2]
    assert [float(y1 - y0) for (_, y0), (_, y1) in bars.get_segments()] == pytest.approx(
        [2**0.5] * 2
    )


def test_batchnorm_is_compared_with_its_statistics_re_estimated_too() -> None:
    scores = [("kernel", "30", ""), ("batch", "20", "40"), ("group", "25", "")]
    runs = [
        {"norm": norm, "batch_size": size, "top1": top1, "top1_reestimated": reestimated}
        | {"seed": "0", "epochs": "8"}
        for size in ("2", "8")
        for norm, top1, reestimated in scores
    ]
    rows = results.with_reestimated(runs)
    assert [row for row in rows if row["norm"] != "batch_reestimated"] == runs
    added = [(row["batch_size"], row["top1"]) for row in rows if row not in runs]
    assert added == [("2", "40"), ("8", "40")]
    answer = results.most_accurate([], rows)
    assert "on this page: BatchNorm at batch size 2 and 8." in answer
    section = results.small_batch_section(rows, RATES, RECIPE, MACHINE)
    assert "| 2 | 30.0 | 20.0 | 40.0 | 25.0 |" in "\n".join(section)
    assert results.REESTIMATED in section
    assert results.REESTIMATED not in results.small_batch_section(runs, RATES, RECIPE, MACHINE)
    labels = result_figures.by_batch_size(rows, "top1", "").axes[0].get_legend_handles_labels()[1]
    assert labels == ["kernel normalization", "BatchNorm", "BatchNorm, re-estimated", "GroupNorm"]


def test_the_page_says_where_no_norm_is_needed() -> None:
    runs = [("kernel", "2", "30"), ("none", "2", "31"), ("kernel", "8", "30"), ("none", "8", "29")]
    rows = [
        {"norm": norm, "batch_size": size, "top1": top1, "seed": "0", "epochs": "8"}
        for norm, size, top1 in runs
    ]
    text = "\n".join(results.small_batch_section(rows, RATES, RECIPE, MACHINE))
    assert "At batch size 2, no normalization is the most accurate: 8 layers" in text
    rows[1]["top1"] = "29"
    text = "\n".join(results.small_batch_section(rows, RATES, RECIPE, MACHINE))
    assert "the most accurate" not in text


def test_segmentation_runs_are_compared_within_and_between_batch_sizes() -> None:
    runs = [("kernel", 8, 40.0), ("batch", 8, 45.0), ("kernel", 2, 42.0), ("batch", 2, 30.25)]
    rows = [
        {"norm": norm, "batch_size": str(size), "miou": str(miou), "seed": "0", "epochs": "60"}
        for norm, size, miou in runs
    ]
    text = "\n".join(results.camvid_section(rows, MACHINE))
    assert "| 2 | 42.0 | 30.2 |" in text and "| 8 | 40.0 | 45.0 |" in text
    assert "+2.0 (kernel normalization) and -14.8 (BatchNorm) points" in text
    assert "+11.8 (BatchNorm) at batch size 2; -5.0 (BatchNorm) at batch size 8." in text
    assert result_figures.by_batch_size(rows, "miou", "").axes[0].get_ylabel() == "mean IoU %"


def test_private_checkpoints_are_compared_at_one_epsilon() -> None:
    kernel = manifest.find("knpreactresnet20_cifar.cifar100")
    group = manifest.find("preactresnet20_cifar.cifar100_gn")
    checkpoints = [
        replace(checkpoint, privacy=guarantee(epsilon))
        for checkpoint, epsilon in ((kernel, 3.0), (group, 8.0), (kernel, 8.0))
    ]
    (compared,) = results.comparisons(checkpoints)
    assert compared == [checkpoints[2], checkpoints[1]]
    assert "epsilon 8.00: top-1" in results.difference(compared)
    assert results.private_table(checkpoints).count("| 0.691 |") == 3


def test_means_over_seeds_are_compared() -> None:
    kernel = with_runs(manifest.find("knpreactresnet20_cifar.cifar100"), 60.0, 61.0, 62.0)
    batch = with_runs(manifest.find("preactresnet20_cifar.cifar100_bn"), 60.5)
    text = results.difference([kernel, batch])
    assert "top-1 61.00 %, SD 1.00, 3 runs; 0.50 points above BatchNorm (60.50 %, one run)" in text
    assert results.most_accurate([[kernel, batch]], []).endswith(
        "kernel normalization at batch size 128."
    )


def with_runs(checkpoint: Checkpoint, *top1: float) -> Checkpoint:
    """The checkpoint with the accuracy of these seeds; the first is the stored one."""
    accuracies = [{"expected": Accuracy(top1=value, top5=90.0)} for value in top1]
    return replace(
        checkpoint,
        reported=replace(checkpoint.reported, statistics=accuracies[0]),
        seeds=tuple(range(len(top1))),
        runs=tuple(Run(seed, accuracy) for seed, accuracy in enumerate(accuracies)),
    )


def guarantee(epsilon: float) -> Privacy:
    texts = dict.fromkeys(
        ["accountant", "unit", "sampling", "generator", "released", "public_data"], "text"
    )
    return Privacy(
        epsilon=epsilon,
        delta=1e-5,
        epsilon_rdp=epsilon + 1,
        images=50_000,
        noise_multiplier=0.691,
        sample_rate=0.02,
        steps=700,
        max_grad_norm=1.0,
        normalizer=1000,
        earlier_runs=0,
        **texts,
    )


def test_the_sentence_on_cost_is_that_of_the_table() -> None:
    stored = measurements.read(results.BENCHMARK)
    table = [results.cost_row(stored, setting) for setting in results.measured(stored)]
    numbers = {cell for row in table for cell in row[4:]}
    stated = re.findall(r"\d\.\d\d", results.cost_sentence(stored))
    assert len(stated) == 10 and set(stated) <= numbers
