"""A network frozen for inference: every KNConv one convolution with zero-mean filters."""

import copy
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from .modules import FrozenKNConv, KNConv1d, KNConv2d, KNConv3d

LAYERS = (KNConv1d, KNConv2d, KNConv3d)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def freeze(model: nn.Module) -> nn.Module:
    """Return a copy of `model` for inference only, ready for torch.export, ONNX and torch.compile.

    Its outputs are those of `model.eval()` to about 1e-5, except that inputs are not shifted in
    float32: an input whose |mean| is 1000 std loses four digits. Raises ValueError when `model`
    holds no KNConv layer, or one that cannot be frozen without a change of what it does: "sampled"
    statistics, hooks, pruned or parametrized weights, a subclass.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no KNConv layer to freeze")
    if reasons := list(_reasons(model)):
        raise ValueError("cannot freeze " + "; ".join(reasons))
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(frozen, LAYERS):
        return FrozenKNConv(frozen)
    made: dict[nn.Module, FrozenKNConv] = {}  # a layer used in two places is frozen once
    for module in list(frozen.modules()):
        for name, child in module._modules.items():
            if isinstance(child, LAYERS):
                if child not in made:
                    made[child] = FrozenKNConv(child)
                module._modules[name] = made[child]
    return frozen


def _reasons(model: nn.Module) -> Iterator[str]:
    """Yield why `model` cannot be frozen, a clause with the remedy for each layer."""
    for path, module in model.named_modules():
        name = path or type(model).__name__
        hooks = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
        if any(isinstance(hook, BasePruningMethod) for hook in hooks):
            yield f"{name}, which is pruned: first call torch.nn.utils.prune.remove on it"
        elif not isinstance(module, LAYERS):
            continue
        elif parametrize.is_parametrized(module):
            yield (
                f"{name}, which is parametrized: first call "
                "torch.nn.utils.parametrize.remove_parametrizations on it"
            )
        elif type(module) not in LAYERS:
            yield f"{name}, a {type(module).__name__}, whose forward may differ: use KNConv layers"
        elif hooks:
            yield f"{name}, which has hooks: remove them first"
        elif module.inference_statistics == "sampled":
            yield (
                f'{name}, whose statistics are "sampled": first call '
                'kn_zoo.set_inference_statistics(model, "expected")'
            )
