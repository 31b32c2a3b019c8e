"""The benchmark compares like with like, survives what fails, and reports what it measured."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kn_zoo import KernelNorm2d, KNConv2d, cli, set_inference_statistics
from kn_zoo.evaluation import (
    benchmark,
    benchmark_check,
    report,
)
from kn_zoo.evaluation.benchmark import Contender, Row, Setting

ROOT = Path(__file__).parents[2]


NETWORKS = ["knresnet8_cifar", "knpreactresnet20_cifar", "knresnet18_cifar", "knresnet50_cifar"]


def setting(model: str = "layer:3:16", task: str = "train", **changes: Any) -> Setting:
    channels = int(model.rpartition(":")[2]) if ":" in model else 3
    return replace(Setting(model, channels, 8, 2, "cpu", task, "float32", "eager"), **changes)


@st.composite
def layers(draw: st.DrawFn) -> KNConv2d:
    groups = draw(st.sampled_from([1, 2]))
    return KNConv2d(
        2 * groups,
        draw(st.integers(1, 40)) * groups,
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 4)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )


@settings(max_examples=100, deadline=None)
@given(layers())
def test_the_bare_convolution_is_that_of_the_layer(layer: KNConv2d) -> None:
    x = torch.randn(2, layer.in_channels, 9, 7)
    bias = layer.bias is not None
    floor = benchmark.bare(layer, bias)
    if bias:
        parameters = dict(floor.named_parameters())
        added = next(value for name, value in parameters.items() if name.endswith("bias"))
        added.data.zero_()
    padded = F.pad(x, layer.padding_sides)
    expected = F.conv2d(padded, layer.weight, None, layer.stride, 0, layer.dilation, layer.groups)
    torch.testing.assert_close(floor(x), expected)
    assert sum(p.numel() for p in floor.parameters()) == sum(p.numel() for p in layer.parameters())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2100))
def test_groups_are_32_or_the_largest_number_below_that_divides(channels: int) -> None:
    _, norm = benchmark.group_norm(KNConv2d(1, channels, 1)).children()
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == max(n for n in range(1, 33) if channels % n == 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_line_is_the_same_network_but_for_its_layers(name: str) -> None:
    ours = benchmark.build(name, "ours")
    channels = benchmark.input_size(name)[0]
    layers = [m for m in ours.modules() if isinstance(m, KNConv2d)]
    for line, norm in (("floor", None), ("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)):
        network = benchmark.build(name, line)
        modules = list(network.modules())
        assert not any(isinstance(m, KNConv2d | KernelNorm2d) for m in modules)
        convs = [m for m in modules if isinstance(m, nn.Conv2d)]
        assert [c.weight.shape for c in convs] == [layer.weight.shape for layer in layers]
        assert all((c.bias is None) == (norm is not None) for c in convs)
        norms = [m for m in modules if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        assert len(norms) == (len(convs) if norm else 0)
        assert all(isinstance(m, norm) for m in norms if norm)
        acts = [sum(isinstance(m, nn.ReLU) for m in net.modules()) for net in (network, ours)]
        assert acts[0] == acts[1] + sum(layer.relu for layer in layers)
        assert network.eval()(torch.rand(1, channels, 32, 32)).shape == (1, network.num_classes)


@pytest.mark.parametrize("line", ["published", "frozen"])
def test_the_published_and_the_frozen_network_compute_what_ours_does(line: str) -> None:
    x = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    ours = set_inference_statistics(benchmark.build("knresnet8_cifar", "ours").eval(), "expected")
    torch.manual_seed(0)
    other = benchmark.build("knresnet8_cifar", line).eval()
    torch.testing.assert_close(other(x), ours(x), atol=1e-4, rtol=1e-4)


def test_the_namesake_is_the_network_without_kernel_normalization() -> None:
    assert type(benchmark.build("knresnet18", "namesake")) is timm.models.ResNet
    with pytest.raises(LookupError, match="resnet8_cifar"):
        benchmark.build("knresnet8_cifar", "namesake")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_bytes_held_for_backward_are_counted_exactly(mode: str) -> None:
    """A bare convolution keeps its input, BatchNorm its own too, and four numbers a channel."""
    at = setting(mode=mode)
    x = 2 * 16 * 8 * 8 * 4
    assert Contender(at, "floor").held_for_backward() == x
    if mode == "eager":
        assert Contender(at, "batch").held_for_backward() == 2 * x + 4 * 16 * 4


def test_training_holds_hardly_more_than_with_batch_norm() -> None:
    """The goals on memory, which do not depend on the machine."""
    at = setting("knresnet18_cifar", pixels=32)
    held = {line: Contender(at, line).held_for_backward() for line in ("ours", "batch")}
    assert held["ours"] <= 0.8 * held["batch"], "the numerator before a ReLU is not kept"
    assert held["ours"] <= 0.55 * Contender(at, "published").held_for_backward()


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 0.001)


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize("task", ["infer", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lines_take_turns(task: str, dtype: str) -> None:
    at = setting(task=task, dtype=dtype)
    rows = benchmark.measure(at, 60.0)
    assert [row.line for row in rows] == at.lines
    for row in rows:
        assert not row.reason
        assert len(row.samples_ms) == len(rows[0].samples_ms) >= benchmark.ROUNDS[0]
        assert min(row.samples_ms) > 0
        assert (row.memory_mib is None) == (task == "infer")


@pytest.mark.usefixtures("short_samples")
def test_what_fails_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: KNConv2d) -> nn.Module:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nstack")

    monkeypatch.setitem(benchmark.REPLACEMENTS, "group", broken)
    rows = {row.line: row for row in benchmark.measure(setting(), 60.0)}
    assert "can't allocate memory" in rows["group"].reason
    assert "\n" not in rows["group"].reason
    assert not rows["group"].samples_ms
    assert rows["published"].samples_ms


def test_a_process_that_is_killed_is_a_row_too_and_another_one_starts() -> None:
    worker = benchmark.Worker()

    def kill() -> None:
        while not worker.pid:
            time.sleep(0.05)
        os.kill(worker.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    try:
        rows = worker.measure(setting("knresnet50_cifar", pixels=32), 300.0, 150.0)
        assert all("killed" in row.reason for row in rows)
        late = worker.measure(setting(), 0.2, 0.1)  # not long enough to start a process
        assert all(row.reason == benchmark.OUT_OF_TIME for row in late)
    finally:
        worker.kill()


def some_results(**changes: list[float]) -> report.Results:
    """One network whose lines take these milliseconds in inference and training, eager."""
    times: dict[str, list[float]] = {
        **dict(floor=[100.0, 200.0, 100.0], ours=[120.0, 240.0, 130.0], batch=[150.0] * 3),
        **dict(group=[150.0, 250.0, 150.0], published=[600.0, 1000.0, 600.0], frozen=[105.0] * 3),
        **changes,
    }
    rows = []
    for task in ("infer", "train"):
        at = setting("knresnet8_cifar", task, pixels=32)
        for line in at.lines:
            memory = {"ours": 104.0, "batch": 100.0, "published": 200.0}.get(line)
            rows.append(Row(at, line, times.get(line, []), memory if task == "train" else None))
    rows[-1].reason = "failed: X: | , \" '"
    return report.Results({"device": "a machine: fast", "versions": "torch 1"}, rows)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_layers_are_near_what_float64_says(dtype: torch.dtype, bound: float) -> None:
    for kernel in benchmark.CHECKED["eager"]:
        assert max(benchmark_check.layer_errors(kernel, dtype, "cpu", "eager")) < bound


def test_a_layer_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = KNConv2d.forward
    monkeypatch.setattr(KNConv2d, "forward", lambda layer, x: 1.01 * forward(layer, x))
    found = benchmark_check.layer_errors(3, torch.float32, "cpu", "eager")
    assert all(error == pytest.approx(0.01, rel=0.1) for error in found)


def test_ratios_are_of_one_round() -> None:
    results = some_results()
    key = ("knresnet8_cifar", "train", "float32", "eager")
    assert results.ratio(key, "ours") == (1.2, 1.2, 1.3)
    assert results.overhead(key, "ours") == (30.0, 20.0, 40.0)
    assert results.images_per_s(key, "floor") == 20.0


@pytest.mark.parametrize(
    ("changes", "goal", "met"),
    [
        ({}, "inference, eager", True),
        ({"ours": [126.0, 250.0, 126.0]}, "inference, eager", False),
        ({"floor": []}, "inference, eager", None),
        ({}, "inference, compiled or frozen", True),
        ({"frozen": [111.0, 222.0, 111.0]}, "inference, compiled or frozen", False),
        ({}, "training, eager", True),
        ({"ours": [191.0, 382.0, 191.0]}, "training, eager", False),
        ({}, "training, compiled", None),
        ({}, "training speed / published", True),
        ({"published": [450.0, 900.0, 450.0]}, "training speed / published", False),
        ({}, "training memory / BatchNorm", True),
        ({}, "training memory / published", True),
        ({}, "time / GroupNorm", True),
        ({"group": [119.0, 239.0, 119.0]}, "time / GroupNorm", False),
    ],
)
def test_goals_are_judged_by_what_was_measured(
    changes: dict[str, list[float]], goal: str, met: bool | None
) -> None:
    found = report.verdicts(some_results(**changes), "knresnet8_cifar", "float32")
    verdict = next(verdict for verdict in found if verdict.goal.startswith(goal))
    assert verdict.met is met, verdict
    if met is None:
        assert verdict.text == "not measured"


def sweep(ours: list[float]) -> report.Results:
    rows = []
    for kernel, milliseconds in zip((1, 3, 7), ours, strict=True):
        at = setting(f"layer:{kernel}:64", "train")
        rows += [Row(at, "floor", [10.0 * kernel]), Row(at, "ours", [10.0 * kernel + milliseconds])]
    return report.Results({}, rows)


def test_the_sweep_tells_whether_the_overhead_grows_with_the_kernel() -> None:
    assert report.sweep_verdict(sweep([2.0, 2.3, 2.1])).met is True
    assert report.sweep_verdict(sweep([2.0, 2.1, 2.3])).met is False
    assert report.swept(sweep([1.0] * 3), "kernel") == [(1, 64), (3, 64), (7, 64)]


def test_a_format_of_which_nothing_was_measured_has_a_reason_and_no_tables() -> None:
    measured = some_results()
    at = setting("knresnet8_cifar", dtype="bfloat16")
    rows = benchmark.without(at, benchmark.OUT_OF_TIME)
    results = report.Results({}, [*measured.rows, *rows])
    assert results.dtypes == ["float32"]
    assert f"{benchmark.OUT_OF_TIME}: {at} (all)" in report.missing(results)
    rows[0].samples_ms.append(1.0)
    assert report.Results({}, [*measured.rows, *rows]).dtypes == ["float32", "bfloat16"]
    assert report.Results({}, rows[1:]).dtypes == ["bfloat16"], "the goals' own is always shown"


def test_the_csv_gives_the_results_back(tmp_path: Path) -> None:
    results = some_results()
    path = tmp_path / "benchmark_cpu.csv"
    path.write_text(results.to_csv())
    again = report.read(path)
    assert (again.header, again.rows) == (results.header, results.rows)
    assert again.to_csv() == results.to_csv()


def test_render_replaces_what_is_between_the_markers_alone(tmp_path: Path) -> None:
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "results" / "benchmark_cpu.csv").write_text(some_results().to_csv())
    page = tmp_path / "docs" / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    (tmp_path / "README.md").write_text("no markers\n")
    said = report.render(tmp_path)
    assert "left as it is" in said[0]
    assert (tmp_path / "README.md").read_text() == "no markers\n"
    first = page.read_text()
    assert first.startswith(f"before\n{report.BEGIN}\n")
    assert first.endswith(f"{report.END}\nafter\n")
    assert "old" not in first
    assert "a machine: fast" in first
    assert "GPU: not measured" in first
    report.render(tmp_path)
    assert page.read_text() == first


@pytest.mark.parametrize(
    "arguments",
    [
        ["no_such_network"],
        ["resnet18"],
        ["knresnet18", "--device", "abacus"],
        ["knresnet18", "--device", "cuda:99"],
        ["knresnet18", "--output", "/no/such/folder/x.csv"],
        ["knresnet18", "--output", "x.txt"],
        ["knresnet18", "--batch-size", "0"],
        ["--no-such-option"],
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(benchmark.app, arguments) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1


def test_the_command_ends_in_time_and_every_line_has_a_number_or_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "quick.csv"
    command = [sys.executable, str(ROOT / "eval" / "benchmark.py"), "knresnet8_cifar", "--quick"]
    command += ["--batch-size", "1", "--minutes", "0.3", "--output", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = report.read(path)
    for key in ("date", "device", "versions", "load", "memory"):
        assert results.header[key]
    assert "gradients" in results.header["error, float32, eager"]
    assert "error, bfloat16, eager: inference" in report.table(path)
    assert results.networks == ["knresnet8_cifar"]
    assert len(results.layers) == len(benchmark.SWEEP)
    assert all(bool(row.samples_ms) != bool(row.reason) for row in results.rows)
    plots = {plot.name for plot in tmp_path.glob("*.png")}
    assert plots == {"quick_float32.png", "quick_float32_memory.png", "quick_layers.png"}
    assert "GroupNorm" in done.stdout
