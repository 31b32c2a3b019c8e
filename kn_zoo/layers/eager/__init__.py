"""`functional.kn_conv` where operations run one by one: fewer passes, and fewer tensors kept.

Optional: without this folder, and the `if` in `modules.kn_conv_with_statistics` that leads here, all
results stay the same. There is no other way in.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from kn_zoo.layers import functional
from kn_zoo.layers.functional import ConvSettings

from .conv import kn_conv_operation
from .custom_ops import compiled_moments

__all__ = ["kn_conv_eager", "use_eager_kernels"]


def use_eager_kernels(x: Tensor, settings: ConvSettings) -> bool:
    """Return whether `kn_conv_eager` is faster than `functional.kn_conv`, and supports the call.

    It is for images that are computed on now, one operation after the other: not exported, traced,
    transformed, or differentiated in forward mode. Compiled code needs its random numbers on a CPU.
    """
    if x.dim() != 4 or x.device.type in ("meta", "mps"):
        return False
    random = settings.dropout_p > 0.0
    if torch.compiler.is_compiling():
        return random and x.device.type == "cpu" and not torch.compiler.is_exporting()
    if random and functional.uses_gaussian(x, settings.dropout):
        return False
    return not (
        type(x) not in (Tensor, nn.Parameter)
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def kn_conv_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: ConvSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """As `functional.kn_conv`; mu and 1 / sqrt(var + eps) carry no gradient unless compiled."""
    if torch.compiler.is_compiling():
        moments = compiled_moments(x, settings.dropout_p, settings.dropout)
        return functional.kn_conv(x, weight, bias, settings, moments)
    return kn_conv_operation(x, weight, bias, settings)
