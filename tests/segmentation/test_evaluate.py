"""Scores equal torchmetrics'; stored label maps are told from others."""

from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from kn_zoo.checkpoints.label_maps import LabelMaps, Scores, confusion_matrix
from kn_zoo.checkpoints.predictions import NEAR_TIE
from kn_zoo.segmentation.evaluate import Segmented, collect_label_maps, compare, miou_bound

CLASSES, VOID = 5, 255


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), present=st.integers(1, CLASSES), void=st.floats(0, 0.9))
def test_scores_equal_torchmetrics(seed: int, present: int, void: float) -> None:
    """Void pixels, classes that do not occur, and images in two batches."""
    random = np.random.RandomState(seed)
    labels = random.randint(0, present, (4, 6, 7)).astype(np.uint8)
    labels[random.random_sample(labels.shape) < void] = VOID
    if (labels == VOID).all():
        labels[0, 0, 0] = 0
    predicted = random.randint(0, present, (4, 6, 7)).astype(np.uint8)
    halves = [confusion_matrix(predicted[i], labels[i], CLASSES) for i in (slice(2), slice(2, 4))]
    scores = Scores(halves[0] + halves[1])

    options = dict(num_classes=CLASSES, ignore_index=VOID)
    tensors = torch.from_numpy(predicted.astype(int)), torch.from_numpy(labels.astype(int))
    jaccard = MulticlassJaccardIndex(**options, average="macro")
    for i in (slice(2), slice(2, 4)):
        jaccard.update(*(tensor[i] for tensor in tensors))
    assert scores.miou == pytest.approx(100 * jaccard.compute().item(), rel=1e-5)
    per_class = 100 * MulticlassJaccardIndex(**options, average="none")(*tensors).numpy()
    occurs = ~np.isnan(scores.iou)
    assert scores.iou[occurs] == pytest.approx(per_class[occurs], rel=1e-5)
    accuracy = MulticlassAccuracy(**options, average="micro")(*tensors)
    assert scores.pixel_accuracy == pytest.approx(100 * accuracy.item(), rel=1e-5)


def test_scores_counted_by_hand() -> None:
    labels = np.array([[0, 0, 1], [1, 1, VOID]], np.uint8)
    predicted = np.array([[0, 1, 1], [1, 2, 4]], np.uint8)
    scores = Scores(confusion_matrix(predicted, labels, CLASSES))
    # class 0: 1 of 2; class 1: 2 of 4; class 2: predicted only; classes 3 and 4 do not occur, the
    # 4 being on void
    assert scores.iou[:3].tolist() == [50.0, 50.0, 0.0] and np.isnan(scores.iou[3:]).all()
    assert scores.miou == pytest.approx(100 / 3)
    assert scores.pixel_accuracy == pytest.approx(60.0)
    assert scores.class_accuracy == pytest.approx((50 + 200 / 3) / 2)
    assert np.isnan(Scores(np.zeros((3, 3), int)).miou)


def results(seed: int = 0, images: int = 3) -> list[Segmented]:
    random = np.random.RandomState(seed)
    scores = 3 * random.standard_normal((images, CLASSES, 6, 7)).astype(np.float32)
    labels = random.randint(0, CLASSES, (images, 6, 7)).astype(np.uint8)
    labels[:, 0, :3] = VOID
    return [Segmented(torch.from_numpy(s), t) for s, t in zip(scores, labels, strict=True)]


def stored(segmented: list[Segmented]) -> LabelMaps:
    """As they come back from a bundle."""
    return LabelMaps.read(BytesIO(collect_label_maps(iter(segmented), CLASSES).to_bytes()))


def leading(result: Segmented, gap: float, y: int = 2, x: int = 3) -> Segmented:
    """The same scores, but at one pixel class 1 leads class 0 by `gap`."""
    scores = result.scores.clone()
    scores[:, y, x] = -10.0
    scores[0, y, x], scores[1, y, x] = 0.0, gap
    return Segmented(scores, result.labels)


def test_the_same_maps_match() -> None:
    segmented = results()
    comparison = compare(iter(segmented), stored(segmented))
    assert comparison.matches and comparison.reordered == 0 and comparison.miou_difference == 0
    assert comparison.images == 3 and comparison.miou_bound == 0


def test_a_flip_at_a_near_tie_passes_and_is_counted() -> None:
    segmented = results()
    before = [leading(segmented[0], NEAR_TIE / 4), *segmented[1:]]
    after = [leading(segmented[0], -NEAR_TIE / 4), *segmented[1:]]
    comparison = compare(iter(after), stored(before))
    assert comparison.matches and comparison.reordered == 1 and comparison.near_ties >= 1
    assert 0 < comparison.miou_difference <= comparison.miou_bound < 100


def test_one_pixel_beyond_a_near_tie_fails() -> None:
    segmented = results()
    before = [segmented[0], leading(segmented[1], 2 * NEAR_TIE), segmented[2]]
    after = [segmented[0], leading(segmented[1], -2 * NEAR_TIE), segmented[2]]
    comparison = compare(iter(after), stored(before))
    assert comparison.mismatches == (1,) and not comparison.matches


def test_permuted_images_fail() -> None:
    segmented = results()
    comparison = compare(iter([segmented[1], segmented[0], segmented[2]]), stored(segmented))
    assert comparison.mismatches == (0, 1)


def test_shifted_labels_fail() -> None:
    segmented = results()
    shifted = [Segmented(r.scores, np.roll(r.labels, 1, axis=1)) for r in segmented]
    assert compare(iter(shifted), stored(segmented)).mismatches == (0, 1, 2)


def test_wrong_stored_numbers_fail() -> None:
    segmented, maps = results(), stored(results())
    confusion = maps.confusion.copy()
    confusion[2, 0, 0] += 1
    assert compare(iter(segmented), replace(maps, confusion=confusion)).mismatches == (2,)
    beyond = maps.maps.copy()
    beyond[0, 1, 1] = CLASSES
    assert compare(iter(segmented), replace(maps, maps=beyond)).mismatches == (0,)
    assert compare(iter(segmented[:2]), maps).mismatches == (2,)
    assert compare(iter([*segmented, segmented[0]]), maps).mismatches == (3,)
    nan = Segmented(torch.full_like(segmented[0].scores, torch.nan), segmented[0].labels)
    assert compare(iter([nan, *segmented[1:]]), maps).mismatches == (0,)


def test_files_that_are_no_label_maps_are_refused() -> None:
    file = BytesIO()
    np.savez(file, indices=np.zeros(3))
    file.seek(0)
    with pytest.raises(ValueError, match="label_maps"):
        LabelMaps.read(file)
    sizes = [*results(), Segmented(torch.zeros(CLASSES, 2, 2), np.zeros((2, 2), np.uint8))]
    with pytest.raises(ValueError, match="one size"):
        collect_label_maps(iter(sizes), CLASSES)
    with pytest.raises(ValueError, match="one size"):
        collect_label_maps(iter([]), CLASSES)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31), flips=st.integers(0, 30))
def test_flipped_pixels_bound_the_miou(seed: int, flips: int) -> None:
    random = np.random.RandomState(seed)
    labels = random.randint(0, CLASSES, 400).astype(np.uint8)
    labels[:20] = VOID
    before = np.where(
        random.random_sample(400) < 0.6, labels % CLASSES, random.randint(0, CLASSES, 400)
    )
    after = before.copy()
    places = random.permutation(400)[:flips]
    after[places] = random.randint(0, CLASSES, flips)
    changed = before != after
    touched = sum(np.bincount(m[changed], minlength=CLASSES) for m in (before, after))
    old, new = (Scores(confusion_matrix(m, labels, CLASSES)) for m in (before, after))
    assert abs(new.miou - old.miou) <= miou_bound(old, touched) + 1e-9


def test_a_class_that_appears_may_change_the_miou_by_any_amount() -> None:
    scores = Scores(np.diag([5, 5, 0]))
    assert miou_bound(scores, np.array([1, 0, 1])) == 100.0
    assert miou_bound(scores, np.array([1, 1, 0])) == pytest.approx(20.0)


def test_results_are_read_once() -> None:
    def once() -> Iterator[Segmented]:
        yield from results()

    assert len(collect_label_maps(once(), CLASSES).maps) == 3
