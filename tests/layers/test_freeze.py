"""Frozen networks: the same outputs from one convolution a layer, and what they are for."""

import copy

import pytest
import timm
import torch
from torch import nn

import kn_zoo
from kn_zoo.layers import FrozenKNConv2d, KNConv2d


def network(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("knpreactresnet20_cifar", num_classes=10, in_chans=3, **kwargs).eval()


@pytest.mark.parametrize("statistics", ["expected", "plain"])
def test_same_outputs(statistics):
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
def test_single_layer(groups, padding):
    layer = KNConv2d(4, 6, 3, 2, padding, groups=groups, dropout_p=0.2).double().eval()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(kn_zoo.freeze(layer)(x), layer(x), rtol=1e-10, atol=1e-10)


def test_compile_and_export(tmp_path):
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


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = network()
    frozen = kn_zoo.freeze(model)
    path, x = tmp_path / "model.onnx", torch.rand(3, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(frozen, (x,), path, dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 32, 32)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_frozen():
    with pytest.raises(ValueError, match="no KNConv layer"):
        kn_zoo.freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="set_inference_statistics"):
        kn_zoo.freeze(network(inference_statistics="sampled"))
