"""Frozen networks: the same outputs from one convolution a layer, and what they are for."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import kn_zoo
from kn_zoo.layers import FrozenKNConv2d, KNConv2d


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("knpreactresnet20_cifar", num_classes=10, in_chans=3, **kwargs).eval()


@pytest.mark.parametrize("statistics", ["expected", "plain"])
def test_same_outputs(statistics: Any) -> None:
    model = network(inference_statistics=statistics)
    before = copy.deepcopy(model.state_dict())
    frozen = kn_zoo.freeze(model)
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, KNConv2d) for m in frozen.modules())
    assert sum(isinstance(m, FrozenKNConv2d) for m in frozen.modules()) == 21
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "model is intact"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [1, (1, 0, 2, 1)])
def test_single_layer(groups: Any, padding: Any) -> None:
    layer = KNConv2d(4, 6, 3, 2, padding, groups=groups, dropout_p=0.2).double().eval()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(kn_zoo.freeze(layer)(x), layer(x), rtol=1e-10, atol=1e-10)


def test_compile_and_export(tmp_path: Any) -> None:
    model = network()
    frozen = kn_zoo.freeze(model)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(frozen, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        program = torch.export.export(frozen, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
    convolutions = [n for n in program.graph.nodes if "aten.conv2d" in str(n.target)]
    assert len(convolutions) == 21, "one convolution a layer"


def test_onnx(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = network()
    frozen = kn_zoo.freeze(model)
    path, x = tmp_path / "model.onnx", torch.rand(3, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(frozen, (x,), path, dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 32, 32)
    (actual,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(actual), model(images), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="no KNConv layer"):
        kn_zoo.freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="set_inference_statistics"):
        kn_zoo.freeze(network(inference_statistics="sampled"))


class Doubled(KNConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked() -> KNConv2d:
    layer = KNConv2d(3, 4, 3)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return layer


def test_layers_that_would_change_are_refused_by_name() -> None:
    pruned, parametrized = KNConv2d(3, 4, 3), KNConv2d(3, 4, 3)
    prune.l1_unstructured(pruned, "weight", 0.5)
    parametrizations.weight_norm(parametrized)
    layers = {
        r"cannot freeze stem, which has hooks: remove": hooked(),
        r"cannot freeze stem, a Doubled": Doubled(3, 4, 3),
        r"cannot freeze stem, which is pruned: .*prune.remove": pruned,
        r"cannot freeze stem, which is parametrized: .*remove_parametrizations": parametrized,
    }
    for message, layer in layers.items():
        model = nn.Sequential(OrderedDict(stem=layer, body=KNConv2d(4, 4, 1))).eval()
        with pytest.raises(ValueError, match=message):
            kn_zoo.freeze(model)
    with pytest.raises(ValueError, match=r"stem.*; last, which is pruned"):
        last = prune.random_unstructured(nn.Conv2d(4, 4, 1), "weight", 0.5)
        kn_zoo.freeze(nn.Sequential(OrderedDict(stem=hooked(), last=last)))

    prune.remove(pruned, "weight")
    parametrize.remove_parametrizations(parametrized, "weight")
    x = torch.randn(1, 3, 6, 5)
    for layer in (pruned.eval(), parametrized.eval()):
        torch.testing.assert_close(kn_zoo.freeze(layer)(x), layer(x), rtol=1e-5, atol=1e-5)


def test_hooks_of_other_modules_are_kept() -> None:
    model = nn.Sequential(KNConv2d(3, 4, 3), nn.ReLU()).eval()
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(1, 3, 6, 5)
    torch.testing.assert_close(kn_zoo.freeze(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_layer_used_twice_is_frozen_once() -> None:
    shared = KNConv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.ReLU())).eval()
    frozen = kn_zoo.freeze(model)
    assert isinstance(frozen[0], FrozenKNConv2d)
    assert frozen[0] is frozen[2][0]
    x = torch.randn(1, 4, 6, 5)
    torch.testing.assert_close(frozen(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_frozen_model_keeps_its_statistics() -> None:
    frozen = kn_zoo.freeze(network())
    with pytest.raises(
        ValueError, match=r"is frozen.*set_inference_statistics.*before kn_zoo.freeze"
    ):
        kn_zoo.set_inference_statistics(frozen, "plain")
