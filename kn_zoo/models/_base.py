"""Parts shared by the networks: layer factory, stem, stage, and timm's model interface."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from timm.layers import ClassifierHead, DropPath, get_act_layer
from timm.models import checkpoint_seq
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from kn_zoo.layers import KernelNorm2d, KNConv2d

ActLayer = str | type[nn.Module]
Features = list[dict[str, Any]]


@torch.fx.wrap
def check_size(x: Tensor, minimum: int) -> Tensor:
    """Return x (N, C, H, W), or raise a ValueError if H or W is below `minimum`."""
    height, width = x.shape[-2], x.shape[-1]
    if height < minimum or width < minimum:
        raise ValueError(
            f"input of {height}x{width} pixels is too small: "
            f"enlarge it to at least {minimum}x{minimum}"
        )
    return x


def activation(act_layer: ActLayer) -> type[nn.Module]:
    """Return the activation class that timm registers under this name, or raise a ValueError."""
    try:
        return get_act_layer(act_layer)
    except KeyError:
        raise ValueError(
            f"unknown act_layer {act_layer!r}: use a name such as 'relu' or 'mish'"
        ) from None


class Layers(Protocol):
    """The layers that a residual network is built from, with or without kernel normalization."""

    def conv(self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any) -> nn.Module:
        """Return a convolution; `geometry` is stride, padding and dilation."""

    def stem(self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any) -> nn.Module:
        """Return the first convolution."""

    def norm_act(self, channels: int) -> nn.Module:
        """Return what precedes a convolution: a norm of `channels` channels and an activation."""

    def conv_norm_act(
        self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any
    ) -> tuple[nn.Module, nn.Module]:
        """Return a convolution, and the norm and activation of its output."""


@dataclass(frozen=True)
class KNLayers:
    """Kernel-normalized layers of one network, all with the same settings.

    A KNConv2d normalizes its own input, so `norm_act` is the activation alone. `stem_norm=False`
    makes the stem an nn.Conv2d.
    """

    act_layer: ActLayer
    dropout_p: float
    inference_statistics: str
    dropout: str
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    weight_standardization: bool = False
    stem_norm: bool = True

    def conv(
        self, in_chs: int, out_chs: int, kernel_size: int, *, relu: bool = False, **geometry: Any
    ) -> KNConv2d:
        """Return a KNConv2d, which computes the ReLU of its output too if `relu`."""
        return KNConv2d(
            in_chs,
            out_chs,
            kernel_size,
            **geometry,
            dropout_p=self.dropout_p,
            inference_statistics=self.inference_statistics,
            dropout=self.dropout,
            relu=relu,
            weight_standardization=self.weight_standardization,
            device=self.device,
            dtype=self.dtype,
        )

    def stem(self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any) -> nn.Module:
        if self.stem_norm:
            return self.conv(in_chs, out_chs, kernel_size, **geometry)
        tensors: dict[str, Any] = dict(device=self.device, dtype=self.dtype)
        return nn.Conv2d(in_chs, out_chs, kernel_size, **geometry, **tensors)

    def act(self) -> nn.Module:
        return activation(self.act_layer)()

    def norm(self, dropout_factor: float, max_dropout_p: float) -> KernelNorm2d:
        """Return a KernelNorm of single pixels, with `dropout_factor` times the layers' dropout."""
        return KernelNorm2d(
            dropout_p=min(dropout_factor * self.dropout_p, max_dropout_p),
            inference_statistics=self.inference_statistics,
            dropout=self.dropout,
        )

    def norm_act(self, channels: int) -> nn.Module:
        return self.act()

    def conv_norm_act(
        self, in_chs: int, out_chs: int, kernel_size: int, **geometry: Any
    ) -> tuple[nn.Module, nn.Module]:
        """Return a KNConv2d and the activation after it: Identity if that is a ReLU."""
        relu = activation(self.act_layer) is nn.ReLU
        conv = self.conv(in_chs, out_chs, kernel_size, relu=relu, **geometry)
        return conv, nn.Identity() if relu else self.act()


def init_weights(module: nn.Module) -> None:
    """Apply the published initialization: Kaiming normal (fan out, ReLU) weights, zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


def drop_path(rate: float) -> nn.Module:
    """Return stochastic depth of this rate."""
    return DropPath(rate) if rate else nn.Identity()


def resnet_stem(
    layers: Layers, in_chans: int, chs: int, small: bool
) -> tuple[nn.Module, nn.Module | None, Features]:
    """Return stem, pool and the stem's feature info.

    The stem is a 3x3 convolution if `small`, otherwise 7x7 with stride 2 before a max pool.
    """
    if small:
        return layers.stem(in_chans, chs, 3, padding=1), None, []
    stem = layers.stem(in_chans, chs, 7, stride=2, padding=3)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return stem, pool, [dict(num_chs=chs, reduction=2, module="stem")]


class StageGeometry(NamedTuple):
    """Stride and dilation of a stage, and its reduction."""

    stride: int  # 2, or 1 where dilation replaces it
    first_dilation: int  # of the layers up to and including the strided one
    dilation: int  # of the layers after it
    reduction: int  # input pixels per pixel of the stage's map


def stage_geometries(reduction: int, stages: int, output_stride: int) -> list[StageGeometry]:
    """Halve the resolution before each stage but the first until it reaches `output_stride`.

    Later stages double the dilation instead of striding. If the input size is a multiple of the
    reduction, the strided network's maps are the dilated maps at every second, fourth, ... pixel.
    """
    if output_stride < reduction or output_stride & (output_stride - 1):
        raise ValueError(f"output_stride={output_stride}: use a power of two from {reduction} up")
    geometries = [StageGeometry(1, 1, 1, reduction)]
    while len(geometries) < stages:
        dilation, reduction = geometries[-1].dilation, geometries[-1].reduction
        if reduction < output_stride:
            geometries.append(StageGeometry(2, dilation, dilation, 2 * reduction))
        else:
            geometries.append(StageGeometry(1, dilation, 2 * dilation, reduction))
    return geometries


class DilatedMaxPool2d(nn.Module):
    """`nn.MaxPool2d(2)` with dilation in place of its stride; the map keeps its size."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        x = nn.functional.pad(x, (0, d, 0, d), value=float("-inf"))  # never the maximum
        return nn.functional.max_pool2d(x, 2, stride=1, dilation=d)


def max_pool(stride: int, dilation: int, ceil_mode: bool = False) -> nn.Module:
    """Return 2x2 max pooling with stride 2, or with `dilation` if the stride is 1."""
    return nn.MaxPool2d(2, ceil_mode=ceil_mode) if stride == 2 else DilatedMaxPool2d(dilation)


class Stage(nn.Module):
    """Optional downsampling, then blocks of one resolution."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class StagedNetwork(nn.Module):
    """stem -> pool -> stages -> neck -> norm -> head.

    `feature_info` lists one map for each resolution: the stem's if a pool follows it, and each
    stage's. A map is taken before the next stage's downsampling, so it is the last of its
    resolution. `min_size` is the smallest height and width of an image that the stages accept,
    `neck_min_size` the smallest that the neck accepts, in pixels.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stages: Sequence[Stage],
        feature_info: Features,
        norm: nn.Module,
        head: Any,
        in_chans: int,
        num_classes: int,
        min_size: int,
        pool: nn.Module | None = None,
        neck: nn.Module | None = None,
        neck_min_size: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.min_size = min_size
        self.neck_min_size = max(min_size, neck_min_size)
        self.feature_info = feature_info
        self.stem_maps = len(feature_info) - len(stages)  # 1 if the stem's map is a feature, else 0

        self.stem = stem
        self.pool = pool or nn.Identity()
        self.stages = nn.Sequential(*stages)
        self.neck = neck or nn.Identity()
        self.norm = norm
        self.head = head
        self._set_widths(head.in_features)

    def _set_widths(self, num_features: int) -> None:
        head: Any = self.head
        self.num_features = head.in_features = num_features
        self.head_hidden_size = num_features * head.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rate decay."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^(?:neck|norm)", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its maps."""
        for stage in self.stages.children():
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.get_submodule("fc")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier and the pooling; 0 classes and "" remove them, None keeps it."""
        like = next(self.parameters())
        self.num_classes = num_classes
        head: Any = self.head
        head.reset(num_classes, global_pool)
        head.to(device=like.device, dtype=like.dtype).train(self.training)
        self._set_widths(self.num_features)

    def forward_maps(self, x: Tensor, indices: list[int], norm: bool = False) -> list[Tensor]:
        """Return the maps at the non-negative `indices` of images (N, C, H, W)."""
        return self._run_stages(check_size(x, self.min_size), indices, max(indices), norm)[1]

    def _run_stages(
        self, x: Tensor, indices: list[int], last: int, norm: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return map `last` of `feature_info` and the maps at `indices`."""
        maps: list[Tensor] = []
        x = self.stem(x)
        if self.stem_maps == 1 and 0 in indices:
            maps.append(x)
        x = self.pool(x)
        index = self.stem_maps - 1
        for stage in self.stages:
            index += 1
            if index <= last:
                x = stage(x)
                if index in indices:
                    final = norm and index == self.stem_maps + len(self.stages) - 1
                    maps.append(self.norm(x) if final else x)
        return x, maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the output of `forward_features` (unless `intermediates_only`) and a list of maps.

        Args:
            x: images (N, C, H, W).
            indices: indices of `feature_info`; None selects all, an int the last n.
            norm: apply the final norm to the last stage's map.
            stop_early: skip the stages after the last selected map.
            output_fmt: "NCHW".
            intermediates_only: return the list of maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError("maps are NCHW: use output_fmt='NCHW'")
        x = check_size(x, self.min_size if intermediates_only else self.neck_min_size)
        stages = self.stem_maps + len(self.stages)
        take_indices, max_index = feature_take_indices(stages, indices)
        last = max_index if stop_early else stages - 1
        x, maps = self._run_stages(x, take_indices, last, norm)
        if intermediates_only:
            return maps
        if last == stages - 1:
            x = self.norm(self.neck(x))
        return x, maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove modules that the maps at `indices` do not need; return non-negative indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        ends_early = max_index < len(self.feature_info) - 1
        self.stages = self.stages[: max_index + 1 - self.stem_maps]
        if len(self.stages) == 0:
            self.pool = nn.Identity()
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if prune_norm or prune_head or ends_early:  # only the head uses the neck
            self.neck = nn.Identity()
            self.neck_min_size = self.min_size
            self._set_widths(self.feature_info[max_index]["num_chs"])
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Return normalized, activated maps (N, num_features, h, w) of images (N, C, H, W)."""
        x = self.stem(check_size(x, self.neck_min_size))
        x = self.stages(self.pool(x))
        return self.norm(self.neck(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (N, num_classes) of maps, or the classifier's input if `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class FeatureMaps(FeatureGetterNet):
    """List of feature maps of a StagedNetwork, for `features_only=True`.

    timm's FeatureGetterNet calls `forward_intermediates`, whose Union of return types TorchScript
    rejects.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        # TorchScript refuses a class annotation of `model`, which would tell mypy its type.
        return self.model.forward_maps(x, self.out_indices, self.norm)  # type: ignore[operator]


def classifier_head(
    num_features: int, num_classes: int, global_pool: str, drop_rate: float, dd: dict[str, Any]
) -> ClassifierHead:
    """Return timm's pooling, dropout and linear layer, moved to the device and dtype in `dd`."""
    head = ClassifierHead(num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
    return head.to(**dd)  # older timm has no device argument
