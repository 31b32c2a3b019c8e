"""What the networks of the zoo share: stem, stages, norm, head, behind timm's model interface."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import ClassifierHead, get_act_layer, register_notrace_function
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from kn_zoo.layers import KNConv2d

ActLayer = str | type[nn.Module]
Features = list[dict[str, Any]]


@register_notrace_function
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
    """The class that timm knows by this name; a ValueError names a wrong one."""
    try:
        return get_act_layer(act_layer)
    except KeyError:
        raise ValueError(
            f"unknown act_layer {act_layer!r}: use a name such as 'relu' or 'mish'"
        ) from None


def fused(conv: nn.Module, act: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A convolution and the activation of its output: a KNConv2d takes a ReLU upon itself."""
    if isinstance(conv, KNConv2d) and type(act) is nn.ReLU:
        conv.relu = True
        return conv, nn.Identity()
    return conv, act


def init_weights(module: nn.Module) -> None:
    """Kaiming normal (fan out, ReLU) for convolutions, zero biases: as in the published code."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None:
            nn.init.zeros_(m.bias)


def resnet_stem(
    conv: Callable[..., nn.Module], in_chans: int, chs: int, small: bool
) -> tuple[nn.Module, nn.Module | None, Features]:
    """Stem, pool, and feature of the stem: a 3x3, or 7x7 of stride 2 with a max pool after it."""
    if small:
        return conv(in_chans, chs, 3, padding=1), None, []
    stem = conv(in_chans, chs, 7, stride=2, padding=3)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    return stem, pool, [dict(num_chs=chs, reduction=2, module="stem")]


class Scale(NamedTuple):
    """How a stage comes to its resolution: by stride 2, or by dilation in its place."""

    stride: int
    first_dilation: int  # of the layers up to the one that would stride
    dilation: int  # of the layers after it
    reduction: int  # input pixels a pixel


def scales(reduction: int, stages: int, output_stride: int) -> list[Scale]:
    """Halve the resolution before each stage but the first, as far as `output_stride` allows.

    Where it stops, dilation doubles instead and maps keep their size. If the input is a multiple of
    the reduction, the strided network's values are at every second pixel, every fourth, and so on.
    """
    if output_stride < reduction or output_stride & (output_stride - 1):
        raise ValueError(f"output_stride={output_stride}: use a power of two from {reduction} up")
    found = [Scale(1, 1, 1, reduction)]
    while len(found) < stages:
        dilation, reduction = found[-1].dilation, found[-1].reduction
        if reduction < output_stride:
            found.append(Scale(2, dilation, dilation, 2 * reduction))
        else:
            found.append(Scale(1, dilation, 2 * dilation, reduction))
    return found


class DilatedMaxPool2d(nn.Module):
    """What `nn.MaxPool2d(2)` becomes if it must not stride: 2x2 pixels `dilation` apart."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        x = nn.functional.pad(x, (0, d, 0, d), value=float("-inf"))  # a max over what is there
        return nn.functional.max_pool2d(x, 2, stride=1, dilation=d)


def max_pool(stride: int, dilation: int) -> nn.Module:
    """2x2 max pooling by stride 2, or by dilation in its place."""
    return nn.MaxPool2d(2) if stride == 2 else DilatedMaxPool2d(dilation)


class Stage(nn.Module):
    """Blocks of one resolution, after what leads there from the stage before."""

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

    `feature_info` lists one map a resolution: the stem's, if a pool follows it, and each stage's. A
    map is taken before the next stage's downsampling, so that it is the last of its resolution.
    `min_size` is the smallest input side, in pixels, for the stages, `neck_min_size` for the neck.
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
        """The last linear layer."""
        return self.head.get_submodule("fc")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (0 classes: none); None keeps the pooling, "" removes it."""
        like = next(self.parameters())
        self.num_classes = num_classes
        head: Any = self.head
        head.reset(num_classes, global_pool)
        head.to(device=like.device, dtype=like.dtype).train(self.training)
        self._set_widths(self.num_features)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of `feature_info`, and the output of `forward_features` unless `intermediates_only`.

        Args:
            x: images (N, C, H, W).
            indices: which maps; all if None, the last n if an int.
            norm: apply the final norm to the last stage's map.
            stop_early: skip the stages after the last map asked for.
            output_fmt: "NCHW", the only one.
            intermediates_only: return the list of maps alone.
        """
        if output_fmt != "NCHW":
            raise ValueError("maps are NCHW: use output_fmt='NCHW'")
        intermediates: list[Tensor] = []
        first = self.stem_maps
        take_indices, max_index = feature_take_indices(first + len(self.stages), indices)

        x = self.stem(check_size(x, self.min_size if intermediates_only else self.neck_min_size))
        if first == 1 and 0 in take_indices:
            intermediates.append(x)
        x = self.pool(x)
        last = first + len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # a script cannot slice a Sequential
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1 - first]
        index = first - 1
        for index, stage in enumerate(stages, start=first):
            x = stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == last else x)
        if intermediates_only:
            return intermediates
        if index == last:
            x = self.norm(self.neck(x))
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps at `indices` do not need; returns them as non-negative numbers."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        ends_early = max_index < len(self.feature_info) - 1
        self.stages = self.stages[: max_index + 1 - self.stem_maps]
        if len(self.stages) == 0:
            self.pool = nn.Identity()
        if prune_norm or ends_early:
            self.norm = nn.Identity()
        if prune_norm or prune_head or ends_early:  # the neck exists for the head
            self.neck = nn.Identity()
            self.neck_min_size = self.min_size
            self._set_widths(self.feature_info[max_index]["num_chs"])
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to normalized, activated maps (N, num_features, h, w)."""
        x = self.stem(check_size(x, self.neck_min_size))
        x = self.stages(self.pool(x))
        return self.norm(self.neck(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps to logits (N, num_classes), or to what the classifier sees."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def classifier_head(
    num_features: int, num_classes: int, global_pool: str, drop_rate: float, dd: dict[str, Any]
) -> ClassifierHead:
    """timm's pooling, dropout and linear layer."""
    head = ClassifierHead(num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
    return head.to(**dd)  # only newer timm takes a device in the constructor
