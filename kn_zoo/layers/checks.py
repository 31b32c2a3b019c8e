"""What the layers refuse, and the cure."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    Ints = list[int] | tuple[int, ...]
else:  # what TorchScript calls it; it takes tuples too
    Ints = list[int]

INFERENCE_STATISTICS = ("expected", "plain", "sampled")
DROPOUTS = ("mask", "gaussian")


def check_settings(dropout_p: float, eps: float, inference_statistics: str, dropout: str) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p={dropout_p}: use a probability in [0, 1); 0 turns dropout off")
    if not eps > 0.0:
        raise ValueError(f"eps={eps}: use a positive number; it keeps constant windows finite")
    if inference_statistics not in INFERENCE_STATISTICS:
        raise ValueError(
            f"inference_statistics={inference_statistics!r}: use one of {INFERENCE_STATISTICS}"
        )
    if dropout not in DROPOUTS:
        raise ValueError(f"dropout={dropout!r}: use one of {DROPOUTS}")


def padding_sides(padding: int | tuple[int, ...]) -> tuple[int, int, int, int]:
    """int, (height, width) or (left, right, top, bottom) -> (left, right, top, bottom)."""
    numbers = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    if len(numbers) == 2:
        numbers = (numbers[1], numbers[1], numbers[0], numbers[0])
    if len(numbers) != 4 or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError(
            f"padding={padding!r}: use a non-negative int, (height, width) "
            "or (left, right, top, bottom)"
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]


def check_window(x: Tensor, kernel_size: Ints, padding: Ints, dilation: Ints) -> None:
    """Refuse an input (N, C, H, W) too small for one window."""
    height = x.shape[2] + padding[2] + padding[3]
    width = x.shape[3] + padding[0] + padding[1]
    window_height = dilation[0] * (kernel_size[0] - 1) + 1
    window_width = dilation[1] * (kernel_size[1] - 1) + 1
    if height < window_height or width < window_width:
        raise ValueError(
            f"a window of {window_height} x {window_width} pixels does not fit the padded input of "
            f"{height} x {width}: use a larger input, more padding or a smaller kernel"
        )
