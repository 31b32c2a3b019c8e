"""The networks; importing them registers their entry points with timm."""

from . import knpreactresnet
from .knpreactresnet import PreActResNet

__all__ = ["PreActResNet", "knpreactresnet"]
