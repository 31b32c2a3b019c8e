"""The benchmark compares like with like, survives what fails, and reports what it measured."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
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
    benchmark_figures,
    goals,
    measurements,
    report,
    variants,
)
from kn_zoo.evaluation import benchmark_command as command
from kn_zoo.evaluation.benchmark import Job, Runner
from kn_zoo.evaluation.measurements import MODES, Results, Row, Setting, Workload
from kn_zoo.evaluation.results import cost_sentence

ROOT = Path(__file__).parents[2]


NETWORKS = ["knresnet8_cifar", "knpreactresnet20_cifar", "knresnet18_cifar", "knresnet50_cifar"]


def setting(model: str = "layer:3:16", task: str = "train", **changes: Any) -> Setting:
    channels = int(model.rpartition(":")[2]) if ":" in model else 3
    workload = Workload(model, channels, changes.pop("pixels", 8), changes.pop("batch_size", 2))
    return Setting(workload, "cpu", task, "float32", "eager")._replace(**changes)


def job(*arguments: Any, **changes: Any) -> Job:
    all_variants = setting(*arguments, **changes)
    return Job(all_variants, tuple(all_variants.variants))


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
    conv = variants.bare_conv(layer, bias)
    if bias:
        parameters = dict(conv.named_parameters())
        added = next(value for name, value in parameters.items() if name.endswith("bias"))
        added.data.zero_()
    padded = F.pad(x, layer.padding_sides)
    expected = F.conv2d(padded, layer.weight, None, layer.stride, 0, layer.dilation, layer.groups)
    torch.testing.assert_close(conv(x), expected)
    assert sum(p.numel() for p in conv.parameters()) == sum(p.numel() for p in layer.parameters())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2100))
def test_groups_are_32_or_the_largest_number_below_that_divides(channels: int) -> None:
    _, norm = variants.group_norm(KNConv2d(1, channels, 1)).children()
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == max(n for n in range(1, 33) if channels % n == 0)


def count_relu(network: nn.Module) -> int:
    return sum(isinstance(module, nn.ReLU) for module in network.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_every_variant_is_the_same_network_but_for_its_layers(name: str) -> None:
    kernel_norm = variants.build(name, "kernel_norm")
    channels = variants.input_size(name)[0]
    layers = [m for m in kernel_norm.modules() if isinstance(m, KNConv2d)]
    norms_of = {"conv_only": None, "batch_norm": nn.BatchNorm2d, "group_norm": nn.GroupNorm}
    for variant, norm in norms_of.items():
        network = variants.build(name, variant)
        modules = list(network.modules())
        assert not any(isinstance(m, KNConv2d | KernelNorm2d) for m in modules)
        convs = [m for m in modules if isinstance(m, nn.Conv2d)]
        assert [c.weight.shape for c in convs] == [layer.weight.shape for layer in layers]
        assert all((c.bias is None) == (norm is not None) for c in convs)
        norms = [m for m in modules if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        assert len(norms) == (len(convs) if norm else 0)
        assert all(isinstance(m, norm) for m in norms if norm)
        assert count_relu(network) == count_relu(kernel_norm) + sum(layer.relu for layer in layers)
        assert network.eval()(torch.rand(1, channels, 32, 32)).shape == (1, network.num_classes)


@pytest.mark.parametrize("variant", ["unfold", "frozen"])
def test_unfold_and_the_frozen_network_compute_what_kernel_norm_does(variant: str) -> None:
    x = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    network = variants.build("knresnet8_cifar", "kernel_norm").eval()
    set_inference_statistics(network, "expected")
    torch.manual_seed(0)
    other = variants.build("knresnet8_cifar", variant).eval()
    torch.testing.assert_close(other(x), network(x), atol=1e-4, rtol=1e-4)


def test_the_gaussian_network_is_kernel_norm_with_another_dropout() -> None:
    network = variants.build("knresnet8_cifar", "gaussian")
    kernel_norm = variants.build("knresnet8_cifar", "kernel_norm")
    assert {m.dropout for m in network.modules() if isinstance(m, KNConv2d)} == {"gaussian"}
    assert [*map(type, network.modules())] == [*map(type, kernel_norm.modules())]


def test_the_ordinary_resnet_is_the_network_without_kernel_normalization() -> None:
    assert type(variants.build("knresnet18", "resnet")) is timm.models.ResNet
    with pytest.raises(LookupError, match="resnet8_cifar"):
        variants.build("knresnet8_cifar", "resnet")
    assert "resnet" not in setting("knpreactresnet20_cifar").variants, "it is that of batch_norm"


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_bytes_held_for_backward_are_counted_exactly(mode: str) -> None:
    """A bare convolution keeps its input, BatchNorm its own too, and four numbers a channel."""
    at = setting(mode=mode)
    x = 2 * 16 * 8 * 8 * 4
    assert Runner(at, "conv_only").held_for_backward() == x
    if mode == "eager":
        assert Runner(at, "batch_norm").held_for_backward() == 2 * x + 4 * 16 * 4


def test_training_holds_hardly_more_than_with_batch_norm() -> None:
    """The goals on memory, which do not depend on the machine."""
    at = setting("knresnet18_cifar", pixels=32)
    kernel_norm, batch_norm, unfold = (
        Runner(at, variant).held_for_backward()
        for variant in ("kernel_norm", "batch_norm", "unfold")
    )
    assert kernel_norm <= 0.8 * batch_norm, "the numerator before a ReLU is not kept"
    assert kernel_norm <= 0.55 * unfold


@pytest.fixture
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 0.001)


@pytest.mark.usefixtures("short_samples")
@pytest.mark.parametrize("task", ["infer", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_variants_take_turns(task: str, dtype: str) -> None:
    measured = job(task=task, dtype=dtype)
    rows = benchmark.measure(measured, 60.0)
    assert [row.variant for row in rows] == measured.setting.variants
    for row in rows:
        assert not row.reason
        assert len(row.samples_ms) == len(rows[0].samples_ms) >= benchmark.ROUNDS[0]
        assert row.baseline_ms == rows[0].samples_ms
        assert min(row.samples_ms) > 0
        assert (row.memory_mib is None) == (task == "infer")


@pytest.mark.usefixtures("short_samples")
def test_a_failure_is_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: KNConv2d) -> nn.Module:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nstack")

    monkeypatch.setitem(variants.REPLACEMENTS, "group_norm", broken)
    rows = {row.variant: row for row in benchmark.measure(job(), 60.0)}
    assert "can't allocate memory" in rows["group_norm"].reason
    assert "\n" not in rows["group_norm"].reason
    assert not rows["group_norm"].samples_ms
    assert rows["unfold"].samples_ms


def test_a_killed_process_is_a_row_too_and_another_one_starts() -> None:
    worker = benchmark.Worker()

    def kill() -> None:
        while not worker.pid:
            time.sleep(0.05)
        os.kill(worker.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    try:
        rows = worker.measure(job("knresnet50_cifar", pixels=32), 300.0, 150.0)
        assert all("killed" in row.reason for row in rows)
        late = worker.measure(job(), 0.2, 0.1)  # not long enough to start a process
        assert all(row.reason == benchmark.OUT_OF_TIME for row in late)
    finally:
        worker.kill()


def some_results(batch_size: int = 64, **changes: Any) -> Results:
    """One network whose variants take these milliseconds in inference and training, eager."""
    times: dict[str, list[float]] = {
        "conv_only": [100.0, 200.0, 100.0],
        "kernel_norm": [120.0, 240.0, 130.0],
        "frozen": [105.0] * 3,
        "gaussian": [110.0] * 3,
        "batch_norm": [150.0] * 3,
        "group_norm": [150.0, 250.0, 150.0],
        "resnet": [60.0, 120.0, 60.0],
        "unfold": [600.0, 1000.0, 600.0],
        **changes,
    }
    memory = {"kernel_norm": 104.0, "batch_norm": 100.0, "unfold": 200.0}
    rows = []
    for task in ("infer", "train"):
        at = setting("knresnet18_cifar", task, pixels=32, batch_size=batch_size)
        for variant in at.variants:
            row = Row(at, variant, times[variant], times["conv_only"])
            row.memory_mib = memory.get(variant) if task == "train" else None
            rows.append(row)
    rows[-1].reason = "failed: X: | , \" '"
    return Results({"device": "a machine: fast, 2 cores", "versions": "torch 1"}, rows)


def key(results: Results, task: str = "train") -> Setting:
    return results.setting(results.networks[0], task, "float32", "eager")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_layers_are_near_what_float64_says(dtype: torch.dtype, bound: float) -> None:
    for kernel in command.CHECKED["eager"]:
        assert max(benchmark_check.layer_errors(kernel, dtype, "cpu", "eager")) < bound


def test_a_layer_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = KNConv2d.forward
    monkeypatch.setattr(KNConv2d, "forward", lambda layer, x: 1.01 * forward(layer, x))
    actual = benchmark_check.layer_errors(3, torch.float32, "cpu", "eager")
    assert all(error == pytest.approx(0.01, rel=0.1) for error in actual)


def test_ratios_are_of_one_round() -> None:
    results = some_results()
    assert results.ratio(key(results), "kernel_norm") == (1.2, 1.2, 1.3)
    assert results.overhead(key(results), "kernel_norm") == (30.0, 20.0, 40.0)
    assert results.images_per_s(key(results), "conv_only") == 640.0


@pytest.mark.parametrize(
    ("changes", "goal", "met"),
    [
        ({}, "inference, eager", True),
        ({"kernel_norm": [126.0, 252.0, 126.0]}, "inference, eager", False),
        ({"conv_only": []}, "inference, eager", None),
        ({}, "inference, compiled or frozen", True),
        ({"frozen": [111.0, 222.0, 111.0]}, "inference, compiled or frozen", False),
        ({}, "training, eager", True),
        ({"kernel_norm": [191.0, 382.0, 191.0]}, "training, eager", False),
        ({}, "training, compiled", None),
        ({}, "training speed / unfold", True),
        ({"unfold": [450.0, 900.0, 450.0]}, "training speed / unfold", False),
        ({}, "training memory / BatchNorm", True),
        ({}, "training memory / unfold", True),
        ({}, "time / GroupNorm", True),
        ({"group_norm": [119.0, 238.0, 119.0]}, "time / GroupNorm", False),
        ({"batch_size": 2}, "training, eager: time / GroupNorm", True),
        ({"batch_size": 2, "kernel_norm": [230.0, 400.0, 230.0]}, "training, eager: time", False),
        ({"batch_size": 2, "gaussian": [240.0] * 3}, "training, eager, Gaussian", False),
        ({"batch_size": 2}, "training, compiled: time / GroupNorm", None),
    ],
)
def test_goals_are_judged_by_what_was_measured(
    changes: dict[str, Any], goal: str, met: bool | None
) -> None:
    results = some_results(**changes)
    verdicts = goals.verdicts(results, results.networks[0], "float32")
    verdict = next(verdict for verdict in verdicts if verdict.goal.startswith(goal))
    assert verdict.met is met, verdict
    if met is None:
        assert verdict.text == "not measured"


def sweep(overheads: list[float]) -> Results:
    rows = []
    for kernel, milliseconds in zip((1, 3, 7), overheads, strict=True):
        at, conv = setting(f"layer:{kernel}:64", "train"), 10.0 * kernel
        rows += [Row(at, "conv_only", [conv], [conv])]
        rows += [Row(at, "kernel_norm", [conv + milliseconds], [conv])]
    return Results({}, rows)


def test_the_sweep_tells_whether_the_overhead_grows_with_the_kernel() -> None:
    assert goals.sweep_verdict(sweep([2.0, 2.3, 2.1])).met is True
    assert goals.sweep_verdict(sweep([2.0, 2.1, 2.3])).met is False
    layers = [layer for layer, _ in sweep([1.0] * 3).swept("kernel")]
    assert layers == [(1, 64), (3, 64), (7, 64)]


def test_a_format_without_measurements_has_a_reason_and_no_tables() -> None:
    measured = some_results()
    unmeasured = job("knresnet8_cifar", dtype="bfloat16")
    rows = benchmark.unmeasured(unmeasured, benchmark.OUT_OF_TIME)
    results = Results({}, [*measured.rows, *rows])
    assert results.dtypes == ["float32"]
    assert f"{benchmark.OUT_OF_TIME}: {unmeasured.setting} (all)" in report.missing(results)
    rows[0].samples_ms.append(1.0)
    assert Results({}, [*measured.rows, *rows]).dtypes == ["float32", "bfloat16"]


def stored(results: Results, path: Path) -> Path:
    path.write_text(results.to_csv())
    return path


def test_the_csv_gives_the_results_back(tmp_path: Path) -> None:
    results = some_results()
    reread = measurements.read(stored(results, tmp_path / "benchmark_cpu.csv"))
    assert (reread.header, reread.rows) == (results.header, results.rows)
    assert reread.to_csv() == results.to_csv()


def test_cells_of_a_later_run_keep_their_own_baseline() -> None:
    """That run found the machine twice as slow: its ratios say what they say, and so do others."""
    results = some_results(group_norm=[])
    rows = [
        Row(key(results), "conv_only", [200.0, 400.0], [200.0, 400.0]),
        Row(key(results), "group_norm", [240.0, 440.0], [200.0, 400.0]),
        Row(key(results), "unfold", reason=benchmark.OUT_OF_TIME),
    ]
    updated = results.updated(rows, ["group_norm", "unfold"])
    assert updated.ratio(key(results), "group_norm") == pytest.approx((1.15, 1.1, 1.2))
    group_norm = updated.ratio(key(results), "kernel_norm", "group_norm")
    assert group_norm == pytest.approx(((1.2 / 1.2 + 1.2 / 1.1) / 2, 1.0, 1.2 / 1.1))
    for variant in ("conv_only", "kernel_norm", "unfold"):
        assert updated.time(key(results), variant) == results.time(key(results), variant)
    renewed = results.updated(rows, ["conv_only", "group_norm"])
    assert renewed.time(key(results), "conv_only") == (300.0, 200.0, 400.0)
    assert renewed.ratio(key(results), "kernel_norm") == (1.2, 1.2, 1.3)


def test_the_sentence_on_cost_is_what_the_rows_say() -> None:
    """What normalization adds, and what a KNResNet-18 costs: other rows, another sentence."""
    changed = some_results(kernel_norm=[150.0, 300.0, 150.0], resnet=[50.0, 120.0, 50.0])
    for rows, added, longer in ((some_results(), "1.20", "2.00"), (changed, "1.50", "3.00")):
        sentence = cost_sentence(rows)
        assert f"takes {added} to {added} times the time of the same network" in sentence
        flops = "a KNResNet-18 has 2.0 times the FLOPs of an ordinary ResNet-18 and takes"
        assert sentence.endswith(f"{flops} {longer} to {longer} times as long.")
    for variant in ("resnet", "conv_only", "kernel_norm"):
        unmeasured: dict[str, Any] = {variant: []}
        with pytest.raises(LookupError, match="lacks a variant"):
            cost_sentence(some_results(**unmeasured))


def test_render_replaces_what_is_between_the_markers_alone(tmp_path: Path) -> None:
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    stored(some_results(), tmp_path / "results" / "benchmark_cpu.csv")
    page = tmp_path / "docs" / "performance.md"
    page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    (tmp_path / "README.md").write_text("no markers\n")
    lines = report.render(tmp_path)
    assert any(line.startswith("README.md: no") and "left as it is" in line for line in lines)
    assert (tmp_path / "README.md").read_text() == "no markers\n"
    first = page.read_text()
    assert first.startswith(f"before\n{report.BEGIN}\n")
    assert first.endswith(f"{report.END}\nafter\n")
    assert "stale" not in first
    assert "a machine: fast" in first
    assert "GPU: not measured" in first
    shown = [tmp_path / "docs" / name for name in re.findall(r"!\[\w+\]\((.*?)\)", first)]
    assert len(shown) == 2 and all(figure.exists() for figure in shown)
    report.render(tmp_path)
    assert page.read_text() == first
    stored(some_results(), tmp_path / "results" / "benchmark_cpu_other.csv")
    report.render(tmp_path)
    images = re.findall(r"!\[\w+\]\((.*?)\)", page.read_text())
    assert len(images) == len(set(images)) == 4, "each machine shows its own figures"


def test_only_what_was_measured_is_plotted(tmp_path: Path) -> None:
    results = some_results(group_norm=[])
    figure = benchmark_figures.times(results, "float32")
    assert figure is not None
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["inference, eager", "training step, eager"]
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {measurements.VARIANTS[row.variant] for row in results.rows} - {
        "conv only",
        "GroupNorm",
    }
    assert benchmark_figures.times(some_results(conv_only=[]), "float32") is None


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
        ["knresnet18", "--private"],
        ["--private", "--minutes", "1"],
        ["knresnet18", "--variant", "nosuch"],
        ["knresnet18", "--dtype", "int8"],
        ["knresnet18", "--update", "--output", "missing.csv"],
        ["knpreactresnet20_cifar", "--variant", "resnet", "--output", "new.csv"],
        ["knresnet18", "--dtype", "bfloat16"],  # would replace the stored results
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert cli.run(command.app, [*arguments, *device]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.count("\n") == 1


def test_results_of_another_machine_are_not_updated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stored(some_results(), tmp_path / "other.csv")
    before = path.read_bytes()
    arguments = ["knresnet8_cifar", "--device", "cpu", "--update", "--output", str(path)]
    assert cli.run(command.app, arguments) == 2
    assert "was measured with a machine: fast" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_the_cells_of_a_selection(tmp_path: Path) -> None:
    workload = Workload("knpreactresnet20_cifar", 3, 32, 2)
    norms = ("kernel_norm", "batch_norm", "group_norm")
    planned = list(command.plan([workload], "cpu", ("float32",), MODES, ("train",), norms))
    assert [(job.setting.task, job.setting.mode) for job in planned] == [
        ("train", "eager"),
        ("train", "compiled"),
    ]
    assert all(job.variants == ("conv_only", *norms) for job in planned)


def bench(path: Path, *arguments: str) -> str:
    """Run the command as a process; return what it prints."""
    script = [sys.executable, str(ROOT / "eval" / "benchmark.py"), "--device", "cpu"]
    script += [*arguments, "--batch-size", "1", "--output", str(path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_ends_in_time_and_every_cell_has_a_number_or_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "quick.csv"
    printed = bench(path, "knresnet8_cifar", "layers", "--quick", "--minutes", "0.3")
    results = measurements.read(path)
    for name in ("date", "device", "versions", "load", "memory"):
        assert results.header[name]
    assert "gradients" in results.header["error, float32, eager"]
    assert "error, bfloat16, eager: inference" in report.details(path)
    assert [workload.model for workload in results.networks] == ["knresnet8_cifar"]
    assert len(results.layers) == len(command.SWEEP)
    assert all(bool(row.samples_ms) != bool(row.reason) for row in results.rows)
    assert "GroupNorm" in printed

    # a chosen cell is measured again and merged, the others stay
    bench(path, "knresnet8_cifar", "--quick", "--task", "infer", "--mode", "eager",
          "--variant", "group_norm", "--minutes", "4", "--update")  # fmt: skip
    updated = measurements.read(path)
    assert updated.header.pop("updated")
    assert updated.header == results.header
    changed = {
        (row.setting, row.variant)
        for row in updated.rows
        if row != results.by_cell[row.setting, row.variant]
    }
    setting = updated.setting(updated.networks[0], "infer", "float32", "eager")
    assert (setting, "group_norm") in changed
    kept = {cell for cell, row in results.by_cell.items() if row.samples_ms}
    assert changed & kept <= {(setting, "group_norm")}
