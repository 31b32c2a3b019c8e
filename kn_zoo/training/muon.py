"""timm's Muon on a CPU."""

from functools import partial
from typing import Any

import torch
from timm import optim

BFLOAT16 = "zeropower_via_newtonschulz"  # timm's function, whose default type is bfloat16


def orthogonalize_in_float32() -> None:
    """Let timm's Muon orthogonalize updates in float32 in this process.

    It does so in bfloat16, for which timm has no option. On CPUs without bfloat16 instructions a
    step of a ResNet-18 then takes far longer than its forward and backward passes.
    """
    module: Any = getattr(optim, "muon", None)  # timm 1.0.20 has no Muon
    function = getattr(module, BFLOAT16, None)
    if function is not None and not isinstance(function, partial):
        setattr(module, BFLOAT16, partial(function, dtype=torch.float32))
