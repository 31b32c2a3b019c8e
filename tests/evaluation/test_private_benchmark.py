"""Measuring private training steps: what is run, and how it is written down."""

from pathlib import Path

import pytest
import torch

from kn_zoo import KNConv2d
from kn_zoo.evaluation import benchmark_command, private_benchmark, results
from kn_zoo.evaluation.private_benchmark import CASES, Case, Measured

pytest.importorskip("opacus")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.label} {case.mode}")
def test_a_step_of_every_case_changes_the_parameters(case: Case) -> None:
    step = private_benchmark.Step(case, 2)
    network = step.network
    before = [p.detach().clone() for p in network.parameters()]
    step()
    assert all(not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    layers = [m for m in network.modules() if isinstance(m, KNConv2d)]
    assert bool(layers) == (case.norm == "kernel_norm")
    assert all((layer.dropout_p > 0) == case.dropout for layer in layers)


def some_rows() -> list[Measured]:
    return [
        Measured(case, [10.0 * (i + 1), 12.0 * (i + 1)], 100.0 + i) for i, case in enumerate(CASES)
    ]


def test_the_csv_gives_the_measurements_back() -> None:
    text = private_benchmark.to_csv(some_rows(), {"device": "a machine: fast, 2 cores"})
    assert private_benchmark.from_csv(text) == some_rows()


def test_ratios_are_of_one_round() -> None:
    rows = some_rows()
    rows[0] = Measured(CASES[0], [20.0, 48.0], 100.0)  # group_norm: 20 and 24
    assert private_benchmark.ratio(rows, CASES[0], CASES[1]) == 1.5
    assert "| kernel norm | hooks | 34 | 1.50 | 100 |" in private_benchmark.table(rows)


def test_goals_are_judged_by_the_measurements() -> None:
    rows = {row.case: row for row in some_rows()}  # each slower than the one before it
    text = private_benchmark.goals(list(rows.values()))
    assert "GroupNorm's <= 1.20 | met: 0.50 |" in text
    assert "of hooks >= 3 | not met: 1.14 |" in text
    assert "ghost / hooks <= 1 | not met: 1.02 |" in text


def test_the_command_measures_in_processes_that_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = (Case("kernel_norm", "hooks"), Case("group_norm", "hooks"))
    monkeypatch.setattr(private_benchmark, "CASES", cases)
    measure = private_benchmark.measure
    monkeypatch.setattr(private_benchmark, "measure", lambda: measure(rounds=2, batch_size=2))
    output = tmp_path / "private.csv"
    assert benchmark_command.measure_private(output) == 0
    rows = private_benchmark.from_csv(output.read_text(encoding="utf-8"))
    assert [row.case for row in rows] == list(cases)
    assert all(len(row.samples_ms) == 2 and min(row.samples_ms) > 0 for row in rows)
    assert "Opacus" in results.as_mapping(results.comments(output))["versions"]
    assert "| GroupNorm | hooks |" in capsys.readouterr().out
