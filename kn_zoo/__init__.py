"""Kernel Normalized networks for timm, with weights anyone can verify.

Importing this package registers its models with timm and does nothing else.
"""

__version__ = "0.1.0"

from . import models
from .convert import convert
from .layers import KernelNorm1d, KernelNorm2d, KNConv2d, freeze, set_inference_statistics

__all__ = [
    "KNConv2d",
    "KernelNorm1d",
    "KernelNorm2d",
    "__version__",
    "convert",
    "freeze",
    "models",
    "set_inference_statistics",
]
