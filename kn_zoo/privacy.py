"""Differentially private training with Opacus: per-sample gradients of kernel normalization.

Importing this module registers `KNConv2d` with Opacus, so that `PrivacyEngine.make_private` takes
every network of the zoo, with `grad_sample_mode` "hooks" or "ghost" and with dropout:

    import kn_zoo.privacy
    model, optimizer, loader = PrivacyEngine().make_private(module=model, ...)

A unit's mean mu and reciprocal standard deviation rstd depend on the input alone. With G the
gradient of the layer's output, 0 where a fused ReLU is 0, and q the output's pixels, image n has

    grad_bias[n, o]   = sum_q G[n, o, q]
    grad_weight[n, o] = sum_q G * rstd * (unfold(x) - mu)

of the filters that are convolved; standardized filters pass it on to `weight` and `gain`.
mu and rstd are those of the forward pass, with the dropout mask that was drawn there: a layer that
is made private keeps both, and its output's sign, until the hook of the backward pass takes them.

Ghost clipping needs only norms. With A = unfold(x) - mu (P numbers a unit) and B = G * rstd,

    |grad_weight[n]|^2 = sum over q, r of (A^T A)[q, r] * (B^T B)[q, r],

which is cheaper than the gradient itself while 2 * q^2 < P * O.

Source: Nasirigerdeh et al., Kernel Normalized Convolutional Networks for Privacy-Preserving Machine
Learning, SaTML 2023, arXiv 2210.00053; Opacus' rules for grad samplers and norm samplers.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from opacus.validators import register_module_validator
from opacus.validators.errors import UnsupportedModuleError
from timm.layers import GroupNormAct
from torch import Tensor, nn

from kn_zoo.layers import KNConv2d
from kn_zoo.layers.functional import standardized_weight
from kn_zoo.layers.reference import ReferenceKNConv2d

__all__ = ["PrivateKNConv2d", "restore"]

Gradients = dict[Tensor, Tensor]  # by parameter


class UnitStatistics(NamedTuple):
    """Statistics that a private layer keeps from one forward pass."""

    mu: Tensor  # (N, 1, H', W')
    rstd: Tensor  # (N, 1, H', W')
    positive: Tensor | None  # (N, O, H', W') bool: where a fused ReLU let the output through


class PrivateKNConv2d(KNConv2d):
    """A `KNConv2d` that keeps, while it trains, what its per-sample gradients are made from.

    `PrivacyEngine.make_private` turns every `KNConv2d` of a model into one, in place. Parameters,
    state dict and outputs stay the same; `restore` turns it back.
    """

    kept: list[UnitStatistics]

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return self._functorch_forward(x)
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "activation checkpointing runs the layer again in the backward pass, which leaves "
                "the statistics of its first run behind: call model.set_grad_checkpointing(False)"
            )
        if torch.is_autocast_enabled(x.device.type):
            raise RuntimeError(
                "private training runs in float32: leave autocast off, since per-sample gradients "
                "are made from the layers' inputs as they are"
            )
        out, mu, rstd = self.forward_with_statistics(x)
        positive = out.detach() > 0 if self.relu else None
        self.kept.append(UnitStatistics(mu.detach().to(out), rstd.detach().to(out), positive))
        return out

    def _functorch_forward(self, x: Tensor) -> Tensor:
        if self.dropout_p > 0:
            raise RuntimeError(
                "functorch would draw another dropout mask for the gradient than for the forward "
                'pass: use grad_sample_mode="hooks" or "ghost", or dropout_p=0'
            )
        return super().forward(x)


def restore(model: nn.Module) -> nn.Module:
    """Turn every `PrivateKNConv2d` of `model` back into a `KNConv2d`, in place; returns it."""
    for layer in model.modules():
        if type(layer) is PrivateKNConv2d:
            del layer.kept
            layer.__class__ = KNConv2d  # type: ignore[assignment]
    return model


@register_module_validator([KNConv2d, ReferenceKNConv2d])
def _make_private(layer: KNConv2d) -> list[UnsupportedModuleError]:
    """Change the layer in place; Opacus calls validators before it adds its hooks."""
    layer.__class__ = PrivateKNConv2d
    cast(PrivateKNConv2d, layer).kept = []
    return []


@register_grad_sampler(PrivateKNConv2d)
def _grad_samples(layer: PrivateKNConv2d, activations: list[Tensor], grad: Tensor) -> Gradients:
    """Gradient of every image: {weight: (N, O, C / groups, kh, kw), bias and gain: (N, O)}."""
    grad, mu, rstd = _gradient_and_statistics(layer, grad)
    samples = _filter_gradients(layer, activations[0], grad * rstd, mu)
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = grad.flatten(2).sum(2)
    return samples


@register_norm_sampler(PrivateKNConv2d)
def _norm_samples(layer: PrivateKNConv2d, activations: list[Tensor], grad: Tensor) -> Gradients:
    """Norm of every image's gradient, (N,), for each parameter."""
    grad, mu, rstd = _gradient_and_statistics(layer, grad)
    norms: Gradients = {}
    if layer.gain is not None:
        gradients = _filter_gradients(layer, activations[0], grad * rstd, mu)
        norms = {p: samples.flatten(1).norm(2, dim=1) for p, samples in gradients.items()}
    elif layer.weight.requires_grad:
        norms[layer.weight] = _weight_norms(layer, activations[0], grad * rstd, mu)
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = grad.flatten(2).sum(2).norm(2, dim=1)
    return norms


@register_grad_sampler(GroupNormAct)
def _group_norm_samples(layer: GroupNormAct, activations: list[Tensor], grad: Tensor) -> Gradients:
    """Gradient of every image, (N, C) each, of timm's group normalization with its activation."""
    normalized = F.group_norm(activations[0], layer.num_groups, eps=layer.eps)
    with torch.enable_grad():
        weight, bias = (p.detach().view(-1, 1, 1) for p in (layer.weight, layer.bias))
        out = (normalized * weight + bias).requires_grad_()
        (grad,) = torch.autograd.grad(layer.act(out.clone()), out, grad)
    return {
        layer.weight: (grad * normalized).flatten(2).sum(2),
        layer.bias: grad.flatten(2).sum(2),
    }


def _gradient_and_statistics(layer: PrivateKNConv2d, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return G (N, O, H', W'), and mu and rstd (N, 1, H', W') of its forward pass."""
    if not layer.kept:
        raise RuntimeError(
            "a private layer has no statistics of this forward pass: it ran without gradients, or "
            "the backward pass ran twice"
        )
    mu, rstd, positive = layer.kept.pop()
    return grad if positive is None else grad * positive, mu, rstd


def _filter_gradients(layer: PrivateKNConv2d, x: Tensor, scaled: Tensor, mu: Tensor) -> Gradients:
    """Gradient of every image for the weight and, if filters are standardized, for the gain."""
    parameters = [p for p in (layer.weight, layer.gain) if p is not None]
    if not any(p.requires_grad for p in parameters):
        return {}
    gradients = [_weight_gradients(layer, x, scaled, mu)]
    if layer.gain is not None:
        pullback = torch.func.vjp(standardized_weight, layer.weight, layer.gain)[1]
        gradients = torch.vmap(pullback)(gradients[0])
    pairs = zip(parameters, gradients, strict=True)
    return {p: samples for p, samples in pairs if p.requires_grad}


def _weight_gradients(layer: PrivateKNConv2d, x: Tensor, scaled: Tensor, mu: Tensor) -> Tensor:
    """sum_q scaled * (unfold(x) - mu) a sample, (N, O, C / groups, kh, kw); scaled = G * rstd.

    Only a window's columns are unfolded. Its rows are views of the result, so that a third of
    unfold's copies is made.
    """
    (n, _, height, _), groups = scaled.shape, layer.groups
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    padded = F.pad(x.to(scaled.dtype), layer.padding_sides).permute(0, 2, 3, 1)
    columns = padded.unfold(2, dw * (kw - 1) + 1, sw)[..., ::dw]  # (N, H, W', C, kw)
    # (N, H, W', kw, C), then (N, H, W', kw, groups, C / groups)
    columns = columns.transpose(3, 4).contiguous().unflatten(4, (groups, -1))
    # (N, H', W', groups, O / groups)
    pixels = scaled.permute(0, 2, 3, 1).unflatten(3, (groups, -1))
    rows = [columns[:, i : i + sh * (height - 1) + 1 : sh] for i in range(0, kh * dh, dh)]
    products = [torch.einsum("nhwgo,nhwjgc->ngojc", pixels, row) for row in rows]
    gradients = torch.stack(products).permute(1, 2, 3, 5, 0, 4).reshape(n, *layer.weight.shape)
    means = torch.einsum("nohw,nhw->no", scaled, mu.squeeze(1))
    return gradients.sub_(means[..., None, None, None])


def _weight_norms(layer: PrivateKNConv2d, x: Tensor, scaled: Tensor, mu: Tensor) -> Tensor:
    """Norms of `_weight_gradients`, (N,), by the cheaper way."""
    (n, channels), pixels = scaled.shape[:2], mu[0].numel()
    if 2 * pixels**2 >= layer.weight.numel() // layer.groups:  # of one group
        return _weight_gradients(layer, x, scaled, mu).flatten(1).norm(2, dim=1)
    padded = F.pad(x.to(scaled.dtype), layer.padding_sides)
    units = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
    units = (units - mu.view(n, 1, pixels)).view(n, layer.groups, -1, pixels)
    scaled = scaled.reshape(n, layer.groups, channels // layer.groups, pixels)
    gram = (units.mT @ units) * (scaled.mT @ scaled)  # (N, groups, q, q)
    return gram.sum((1, 2, 3)).clamp_min(0).sqrt()
