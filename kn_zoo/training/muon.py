"""timm's Muon optimizer on a CPU."""

from functools import partial
from typing import Any

import torch
from timm import optim


def orthogonalize_in_float32() -> None:
    """Let timm's Muon orthogonalize updates in float32 in this process.

    timm does so in bfloat16 and has no option for it. On one thread of an AMD EPYC with AVX2 and
    no bfloat16 instructions, a step for KN-PreActResNet-18 takes 48.4 s then, and 1.5 s in float32
    (torch 2.15, timm 1.0.31, means of three steps).
    """
    muon: Any = getattr(optim, "muon", None)
    if muon is not None:  # older versions of timm have no Muon
        newton_schulz = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = partial(newton_schulz, dtype=torch.float32)
