"""The recipes still produce the stored first losses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kn_zoo import data
from kn_zoo.training.recipe import Recipe
from tests.training import fingerprint

STORED, RECIPES = fingerprint.read(), fingerprint.all_recipes()
# One recipe of each file that takes seconds on a CPU.
SMALL = [
    "knpreactresnet20_cifar.digits",
    "knpreactresnet20_cifar.cifar100",
    "knpreactresnet20_cifar.cifar100_b32",
    "knresnet8_cifar.cifar100_b256",
]


def compute(recipe: Recipe) -> fingerprint.Rows:
    try:
        return fingerprint.first_losses(recipe)
    except data.MissingData as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", SMALL)
def test_first_losses_are_unchanged(name: str) -> None:
    found, stored = compute(RECIPES[name]), STORED[name]
    for key, tolerance in (("lr", 1e-5), ("loss", 2e-2)):
        a, b = ([row[key] for row in rows] for rows in (found, stored))
        assert np.allclose(a, b, rtol=tolerance), (
            f"{key} {a} is not {b}: if intended, run python -m tests.training.fingerprint {name}"
        )
    # Rounding differs between processors, and grows with every update.
    assert found[0]["loss"] == pytest.approx(stored[0]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"label_smoothing": 0.1},
        {"augmentation": []},
        {"model_args": {"dropout_p": 0.1}},
        {"erasing": {"p": 1.0}},
        {"mixup": {"mixup_alpha": 0.2}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_recipe_changes_the_losses(change: dict[str, Any]) -> None:
    name = "knpreactresnet20_cifar.digits"
    changed = compute(replace(RECIPES[name], **change))
    differences = [
        abs(a["loss"] / b["loss"] - 1) for a, b in zip(changed, STORED[name], strict=True)
    ]
    assert differences[0] > 1e-3 or max(differences) > 2e-2


def test_every_recipe_has_a_curve_and_every_curve_a_recipe() -> None:
    assert STORED.keys() == RECIPES.keys()
    for name, rows in STORED.items():
        assert [row["update"] for row in rows] == [1, 2, 3, 4], name
        assert np.isfinite([row["loss"] for row in rows]).all(), name
