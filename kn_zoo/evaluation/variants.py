"""The networks that the benchmark compares: one network with different layers in it.

Every KNConv2d is replaced and the rest, activations included, stays the same; a ReLU that a
KNConv2d computes itself follows its replacement, in place:

    conv_only    bare convolutions, without the final KernelNorm
    kernel_norm  kn_zoo's layer
    frozen       `kn_zoo.freeze` of it, for inference
    gaussian     the same with `dropout="gaussian"`, in training
    batch_norm   BatchNorm after each convolution, without its bias; no final KernelNorm
    group_norm   GroupNorm with 32 groups, or the largest smaller number that divides the channels
    resnet       another network: the ordinary ResNet of the same depth, timm's, or kn_zoo's at
                 low resolution
    unfold       Algorithm 1 of the paper as published, which unfolds every window
"""

from collections.abc import Callable

import timm
from torch import nn

from kn_zoo import KernelNorm2d, KNConv2d, freeze
from kn_zoo.evaluation.measurements import layer_of
from kn_zoo.layers.reference import ReferenceKNConv2d


def bare_conv(layer: KNConv2d, bias: bool) -> nn.Module:
    """Return the convolution of `layer`, after a ZeroPad2d where nn.Conv2d cannot pad the same."""
    left, right, top, bottom = layer.padding_sides
    even = left == right and top == bottom
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        pair(layer.kernel_size),
        pair(layer.stride),
        (top, left) if even else 0,
        pair(layer.dilation),
        layer.groups,
        bias,
    )
    conv.weight.data.copy_(layer.effective_weight())
    return conv if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), conv)


def pair(numbers: tuple[int, ...]) -> tuple[int, int]:
    return numbers[0], numbers[1]


def conv_only(layer: KNConv2d) -> nn.Module:
    return bare_conv(layer, layer.bias is not None)


def batch_norm(layer: KNConv2d) -> nn.Module:
    return nn.Sequential(bare_conv(layer, False), nn.BatchNorm2d(layer.out_channels))


def group_norm(layer: KNConv2d) -> nn.Module:
    channels = layer.out_channels
    groups = next(n for n in range(min(32, channels), 0, -1) if channels % n == 0)
    return nn.Sequential(bare_conv(layer, False), nn.GroupNorm(groups, channels))


def unfold(layer: KNConv2d) -> nn.Module:
    layer.__class__ = ReferenceKNConv2d  # the same parameters and settings
    return layer


def gaussian(layer: KNConv2d) -> nn.Module:
    layer.dropout = "gaussian"
    return layer


KERNEL_NORM = ("gaussian", "unfold")  # variants that keep ReLUs inside KNConv2d, and KernelNorm2d
REPLACEMENTS: dict[str, Callable[[KNConv2d], nn.Module]] = {
    "conv_only": conv_only,
    "gaussian": gaussian,
    "batch_norm": batch_norm,
    "group_norm": group_norm,
    "unfold": unfold,
}


def build(name: str, variant: str) -> nn.Module:
    """Build a variant of the network or layer `name`.

    Raises:
        LookupError: there is no ordinary ResNet of the same depth.
    """
    if variant == "resnet":
        return ordinary_resnet(name)
    if layer := layer_of(name):
        network: nn.Module = nn.Sequential(
            KNConv2d(layer.channels, layer.channels, layer.kernel, padding=layer.kernel // 2)
        )
    else:
        network = timm.create_model(name)
    if variant == "kernel_norm":
        return network
    if variant == "frozen":
        return freeze(network)
    for path, module in list(network.named_modules()):
        if isinstance(module, KNConv2d):
            replacement = REPLACEMENTS[variant](module)
            if module.relu and variant not in KERNEL_NORM:
                replacement = nn.Sequential(replacement, nn.ReLU(inplace=True))
            network.set_submodule(path, replacement)
        elif isinstance(module, KernelNorm2d) and variant not in KERNEL_NORM:
            network.set_submodule(path, nn.Identity())
    return network


def ordinary_resnet(name: str) -> nn.Module:
    """Build `resnet18` for `knresnet18`, and so on."""
    ordinary = name.removeprefix("kn")
    if ordinary == name or not timm.is_model(ordinary):
        raise LookupError(f"there is no network {ordinary!r} without kernel normalization")
    return timm.create_model(ordinary, in_chans=input_size(name)[0])


def input_size(name: str) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a network is made for."""
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None  # every network of timm's registry that has a KNConv2d has one
    return cfg.input_size
