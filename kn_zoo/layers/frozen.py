"""A network frozen for inference: every KNConv2d one convolution with centred filters, one map."""

import copy
from typing import TypeVar

from torch import Tensor, nn

from .kn_conv import KNConv2d, centred_filters, kn_conv2d

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class FrozenKNConv2d(nn.Module):
    """conv(x, W - mean(W)) * rstd + b, with the mean taken off the filters once."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: KNConv2d) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.register_buffer("weight", centred_filters(weight) if layer.groups == 1 else weight)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding_sides = layer.padding_sides
        self.dropout_p, self.eps = layer.dropout_p, layer.eps
        self.inference_statistics, self.relu = layer.inference_statistics, layer.relu

    def forward(self, x: Tensor) -> Tensor:
        return kn_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding_sides,
            self.dilation,
            self.groups,
            self.dropout_p,
            self.inference_statistics,
            self.eps,
            frozen=True,
            relu=self.relu,
        )


def freeze(model: ModuleT) -> ModuleT:
    """A copy of `model` for inference only, ready for torch.export, ONNX and torch.compile.

    Its outputs are those of `model.eval()` to about 1e-5. Inputs whose |mean| is far above their
    std are not treated with the care that `KNConv2d` takes in float32. Raises ValueError when
    `model` holds no `KNConv2d`, or one whose inference statistics are "sampled".
    """
    layers = [m for m in model.modules() if isinstance(m, KNConv2d)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no KNConv2d to freeze")
    if any(layer.inference_statistics == "sampled" for layer in layers):
        raise ValueError(
            'statistics are "sampled", so there is nothing to freeze: first call '
            'kn_zoo.set_inference_statistics(model, "expected")'
        )
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(frozen, KNConv2d):
        return FrozenKNConv2d(frozen)  # type: ignore[return-value]
    for name, layer in list(frozen.named_modules()):
        if isinstance(layer, KNConv2d):
            parent, _, child = name.rpartition(".")
            setattr(frozen.get_submodule(parent), child, FrozenKNConv2d(layer))
    return frozen
