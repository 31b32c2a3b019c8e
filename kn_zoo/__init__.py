"""Kernel Normalized networks for timm, with checkpoints anyone can verify.

Importing this package registers its models with timm and does nothing else.
"""

__version__ = "0.1.0"

from . import models
from .convert import convert
from .layers import (
    KernelNorm1d,
    KernelNorm2d,
    KernelNorm3d,
    KNConv1d,
    KNConv2d,
    KNConv3d,
    freeze,
    set_inference_statistics,
)
from .segmentation import create_segmentation_model, list_segmentation_models

__all__ = [
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "__version__",
    "convert",
    "create_segmentation_model",
    "freeze",
    "list_segmentation_models",
    "models",
    "set_inference_statistics",
]
