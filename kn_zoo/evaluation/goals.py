"""The benchmark's goals, judged by what was measured."""

from collections.abc import Callable
from typing import NamedTuple

from kn_zoo.evaluation.measurements import (
    BASELINE,
    MODES,
    TASK_MODES,
    TASKS,
    Results,
    Workload,
)

SMALL_BATCH_SIZE = 4  # networks at this batch size or below have goals of their own


class Verdict(NamedTuple):
    """A goal beside what was measured; `met` is None when nothing was."""

    goal: str
    measured: str
    met: bool | None

    @property
    def text(self) -> str:
        if self.met is None:
            return "not measured"
        return f"{'met' if self.met else 'not met'}: {self.measured}"


Test = Callable[[float], bool]


def verdict(
    goal: str, measured: dict[str, float | None], meets: Test, any_suffices: bool = False
) -> Verdict:
    """Judge a goal: all numbers that were measured have to meet it, or any if that suffices."""
    numbers = {name: number for name, number in measured.items() if number is not None}
    text = ", ".join(f"{number:.2f} {name}".strip() for name, number in numbers.items())
    hits = [meets(number) for number in numbers.values()]
    met = any(hits) if any_suffices else all(hits)
    return Verdict(goal, text, met if hits else None)


def at_most(bound: float) -> Test:
    return lambda number: number <= bound


def verdicts(results: Results, workload: Workload, dtype: str) -> list[Verdict]:
    """Judge the goals of a network; times are ratios to conv only unless a goal says otherwise."""

    def ratio(
        task: str, mode: str, variant: str = "kernel_norm", to: str = BASELINE
    ) -> float | None:
        spread = results.ratio(results.setting(workload, task, dtype, mode), variant, to)
        return spread.median if spread else None

    def memory(to: str) -> dict[str, float | None]:
        return {mode: _memory_ratio(results, workload, dtype, mode, to) for mode in MODES}

    if workload.batch_size <= SMALL_BATCH_SIZE:
        return [
            verdict(
                f"training, {mode}{dropout}: time / GroupNorm's <= {bound:.2f}",
                {"": ratio("train", mode, variant, "group_norm")},
                at_most(bound),
            )
            for variant, dropout in (("kernel_norm", ""), ("gaussian", ", Gaussian dropout"))
            for mode, bound in (("eager", 1.5), ("compiled", 1.2))
        ]
    cpu, cuda = (1.10, 1.25, 1.40, 1.90), (1.05, 1.30, 1.15, 1.40)
    deploy, infer, train_compiled, train = cuda if results.cuda else cpu
    deployed = {
        "compiled": ratio("infer", "compiled"),
        "frozen": ratio("infer", "eager", "frozen"),
        "frozen and compiled": ratio("infer", "compiled", "frozen"),
    }
    compiled = {"": ratio("train", "compiled")}
    speedup = {mode: ratio("train", mode, "unfold", "kernel_norm") for mode in MODES}
    to_group_norm = {
        f"{TASKS[task]} {mode}": ratio(task, mode, "kernel_norm", "group_norm")
        for task, mode in TASK_MODES
    }
    return [
        verdict(
            f"inference, compiled or frozen <= {deploy:.2f}",
            deployed,
            at_most(deploy),
            any_suffices=True,
        ),
        verdict(f"inference, eager <= {infer:.2f}", {"": ratio("infer", "eager")}, at_most(infer)),
        verdict(f"training, compiled <= {train_compiled:.2f}", compiled, at_most(train_compiled)),
        verdict(f"training, eager <= {train:.2f}", {"": ratio("train", "eager")}, at_most(train)),
        verdict("training memory / BatchNorm's <= 1.05", memory("batch_norm"), at_most(1.05)),
        verdict("training speed / unfold's >= 4", speedup, lambda times: times >= 4),
        verdict("training memory / unfold's <= 0.55", memory("unfold"), at_most(0.55)),
        verdict("time / GroupNorm's <= 1", to_group_norm, at_most(1.0)),
    ]


def _memory_ratio(
    results: Results, workload: Workload, dtype: str, mode: str, to: str
) -> float | None:
    kernel_norm, other = (
        results.memory(workload, dtype, mode, variant) for variant in ("kernel_norm", to)
    )
    return kernel_norm / other if kernel_norm and other else None


def sweep_verdict(results: Results) -> Verdict:
    """Judge whether the time above the bare convolution grows with the kernel size."""
    layers = results.swept("kernel")
    (first, smallest), (last, largest) = layers[0], layers[-1]
    growth: dict[str, float | None] = {}
    for task, title in TASKS.items():
        small, large = (
            results.overhead(results.sweep_setting(workload, task), "kernel_norm")
            for workload in (smallest, largest)
        )
        if small and large and small.median > 0:
            growth[title] = large.median / small.median
    sizes = f"{last.kernel}x{last.kernel} / {first.kernel}x{first.kernel}"
    return verdict(f"overhead of a layer in ms, {sizes} <= 1.1", growth, at_most(1.1))
