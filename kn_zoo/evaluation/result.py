"""Options and outcome of the verification of one checkpoint."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from kn_zoo.checkpoints.predictions import NEAR_TIE


class Skipped(RuntimeError):
    """Part of a checkpoint cannot be verified here; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """Options of an evaluation; `statistics` is "expected", "plain", "sampled" or "all"."""

    data_dir: Path | None = None
    download: bool = False
    device: str = "cpu"
    batch_size: int = 256
    statistics: str = "expected"
    # Errors by data set and split, so that a failed download is not repeated for each checkpoint.
    missing_data: dict[tuple[str, str], Exception] = field(default_factory=dict, repr=False)

    def choose(self, reported: Collection[str]) -> list[str]:
        """Return the inference statistics to evaluate under.

        Raises:
            Skipped: no accuracy was reported under them.
        """
        chosen = list(reported) if self.statistics == "all" else [self.statistics]
        if not set(reported) >= set(chosen):
            raise Skipped(
                f"no accuracy is reported under {self.statistics} statistics: "
                f"use --statistics {' or '.join(reported)}"
            )
        return chosen


@dataclass
class Score:
    """Reported and recomputed accuracy in percent under one kind of inference statistics."""

    statistics: str
    reported: dict[str, float | None]  # "top1", "top5"; or "miou", "pixel_accuracy"
    recomputed: dict[str, float]
    draws: int = 1  # passes over the images, of which `recomputed` is the mean


@dataclass
class Result:
    """Recomputed parts of one checkpoint, and the differences. Images are numbered from 0.

    `status` is "match", "mismatch", "corrupt" (a file is not the manifest's), or "skipped" (the
    accuracy could not be recomputed, and the rest matches).
    """

    name: str
    dataset: str
    split: str
    images: int
    task: str = "classification"
    status: str = "match"
    reasons: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)  # recomputed and compared besides `scores`
    notes: list[str] = field(default_factory=list)  # what could not be compared here, and why
    scores: list[Score] = field(default_factory=list)
    near_tie_bound: float = NEAR_TIE
    mismatches: list[int] = field(default_factory=list)
    reordered: list[int] = field(default_factory=list)
    near_ties: list[int] = field(default_factory=list)
    near_tie_pixels: int = 0  # of label maps
    reordered_pixels: int = 0
    seconds: float = 0.0
