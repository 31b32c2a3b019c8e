"""Layers of kernel normalization."""

from .freeze import freeze
from .local_context_norm import LocalContextNorm
from .modules import (
    FrozenKNConv2d,
    KernelNorm1d,
    KernelNorm2d,
    KernelNorm3d,
    KNConv1d,
    KNConv2d,
    KNConv3d,
    set_inference_statistics,
)

__all__ = [
    "FrozenKNConv2d",
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "LocalContextNorm",
    "freeze",
    "set_inference_statistics",
]
