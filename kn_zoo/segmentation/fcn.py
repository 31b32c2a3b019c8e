"""Fully convolutional networks (Long, Shelhamer, Darrell, 2015) on any backbone of the zoo or timm.

The head is that of the authors' FCN-ResNets: 3x3 convolution, normalization, ReLU, dropout, 1x1
classifier. No code was published for kernel normalization; here its head is KNConv2d 3x3, ReLU,
dropout, plain 1x1 convolution. The maps of pre-activation networks are neither normalized nor
activated, so a head on them starts with normalization and ReLU.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from timm.layers import BatchNormAct2d, GroupNormAct
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from kn_zoo.layers import KNConv2d

Norm = Literal["kernel", "batch", "group", "layer"]
NORMS = ("kernel", "batch", "group", "layer")


def norm_act(norm: Norm, channels: int) -> nn.Module:
    """Return normalization and ReLU; only the ReLU for "kernel", as the convolution normalizes."""
    if norm == "kernel":
        return nn.ReLU()
    if norm == "batch":
        return BatchNormAct2d(channels)
    # A group of one channel would remove its mean from a 1x1 map.
    return GroupNormAct(channels, num_groups=1 if norm == "layer" else min(32, channels // 2))


class FCNHead(nn.Module):
    """Head from maps (N, C, h, w) to class scores (N, num_classes, h, w).

    Args:
        raw_maps: whether the maps have yet to be normalized and activated.
        kn_args: arguments of KNConv2d (dropout_p, dropout, inference_statistics).
    """

    def __init__(
        self,
        in_chs: int,
        chs: int,
        num_classes: int,
        norm: Norm,
        raw_maps: bool,
        drop_rate: float = 0.1,
        **kn_args: Any,
    ) -> None:
        super().__init__()
        self.pre = norm_act(norm, in_chs) if raw_maps else nn.Identity()
        if norm == "kernel":
            self.conv: nn.Module = KNConv2d(in_chs, chs, 3, padding=1, relu=True, **kn_args)
            self.norm: nn.Module = nn.Identity()
        else:
            self.conv = nn.Conv2d(in_chs, chs, 3, padding=1, bias=False)
            self.norm = norm_act(norm, chs)
        self.drop = nn.Dropout(drop_rate)
        self.classifier = nn.Conv2d(chs, num_classes, 1)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)  # scores start near zero
        for bias in (self.conv.bias, self.classifier.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.pre(x)))
        return self.classifier(self.drop(x))


class FCN(nn.Module):
    """Fully convolutional network: backbone, head, and bilinear resizing to the image's size.

    Images are padded with zeros at the bottom and on the right to a multiple of the last map's
    reduction, and the scores are cropped. With `skips`, the maps of these reductions have their own
    heads, and coarser scores are resized and added to finer ones, as in FCN-8s.

    Args:
        backbone: network created with `features_only=True`.
        norm: normalization of the heads: "kernel", "batch", "group" (32 groups) or "layer" (one).
        raw_maps: whether the backbone's maps precede normalization and activation, as in
            pre-activation networks; by default only for "kernel".
        channels: width of the head.
        skips: reductions of further maps, such as (8, 4), whose heads are as wide as the maps.
        kn_args: arguments of the heads' KNConv2d (dropout_p, dropout, inference_statistics).

    Raises:
        ValueError: unknown `norm`, or the backbone has no map of a reduction in `skips`.
        TypeError: `kn_args` without kernel normalization.
    """

    head: FCNHead
    num_features: int
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        norm: Norm = "kernel",
        raw_maps: bool | None = None,
        channels: int = 512,
        skips: Sequence[int] = (),
        drop_rate: float = 0.1,
        **kn_args: Any,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: use one of {', '.join(NORMS)}")
        if kn_args and norm != "kernel":
            raise TypeError(f"norm={norm!r} takes no {', '.join(kn_args)}: use norm='kernel'")
        raw_maps = norm == "kernel" if raw_maps is None else raw_maps
        info: Any = backbone.feature_info
        reductions, widths = info.reduction(), info.channels()
        self.num_classes, self.norm = num_classes, norm
        self.reduction = reductions[-1]  # side of a pixel of the last map, in pixels of the input
        self.backbone = backbone
        head = partial(
            FCNHead,
            num_classes=num_classes,
            norm=norm,
            raw_maps=raw_maps,
            drop_rate=drop_rate,
            **kn_args,
        )
        self.head = head(in_chs=widths[-1], chs=channels)
        self.taps = tuple(_tap(reductions, skip) for skip in sorted(skips, reverse=True))
        self.skips = nn.ModuleList(head(in_chs=widths[tap], chs=widths[tap]) for tap in self.taps)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores (N, num_classes, H, W) of images (N, C, H, W)."""
        height, width = x.shape[-2:]
        rows, columns = (-side % self.reduction for side in (height, width))
        x = pad(x, (0, columns, 0, rows))
        maps = self.backbone(x)
        scores = self.head(maps[-1])
        for tap, head in zip(self.taps, self.skips, strict=True):
            finer = head(maps[tap])
            scores = finer + resize_scores(scores, finer.shape[-2:])
        return resize_scores(scores, x.shape[-2:])[..., :height, :width]


def resize_scores(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Resize scores (N, K, h, w) to `size`, bilinearly."""
    if scores.shape[-2:] == tuple(size):
        return scores
    return interpolate(scores, list(size), mode="bilinear", align_corners=False)


def _tap(reductions: Sequence[int], skip: int) -> int:
    """Return the index of the last map with reduction `skip`, finer than the backbone's last."""
    finer = [r for r in reductions if r < reductions[-1]]
    if skip not in finer:
        raise ValueError(f"skip from reduction {skip}: this backbone has {sorted(set(finer))}")
    return len(finer) - 1 - finer[::-1].index(skip)
