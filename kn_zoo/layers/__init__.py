"""Layers of kernel normalization, and how their statistics are taken at inference."""

from torch import nn

from .checks import INFERENCE_STATISTICS
from .frozen import FrozenKNConv2d, freeze
from .kernel_norm import KernelNorm1d, KernelNorm2d
from .kn_conv import KNConv2d
from .local_context_norm import LocalContextNorm

__all__ = [
    "FrozenKNConv2d",
    "KNConv2d",
    "KernelNorm1d",
    "KernelNorm2d",
    "LocalContextNorm",
    "freeze",
    "set_inference_statistics",
]


def set_inference_statistics(model: nn.Module, statistics: str) -> nn.Module:
    """Choose "expected", "plain" or "sampled" statistics for every layer of `model`; returns it.

    Raises ValueError on another name, and when `model` has no kernel-normalized layer.
    """
    if statistics not in INFERENCE_STATISTICS:
        raise ValueError(f"statistics={statistics!r}: use one of {INFERENCE_STATISTICS}")
    layers = [m for m in model.modules() if isinstance(m, (KNConv2d, KernelNorm1d, KernelNorm2d))]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no kernel-normalized layer to set")
    for layer in layers:
        layer.inference_statistics = statistics
    return model
