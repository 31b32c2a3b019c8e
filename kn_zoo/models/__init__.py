"""The networks; importing them registers their entry points with timm."""

from . import knconvnext, kndensenet, knpreactresnet, knresnet, knresnet_small, resnet_cifar
from .knconvnext import KNConvNeXt
from .kndensenet import KNDenseNet
from .knpreactresnet import PreActResNet
from .knresnet import KNResNet
from .knresnet_small import KNResNetSmall
from .resnet_cifar import ResNetCifar

__all__ = [
    "KNConvNeXt",
    "KNDenseNet",
    "KNResNet",
    "KNResNetSmall",
    "PreActResNet",
    "ResNetCifar",
    "knconvnext",
    "kndensenet",
    "knpreactresnet",
    "knresnet",
    "knresnet_small",
    "resnet_cifar",
]
