"""Predictions do not depend on how they were computed; a comparison sees what rounding is not."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from kn_zoo import data, set_inference_statistics
from kn_zoo.checkpoints.predictions import LOGIT_TOLERANCE, NEAR_TIE, Predictions, compare
from kn_zoo.evaluation import predict as evaluate

GREY = dict(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,), crop_pct=1.0)


def digits(count: int = 60) -> data.Digits:
    images = data.Digits(train=False)
    images.data, images.targets = images.data[:count], images.targets[:count]
    return images


def network() -> nn.Module:
    """An untrained network whose logits are as large as a trained one's."""
    torch.manual_seed(0)
    model: Any = timm.create_model(
        "knpreactresnet20_cifar", num_classes=10, in_chans=1, pretrained_cfg_overlay=GREY
    )
    with torch.no_grad():
        model.get_classifier().weight.mul_(30)
    return model


class Table(nn.Module):
    """A "network" whose logits are given: image i is the number i."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.logits[numbers]


class Numbers(list):
    """The data set to that network."""

    class_names: list[str] = []  # noqa: RUF012
    transform: Callable[[Any], Any] | None = staticmethod(lambda number: number)


def predictions(logits: np.ndarray, targets: np.ndarray | None = None) -> Predictions:
    """Of full logits (N, classes), as `predict` would give them."""
    if targets is None:
        targets = np.zeros(len(logits), int)
    images = Numbers(zip(range(len(logits)), targets.tolist(), strict=True))
    return evaluate.predict(Table(torch.tensor(logits)), images, batch_size=3)


@pytest.mark.parametrize("statistics", ["expected", "plain"])
def test_the_batch_size_has_no_influence(statistics: str) -> None:
    model, images = network(), digits()
    set_inference_statistics(model, statistics)
    one, *others = (evaluate.predict(model, images, batch_size=b) for b in (1, 7, 256))
    assert one.logits.std() > 1
    for other in others:
        assert len(compare(other, one).mismatches) == 0
        assert (other.targets == images.targets).all()
        # The bound must have room for other hardware.
        assert abs(np.sort(other.logits) - np.sort(one.logits)).max() < LOGIT_TOLERANCE / 10


def test_sampled_statistics_repeat_with_their_seed() -> None:
    model, images = network(), digits()
    set_inference_statistics(model, "sampled")
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(evaluate.predict(model, images))
    assert (draws[0].logits == draws[1].logits).all()
    assert len(compare(draws[2], draws[0]).mismatches) > 0


def test_the_accuracy_is_that_of_torchmetrics() -> None:
    random = np.random.RandomState(0)
    logits = random.standard_normal((200, 12)).astype(np.float32)
    targets = random.randint(0, 12, 200)
    actual = predictions(logits, targets)
    for k, percent in ((1, actual.top1), (5, actual.top5)):
        expected = multiclass_accuracy(
            torch.tensor(logits), torch.tensor(targets), 12, average="micro", top_k=k
        )
        assert percent == pytest.approx(100 * float(expected))
    assert 0 < actual.top1 < actual.top5 < 100


def test_rows_are_ordered_and_equal_logits_go_by_class() -> None:
    actual = predictions(np.array([[1, 3, 3, 2, 3, 0, 1]], np.float32))
    assert actual.indices.tolist() == [[1, 2, 4, 3, 0]]
    assert actual.logits.tolist() == [[3, 3, 3, 2, 1]]
    assert (actual.indices.dtype, actual.logits.dtype) == (np.int16, np.float32)
    assert actual.targets.dtype == np.int16


def test_fewer_than_five_classes() -> None:
    actual = predictions(np.array([[1, 3], [2, 0]], np.float32))
    assert actual.indices.tolist() == [[1, 0], [0, 1]]
    assert actual.top5 == 100


def test_the_model_and_torch_are_left_as_they_were() -> None:
    model, images = network().train(), digits(5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.set_float32_matmul_precision("high")
    try:
        evaluate.predict(model, images)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert model.training and images.transform is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate.predict(network(), digits(0))


def test_images_become_what_the_model_was_made_for() -> None:
    model = network()
    transform = evaluate.eval_transform(model)
    image, _ = digits()[3]
    exact = torch.tensor(np.array(image), dtype=torch.float32)[None] / 255
    assert torch.equal(transform(image), exact)
    assert torch.equal(transform(image.convert("RGB")), exact)
    larger = transform(Image.new("RGBA", (40, 30)))
    assert larger.shape == (1, 8, 8)


def test_large_images_go_through_the_transform_of_timm() -> None:
    model = timm.create_model("knresnet8_cifar", pretrained_cfg_overlay=dict(crop_pct=0.875))
    noise = np.random.RandomState(0).randint(0, 256, (50, 70, 3), np.uint8)
    expected = create_transform(**resolve_model_data_config(model))(Image.fromarray(noise))
    assert torch.equal(evaluate.eval_transform(model)(Image.fromarray(noise)), expected)


seeds = st.integers(0, 2**31 - 1)


def two_evaluations(seed: int, classes: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits (20, classes), many of them close, and the same moved by up to the tolerance."""
    random = np.random.RandomState(seed)
    logits = random.standard_normal((20, classes)) * spread
    return logits, logits + random.uniform(-0.999, 0.999, logits.shape) * LOGIT_TOLERANCE


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 9), st.sampled_from([1e-4, 1e-3, 1e-2, 1.0]))
def test_rounding_is_never_a_mismatch(seed: int, classes: int, spread: float) -> None:
    before, after = two_evaluations(seed, classes, spread)
    actual, stored = predictions(after), predictions(before)
    comparison = compare(actual, stored)
    assert comparison.mismatches.tolist() == []
    moved = (actual.indices != stored.indices).any(axis=1)
    assert comparison.reordered.tolist() == np.flatnonzero(moved).tolist()
    flipped = actual.indices[:, 0] != stored.indices[:, 0]
    assert set(np.flatnonzero(flipped)) <= set(comparison.near_ties.tolist())


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 9), st.integers(0, 19), st.floats(1.01, 1e4))
def test_more_than_rounding_is_a_mismatch(
    seed: int, classes: int, image: int, factor: float
) -> None:
    """The logit of a listed class moves by more than the tolerance."""
    before, after = two_evaluations(seed, classes, 0.3)
    order = np.argsort(-before[image])
    after[image, order[0]] = before[image, order[0]] + factor * LOGIT_TOLERANCE
    assert compare(predictions(after), predictions(before)).mismatches.tolist() == [image]
    if classes <= 5:  # all are listed, the last one too
        after = before.copy()
        after[image, order[-1]] -= factor * LOGIT_TOLERANCE
        assert compare(predictions(after), predictions(before)).mismatches.tolist() == [image]


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 19), st.integers(0, 8), st.booleans())
def test_a_class_that_rises_or_sinks_is_a_mismatch(
    seed: int, image: int, place: int, rises: bool
) -> None:
    """A class comes from anywhere to the top, or goes from the five to the bottom."""
    before, after = two_evaluations(seed, 9, 0.3)
    cls = np.argsort(-before[image])[place if rises else place % 5]
    edge = before[image].max() if rises else before[image].min()
    after[image, cls] = edge + (1 if rises else -1) * 2 * NEAR_TIE
    fifth, sixth = np.sort(before[image])[::-1][4:6]
    if rises or fifth - sixth > 2 * NEAR_TIE:
        assert compare(predictions(after), predictions(before)).mismatches.tolist() == [image]


def test_stored_logits_out_of_order_are_a_mismatch() -> None:
    """The first class of a row is what a reader takes for the prediction."""
    logits, _ = two_evaluations(0, 9, 0.3)
    stored = predictions(logits)
    indices, values = stored.indices.copy(), stored.logits.copy()
    indices[3], values[3] = indices[3, ::-1], values[3, ::-1]
    edited = dataclasses.replace(stored, indices=indices, logits=values)
    assert compare(stored, edited).mismatches.tolist() == [3]


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 19), st.integers(0, 4), st.integers(0, 8))
def test_another_class_is_a_mismatch(seed: int, image: int, place: int, other: int) -> None:
    """As when somebody edits predictions.npz: the classes change, the logits do not."""
    logits, _ = two_evaluations(seed, 9, 0.3)
    stored = predictions(logits)
    gaps = np.diff(np.sort(logits[image]))
    indices = stored.indices.copy()
    row = indices[image].tolist()
    if other == row[place] or gaps.min() <= NEAR_TIE:
        return
    if other in row:
        indices[image, row.index(other)] = row[place]
    indices[image, place] = other
    edited = dataclasses.replace(stored, indices=indices)
    assert compare(predictions(logits), edited).mismatches.tolist() == [image]


def test_other_targets_and_numbers_that_are_none_are_mismatches() -> None:
    logits, _ = two_evaluations(0, 9, 0.3)
    stored = predictions(logits)
    targets = stored.targets.copy()
    targets[4] = 1
    assert compare(stored, dataclasses.replace(stored, targets=targets)).mismatches.tolist() == [4]
    for bad, swap in itertools.product((np.nan, np.inf), (False, True)):
        logits = stored.logits.copy()
        logits[7, 0] = bad
        broken = dataclasses.replace(stored, logits=logits)
        recomputed, before = (stored, broken) if swap else (broken, stored)
        assert compare(recomputed, before).mismatches.tolist() == [7]


def test_other_shapes_cannot_be_compared() -> None:
    logits, _ = two_evaluations(0, 9, 0.3)
    with pytest.raises(ValueError, match=r"shape \(19, 5\), stored predictions \(20, 5\)"):
        compare(predictions(logits[:19]), predictions(logits))
