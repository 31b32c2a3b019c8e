"""The networks; importing them registers their entry points with timm."""

from . import knpreactresnet, knresnet
from .knpreactresnet import PreActResNet
from .knresnet import KNResNet

__all__ = ["KNResNet", "PreActResNet", "knpreactresnet", "knresnet"]
