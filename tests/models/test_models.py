"""The networks against the authors' numbers, and as models of timm. See also timm_suite.py."""

import argparse
import json
import math
import pickle
import re
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import nn

import kn_zoo
from kn_zoo.layers import KernelNorm2d, KNConv2d, LocalContextNorm

OURS = sorted(
    name
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__.startswith("kn_zoo.")
)
KERNEL = [name for name in OURS if name.startswith("kn")]
BASELINES = [name for name in OURS if not name.startswith("kn")]
SMALL = [
    "knpreactresnet20_cifar",
    "knresnet18_cifar",
    "knresnet8_cifar",
    "knresnet13_cifar",
    "kndensenet20x16_cifar",
]
FIXTURES = {
    "densenet20x16_kn": ("kndensenet20x16_cifar", {}),
    "knconvnext_tiny": ("knconvnext_tiny", {}),
    "knresnet18": ("knresnet18", {}),
    "knresnet18_lowres": ("knresnet18_cifar", {}),
    "knresnet34": ("knresnet34", {}),
    "knresnet34_lowres": ("knresnet34_cifar", {}),
    "knresnet50": ("knresnet50", {}),
    "knresnet50_lowres": ("knresnet50_cifar", {}),
    "preact_resnet18_kn": ("knpreactresnet18_cifar", {}),
    "preact_resnet18_kn_mish": ("knpreactresnet18_cifar", {"act_layer": "mish"}),
    "resnet13_kn": ("knresnet13_cifar", {}),
    "resnet8_kn": ("knresnet8_cifar", {}),
}


def create(architecture: str, **kwargs: Any) -> Any:
    """`timm.create_model` for mypy, which knows nothing of a network but that it is a module."""
    return timm.create_model(architecture, **kwargs)


def published(path: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return state dict (the authors' keys), input and logits of a fixture, in float64."""
    stored = np.load(path)
    salt, state_dict = str(stored["salt"]), {}
    for key, shape in json.loads(str(stored["state_dict"])):
        random = np.random.RandomState(zlib.crc32((salt + key).encode()))
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        state_dict[key] = torch.from_numpy(random.standard_normal(shape) * scale)
    random = np.random.RandomState(int(stored["input_seed"]))
    x = torch.from_numpy(random.standard_normal(tuple(stored["input_shape"])))
    return state_dict, x, torch.from_numpy(stored["logits"])


def sized(size: tuple[int, int], model: Any) -> torch.Tensor:
    """Return a random image (1, C, *size) of the model's device and dtype."""
    like = next(model.parameters())
    return torch.randn(1, model.in_chans, *size, device=like.device, dtype=like.dtype)


@pytest.mark.parametrize("fixture", FIXTURES)
def test_logits_are_the_published_codes(fixture: str, upstream: Path) -> None:
    architecture, arguments = FIXTURES[fixture]
    state_dict, x, logits = published(upstream / f"{fixture}.npz")
    model = create(
        architecture,
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=state_dict, num_classes=logits.shape[1]),
        num_classes=logits.shape[1],
        inference_statistics="plain",
        dtype=torch.float64,
        **arguments,
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-9)
        logits_float32 = model.float()(x.float()).double()
    torch.testing.assert_close(logits_float32, logits, rtol=0, atol=1e-4)


def test_every_fixture_is_tested(upstream: Path) -> None:
    stored = {path.stem for path in upstream.glob("*.npz")} - {"layers"}
    assert stored == set(FIXTURES)


@pytest.mark.parametrize("fixture", ["resnet8_kn", "preact_resnet18_kn"])
def test_authors_checkpoint_loads_as_it_is(fixture: str, upstream: Path, tmp_path: Path) -> None:
    """A checkpoint of float32 tensors, optimizer state and an argparse.Namespace."""
    state_dict, x, logits = published(upstream / f"{fixture}.npz")
    state_dict = {key: value.float() for key, value in state_dict.items()}
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    checkpoint = dict(
        model=state_dict,
        optimizer=optimizer.state_dict(),
        lr_scheduler=dict(last_epoch=99, _last_lr=[1e-4]),
        epoch=99,
        args=argparse.Namespace(model="knresnet18", lr=0.1, data_path="/data"),
    )
    path = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, path)
    model = create(
        FIXTURES[fixture][0],
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(path), num_classes=10),
        inference_statistics="plain",
    ).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(x.float()).double(), logits, rtol=0, atol=1e-4)
    assert "state_dict" not in model.pretrained_cfg


class Payload:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    path, harm = tmp_path / "checkpoint.pth", tmp_path / "harm"
    torch.save(dict(model={}, args=Payload(harm)), path)
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match=r"(?i)weights.only"):
        create("knresnet8_cifar", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    assert not harm.exists()


@pytest.mark.parametrize("architecture", SMALL)
def test_own_checkpoint_fits_other_channels_and_classes(architecture: str, tmp_path: Path) -> None:
    model = create(architecture, in_chans=3)
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    overlay = dict(file=str(path), input_size=(3, 32, 32))
    adapted = create(
        architecture, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=7
    )
    stem = model.pretrained_cfg["first_conv"] + ".weight"
    before, after = model.state_dict(), adapted.state_dict()
    torch.testing.assert_close(after[stem], before[stem].sum(1, keepdim=True))
    assert adapted(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    others = [key for key in before if key != stem and not key.startswith("head.fc")]
    assert others and all(torch.equal(before[key], after[key]) for key in others)
    backbone = create(
        architecture, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True
    )
    kept = backbone.state_dict()
    assert kept and all(torch.equal(kept[k], before[k.removeprefix("model.")]) for k in kept)


# Measured with the published code.
PARAMETERS = {
    "knresnet18": 11_685_220,
    "knresnet34": 21_792_830,
    "knresnet50": 25_556_390,
    "knresnet18_cifar": 11_215_840,
    "knresnet34_cifar": 21_323_450,
    "knresnet50_cifar": 23_681_570,
    "knconvnext_tiny": 28_587_784,
}


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_number_of_parameters(architecture: str) -> None:
    model = create(architecture, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[architecture]


def test_every_model_is_registered() -> None:
    sizes = (18, 34, 50)
    expected = {f"{family}{n}" for family in ("knresnet", "knpreactresnet") for n in sizes}
    expected |= {f"{name}_cifar" for name in expected}
    expected |= {f"preactresnet{n}{suffix}" for n in sizes for suffix in ("", "_cifar")}
    expected |= {f"resnet{n}_cifar" for n in sizes}
    expected |= {"knpreactresnet20_cifar", "preactresnet20_cifar", "knconvnext_tiny"}
    expected |= {"kndensenet20x16_cifar", "knresnet8_cifar", "knresnet13_cifar"}
    assert set(OURS) == expected


def shallow(architecture: str, **kwargs: Any) -> Any:
    """Return a network of one block per stage, on the meta device unless `kwargs` name another."""
    stages = 3 if "20" in architecture else 4
    argument = "layers" if architecture.startswith("resnet") else "depths"
    fixed = architecture.startswith(("knresnet8", "knresnet13"))
    if not fixed:
        kwargs[argument] = (1,) * stages
    return create(architecture, **{"device": "meta", **kwargs}).eval()


META: dict[str, Any] = {name: create(name, device="meta").eval() for name in OURS}
SHALLOW: dict[str, Any] = {name: shallow(name) for name in OURS}


def smallest(model: nn.Module, needs: Callable[[torch.Tensor], Any]) -> int:
    """Return the side that the error names if `needs(x)` is called with an image of one pixel."""
    with pytest.raises(ValueError, match=r"at least (\d+)x\1 ?") as caught:
        needs(sized((1, 1), model))
    match = re.search(r"at least (\d+)x", str(caught.value))
    assert match is not None
    return int(match[1])


@pytest.mark.parametrize("architecture", OURS)
def test_smallest_input_works_and_one_pixel_less_is_refused(architecture: str) -> None:
    model = SHALLOW[architecture]
    for needs in (model, lambda x: model.forward_intermediates(x, intermediates_only=True)):
        side = smallest(model, needs)
        needs(sized((side, side), model))
        needs(sized((side, side + 5), model))
        for size in ((side - 1, side), (side, side - 1)):
            with pytest.raises(ValueError, match=f"at least {side}x{side}"):
                needs(sized(size, model))


def test_smallest_input_gives_numbers() -> None:
    model = create("knresnet18_cifar").eval()
    with torch.inference_mode():
        assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize("architecture", OURS)
@given(extra=st.tuples(st.integers(0, 150), st.integers(0, 150)))
@example(extra=(0, 0))
@settings(max_examples=10, deadline=None)
def test_reductions_are_honest_at_every_size(architecture: str, extra: tuple[int, int]) -> None:
    """A map of a classifier has the size of the input over its reduction, rounded up or down.

    The last map of an ImageNet KNResNet-18 or -34 is one pixel larger.
    """
    model = SHALLOW[architecture]
    features = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    side = smallest(model, lambda x: model.forward_intermediates(x, intermediates_only=True))
    size = (side + extra[0], side + extra[1])
    maps = model.forward_intermediates(sized(size, model), intermediates_only=True)
    assert len(maps) == len(features.info)
    for i, (feature_map, info) in enumerate(zip(maps, features.info, strict=True)):
        assert feature_map.shape[1] == info["num_chs"]
        model.get_submodule(info["module"])
        wider = architecture in ("knresnet18", "knresnet34") and i == len(maps) - 1
        for pixels, length in zip(size, feature_map.shape[2:], strict=True):
            exact = pixels / info["reduction"]
            assert math.floor(exact) <= length <= math.ceil(exact) + wider


@pytest.mark.parametrize("architecture", KERNEL)
def test_features_only_follows_out_indices(architecture: str) -> None:
    backbone = create(architecture, device="meta", features_only=True, out_indices=(0, -1))
    maps = backbone(sized((96, 64), backbone.model))
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    assert backbone.feature_info.reduction()[-1] == META[architecture].feature_info[-1]["reduction"]


@pytest.mark.parametrize(
    "architecture, output_stride, size",
    [
        ("knpreactresnet20_cifar", 1, (16, 24)),
        ("knpreactresnet20_cifar", 2, (16, 24)),
        ("knresnet18_cifar", 2, (32, 16)),
        ("knresnet50_cifar", 4, (16, 32)),
        ("knresnet18", 16, (128, 160)),
        ("knresnet8_cifar", 1, (16, 24)),
        ("knresnet13_cifar", 2, (16, 24)),
        ("knconvnext_tiny", 8, (64, 32)),
        ("kndensenet20x16_cifar", 1, (16, 24)),
        ("kndensenet20x16_cifar", 2, (16, 24)),
    ],
)
def test_dilated_maps_contain_the_strided_ones(
    architecture: str, output_stride: int, size: tuple[int, int]
) -> None:
    """Where the input is a multiple of the reduction, dilation computes more, and nothing else."""
    torch.manual_seed(0)
    strided = create(architecture, dtype=torch.float64).eval()
    dilated = create(architecture, dtype=torch.float64, output_stride=output_stride)
    dilated.load_state_dict(strided.state_dict())
    x = sized(size, strided)
    with torch.inference_mode():
        few, maps = strided.forward_intermediates(x)
        many, dense_maps = dilated.eval().forward_intermediates(x)
    steps = [
        s["reduction"] // d["reduction"]
        for s, d in zip(strided.feature_info, dilated.feature_info, strict=True)
    ]
    assert steps[-1] > 1 and dilated.feature_info[-1]["reduction"] == output_stride
    for strided_map, dense_map, step in zip(maps, dense_maps, steps, strict=True):
        torch.testing.assert_close(dense_map[..., ::step, ::step], strided_map)
        assert dense_map.shape[2:] == tuple(step * n for n in strided_map.shape[2:])
    step = steps[-1] * (1 if type(dilated.neck) is nn.Identity else 2)  # a neck halves once more
    last = many[..., ::step, ::step][..., : few.shape[2], : few.shape[3]]
    torch.testing.assert_close(last, few)


@pytest.mark.parametrize("architecture", OURS)
def test_wrong_output_stride_is_refused(architecture: str) -> None:
    with pytest.raises((ValueError, AssertionError), match="output_stride"):
        create(architecture, device="meta", output_stride=3)


@pytest.mark.parametrize("architecture", OURS)
def test_unknown_argument_is_a_type_error(architecture: str) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        create(architecture, device="meta", no_such_argument=1)


def test_wrong_names_are_refused_with_the_right_ones() -> None:
    with pytest.raises(ValueError, match="batch"):
        create("preactresnet18_cifar", norm="instance")
    with pytest.raises(ValueError, match="batch"):
        create("resnet18_cifar", norm="kernel")
    with pytest.raises(ValueError, match="use knpreactresnet18_cifar"):
        create("preactresnet18_cifar", norm="kernel")
    with pytest.raises(TypeError, match="use preactresnet18_cifar"):
        create("knpreactresnet18_cifar", norm="batch")
    with pytest.raises(TypeError, match="dropout_p"):
        create("preactresnet18_cifar", dropout_p=0.1)
    for name in ("weight_standardization", "stem_norm"):
        with pytest.raises(TypeError, match=name):
            create("preactresnet18_cifar", **{name: True})
    with pytest.raises(ValueError, match="relu"):
        create("knresnet18_cifar", act_layer="mishh")
    with pytest.raises(ValueError, match="expected"):
        create("knresnet18_cifar", inference_statistics="mean")


@pytest.mark.parametrize("architecture", KERNEL)
def test_model_arguments_reach_every_layer(architecture: str) -> None:
    model = create(
        architecture,
        device="meta",
        dropout_p=0.02,
        inference_statistics="sampled",
        act_layer="mish",
    )
    convolutions = [m for m in model.modules() if isinstance(m, KNConv2d)]
    norms = [m for m in model.modules() if isinstance(m, KernelNorm2d)]
    assert convolutions and {m.dropout_p for m in convolutions} == {0.02}
    assert {m.inference_statistics for m in [*convolutions, *norms]} == {"sampled"}
    last_p = 0.05 if architecture == "knresnet8_cifar" else 0.1
    assert [m.dropout_p for m in norms] == ([] if "convnext" in architecture else [last_p])
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())
    kn_zoo.set_inference_statistics(model, "plain")
    assert {m.inference_statistics for m in [*convolutions, *norms]} == {"plain"}


@pytest.mark.parametrize("architecture", ["knresnet18_cifar", "knpreactresnet20_cifar"])
def test_weight_standardization_reaches_every_layer(architecture: str) -> None:
    model = create(architecture, weight_standardization=True).eval()
    assert all(m.gain is not None for m in model.modules() if isinstance(m, KNConv2d))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(kn_zoo.freeze(model)(x), model(x), rtol=1e-3, atol=1e-4)
    plain = create(architecture)
    assert not any("gain" in name for name in plain.state_dict())


@pytest.mark.parametrize("architecture", ["knresnet18", "knpreactresnet20_cifar"])
def test_the_stem_can_be_an_ordinary_convolution(architecture: str) -> None:
    model, paper = create(architecture, stem_norm=False), create(architecture)
    assert type(model.stem) is nn.Conv2d and isinstance(paper.stem, KNConv2d)
    assert list(model.state_dict()) == list(paper.state_dict())
    model.load_state_dict(paper.state_dict())
    x = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(model.eval().stem(2 * x), 2 * model.stem(x))
    assert model(x).shape == paper(x).shape


@pytest.mark.parametrize("architecture", KERNEL)
def test_default_dropout_is_the_published_one(architecture: str) -> None:
    small = ("knresnet8", "knresnet13", "kndensenet", "knconvnext")
    model = META[architecture]
    p = {m.dropout_p for m in model.modules() if isinstance(m, KNConv2d)}
    last_p = [m.dropout_p for m in model.modules() if isinstance(m, KernelNorm2d)]
    assert p == {0.1 if architecture.startswith(small) else 0.05}
    if "convnext" not in architecture:
        half = architecture.startswith(("knresnet13", "kndensenet"))
        assert last_p == [0.5 if half else 0.25]


@pytest.mark.parametrize("architecture", OURS)
def test_device_and_dtype_reach_every_parameter(architecture: str) -> None:
    model = create(architecture, device="meta", dtype=torch.bfloat16)
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("architecture", OURS)
def test_classifier_and_pooling_can_be_exchanged(architecture: str) -> None:
    none = create(architecture, device="meta", num_classes=0, global_pool="")
    assert type(none.get_classifier()) is nn.Identity and none.num_classes == 0
    model = SHALLOW[architecture]
    x = sized((96, 112), model)
    model.reset_classifier(0)
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    width = model.forward_head(features, pre_logits=True).shape[1]
    assert model(x).shape == (1, width) and width == model.head_hidden_size
    model.reset_classifier(5)
    assert model(x).shape == (1, 5) and model.get_classifier().out_features == 5
    model.reset_classifier(4, "max")
    assert model(x).shape == (1, 4)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(3, "avg")


@pytest.mark.parametrize("architecture", OURS)
def test_layer_decay_grows_from_the_classifier_to_the_stem(architecture: str) -> None:
    model = META[architecture]
    groups = param_groups_layer_decay(model, layer_decay=0.9)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    stem = scale[id(next(model.parameters()))]
    stages = [
        max(scale[id(p)] for p in model.get_submodule(info["module"]).parameters())
        for info in model.feature_info
        if any(True for _ in model.get_submodule(info["module"]).parameters())
    ]
    head = scale[id(model.get_classifier().weight)]
    assert head == 1.0 > stem
    assert all(a <= b for a, b in pairwise([stem, *stages, head])) and stages[0] < stages[-1]


@pytest.mark.parametrize("architecture", [n for n in KERNEL if "densenet" not in n])
def test_stochastic_depth_grows_linearly(architecture: str) -> None:
    model = create(architecture, device="meta", drop_path_rate=0.3)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    steps = [b - a for a, b in pairwise([0.0, *rates])]
    assert rates[-1] == pytest.approx(0.3)
    assert all(step == pytest.approx(steps[0], rel=1e-4) for step in steps)


@pytest.mark.parametrize("architecture", SMALL)
def test_checkpointing_changes_no_gradient(architecture: str) -> None:
    """The recomputed forward pass draws the same dropout masks."""
    torch.manual_seed(0)
    model = create(architecture, num_classes=3).train()
    x = torch.cat([sized((16, 16), model), sized((16, 16), model)])
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("architecture", SMALL)
def test_gradient_is_the_slope(architecture: str) -> None:
    """Central differences: no saved tensor is overwritten in place."""
    torch.manual_seed(0)
    model = create(
        architecture, num_classes=3, act_layer="mish", dropout_p=0.0, dtype=torch.float64
    ).train()
    x = sized((16, 16), model)
    model(x).sum().backward()
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) / math.sqrt(p.numel()) for p in parameters]
    products = [(p.grad * d).sum() for p, d in zip(parameters, directions, strict=True)]
    slope = torch.stack(products).sum()
    values = []
    with torch.no_grad():
        for step in (1e-7, -2e-7):  # small: maxima change hands
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            values.append(model(x).sum())
    torch.testing.assert_close((values[0] - values[1]) / 2e-7, slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", BASELINES)
def test_baselines_differ_in_their_norm_only(architecture: str) -> None:
    shapes = {}
    layers: dict[str, Any] = dict(
        batch=nn.BatchNorm2d,
        group=nn.GroupNorm,
        layer=nn.GroupNorm,
        local_context=LocalContextNorm,
        none=(),
    )
    for norm, layer in layers.items():
        model = create(architecture, device="meta", norm=norm)
        every_norm = (nn.BatchNorm2d, nn.GroupNorm, LocalContextNorm)
        norms = [m for m in model.modules() if isinstance(m, every_norm)]
        assert bool(norms) == (norm != "none") and all(isinstance(m, layer) for m in norms)
        if norm == "layer":
            assert {m.num_groups for m in norms} == {1}
        if norm == "group":
            assert all(m.num_groups == min(32, len(m.weight) // 2) for m in norms)
        if norm == "local_context":
            window = 16 if architecture.endswith("_cifar") else 227
            assert {m.window_size for m in norms} == {(window, window)}
            assert {m.channels_per_group for m in norms} == {2}
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert {m.bias is not None for m in convolutions} == {norm == "none"}
        shapes[norm] = [m.weight.shape for m in convolutions]
        assert model(sized((64, 64), model)).shape == (1, model.num_classes)
    assert all(shape == shapes["batch"] for shape in shapes.values())
