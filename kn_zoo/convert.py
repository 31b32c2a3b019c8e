"""Convert a convolutional network to kernel normalization.

A kernel-normalized convolution normalizes its own input, window by window. So every dense
convolution with a norm directly after it (ResNet) or directly before it (pre-activation ResNet,
DenseNet) becomes a `KNConv2d`, and the norm goes. The order of operations comes from a trace by
torch.fx or, if the model cannot be traced, from the order in which its modules were registered and
the channels that each of them takes.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table
from timm import layers as timm_layers
from timm.layers import activations, activations_me, get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.nn.modules import activation, dropout, padding, pooling, upsampling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from kn_zoo import layers

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# The kernel-normalized convolution and norm of each kind of convolution.
KERNEL_NORMALIZED: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.Conv2d: (layers.KNConv2d, layers.KernelNorm2d),
    nn.Conv3d: (layers.KNConv3d, layers.KernelNorm3d),
}
KERNEL_LAYERS = tuple(layer for pair in KERNEL_NORMALIZED.values() for layer in pair)
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    FrozenBatchNorm2d,
    timm_layers.FrozenBatchNormAct2d,
)
NORMS = (
    *BATCH_NORMS,
    nn.GroupNorm,
    LayerNorm2d,
    timm_layers.LayerNorm2d,
    timm_layers.LayerNorm2dFp32,
    timm_layers.LayerNormAct2d,
    timm_layers.LayerNormAct2dFp32,
)

# Operations with one input between a convolution and a norm, or between a norm and a convolution:
# classes, modules that define classes, and functions.
PASSING_CLASSES = (
    nn.Identity,
    StochasticDepth,
    timm_layers.BlurPool2d,
    timm_layers.DropBlock2d,
    timm_layers.DropPath,
)
PASSING_MODULES = {
    m.__name__
    for m in (activation, dropout, padding, pooling, upsampling, activations, activations_me)
}
ACTIVATIONS = "relu relu_ relu6 gelu silu mish hardswish hardtanh leaky_relu elu selu sigmoid tanh"
OTHERS = "hardsigmoid dropout dropout2d contiguous clone to float pad interpolate max_pool2d"
PASSING_FUNCTIONS = {*ACTIVATIONS.split(" "), *OTHERS.split(" "), "avg_pool2d", "max_pool3d"}
MERGES = {"add", "iadd", "cat", "concat", "mul", "imul"}
HEAD_CLASSES = (nn.Linear, nn.ConvTranspose2d, nn.ConvTranspose3d, *CONVOLUTIONS)
HEAD_FUNCTIONS = {"mean", "amax", "flatten", "view", "reshape", "linear"}
SIZES = {"getattr", "size"}  # they read no values
BEFORE_HEAD = "before the head"


class Action(NamedTuple):
    """Replacement, or not, of a convolution or a norm."""

    kind: str  # "convert", "remove", "kernel norm" or "keep"
    reason: str


def convert(
    model: ModuleT,
    dropout_p: float = 0.05,
    *,
    skip: str | Iterable[str] = (),
    grouped: bool = False,
    keep_weights: bool = False,
    dropout: str = "mask",
    verbose: bool = True,
) -> ModuleT:
    """Return a copy of `model` with kernel-normalized convolutions in place of norms.

    A convolution next to BatchNorm, GroupNorm or LayerNorm2d becomes a `KNConv2d` with a bias, and
    the norm becomes its activation, or `nn.Identity` if it has none. The BatchNorm of a convolution
    that stays becomes a `KernelNorm2d` of single pixels; other norms of such convolutions stay. If
    the head (global pooling, or the last layer) would read maps that no layer normalizes, a
    `KernelNorm2d` is put before it. All other layers keep their weights.

    Args:
        model: a CNN of timm, torchvision or segmentation_models_pytorch, or your own.
        dropout_p: probability of the dropout in the statistics; five times that, up to 0.25, in the
            `KernelNorm2d` before the head, as in the networks of the paper.
        skip: names of modules that stay as they are, with all that they contain; `*` and `?` are
            wildcards. A convolution that is skipped keeps its norm.
        grouped: convert grouped and depthwise convolutions too.
        keep_weights: keep the weights of converted convolutions. By default they are drawn anew:
            Kaiming normal (fan out, ReLU), with zero biases.
        dropout: "mask" or "gaussian", see `KNConv2d`.
        verbose: print a table of what was done.

    Raises:
        ValueError: there is nothing to convert, or the order of operations, the kind of a layer or
            its hooks leave open what to do. The message names the module and what to change.
    """
    model = copy.deepcopy(model)
    plan = _Plan(model, [skip] if isinstance(skip, str) else list(skip), grouped)
    factory = _Factory(dropout_p, dropout, keep_weights)
    replacements = dict(_replacements(plan, factory))
    rows = list(_rows(plan, replacements))
    for name in plan.normed_stages:
        stage: Any = plan.modules[name]
        stage.add_module("kernel_norm", factory.norm(plan.dims, head=True).train(stage.training))
    for parent in list(model.modules()):
        for key, child in parent._modules.items():  # every use of a shared module
            if child in replacements:
                parent._modules[key] = replacements[child].train(child.training)
    _refuse_batch_statistics(model, plan)
    if verbose:
        _print_table(f"{type(model).__name__}, {plan.order}", rows)
    return model


def _replacements(plan: "_Plan", factory: "_Factory") -> Iterator[tuple[nn.Module, nn.Module]]:
    for name, action in plan.actions.items():
        old = plan.modules[name]
        if action.kind == "convert":
            yield old, factory.conv(old)
        elif action.kind == "remove":
            yield old, _sequential(*_activation(old))
        elif action.kind == "kernel norm":
            norm = factory.norm(plan.dims, head=action.reason == BEFORE_HEAD)
            yield old, _sequential(norm, *_activation(old))
    for name in plan.normed_inputs:
        old = plan.modules[name]
        rest = () if isinstance(old, nn.Identity) else (old,)
        yield old, _sequential(factory.norm(plan.dims, head=True), *rest)


class _Factory(NamedTuple):
    """Makes kernel-normalized layers."""

    dropout_p: float
    dropout: str
    keep_weights: bool

    def conv(self, old: Any) -> nn.Module:
        kind = next(kind for kind in KERNEL_NORMALIZED if isinstance(old, kind))
        new = KERNEL_NORMALIZED[kind][0](
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            old.stride,
            tuple(old._reversed_padding_repeated_twice),  # (left, right, top, bottom, ...)
            old.dilation,
            old.groups,
            dropout_p=self.dropout_p,
            dropout=self.dropout,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        if self.keep_weights:
            new.weight = old.weight
        else:
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(new.bias)
        if self.keep_weights and old.bias is not None:
            new.bias = old.bias
        return new

    def norm(self, dims: type[nn.Module], head: bool) -> nn.Module:
        p = min(5 * self.dropout_p, 0.25) if head else self.dropout_p
        return KERNEL_NORMALIZED[dims][1](dropout_p=p, dropout=self.dropout)


def _activation(norm: nn.Module) -> Iterator[nn.Module]:
    """Dropout and activation that a norm of timm applies to its output."""
    for name in ("drop", "act"):
        part = getattr(norm, name, None)
        if isinstance(part, nn.Module) and not isinstance(part, nn.Identity):
            yield part


def _sequential(*parts: nn.Module) -> nn.Module:
    if len(parts) > 1:
        return nn.Sequential(*parts)
    return parts[0] if parts else nn.Identity()


class _Tracer(fx.Tracer):
    """Leaves norms with an activation, and all modules without children, in one piece."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)


def _is_leaf(module: nn.Module) -> bool:
    whole = (*NORMS, *CONVOLUTIONS, *KERNEL_LAYERS, *get_notrace_modules())
    return isinstance(module, whole) or next(module.children(), None) is None


def _trace(model: nn.Module) -> fx.Graph:
    """The operations of `model` in training mode, so that auxiliary classifiers are among them."""
    training = {module: module.training for module in model.modules()}
    try:
        return _Tracer().trace(model.train())
    finally:
        for module, flag in training.items():
            module.training = flag


def _module_order(model: nn.Module) -> fx.Graph:
    """A graph in which every module reads the one registered before it, if the channels fit."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    width: int | None = None
    leaf = ""
    for name, module in model.named_modules():
        if (leaf and name.startswith(f"{leaf}.")) or not _is_leaf(module):
            continue
        leaf = name
        takes = _channels(module, "in_channels", "in_features", "num_features", "num_channels")
        fits = None in (takes, width) or takes == width
        node = graph.call_module(name, (node,) if fits else ())
        width = _channels(module, "out_channels", "out_features") or takes or width
    graph.output(node)
    return graph


def _channels(module: nn.Module, *names: str) -> int | None:
    numbers = (getattr(module, name, None) for name in names)
    return next((number for number in numbers if isinstance(number, int)), None)


class _Plan:
    """The action of each convolution and norm of a model, and where a head needs a KernelNorm."""

    def __init__(self, model: nn.Module, skip: list[str], grouped: bool) -> None:
        self.modules = dict(model.named_modules())
        self.skip, self.grouped = skip, grouped
        for pattern in skip:
            if not any(_matches(name, pattern) for name in self.modules):
                raise ValueError(f"skip={pattern!r}: the model has no module of that name")
        try:
            self.graph, self.traced = _trace(model), True
        except Exception:  # a model's code may raise anything when it meets a proxy
            self.graph, self.traced = _module_order(model), False
        self.order = "traced by torch.fx" if self.traced else "in the order of its modules"
        self.actions: dict[str, Action] = {}
        self.normed_stages: list[str] = []  # a KernelNorm is appended to these nn.Sequential
        self.normed_inputs: list[str] = []  # a KernelNorm is put before these modules
        self._plan_norms()
        self._plan_convolutions_without_norm()
        converted = [self.modules[name] for name in self.names("convert")]
        if not converted:
            raise ValueError(
                f"{type(model).__name__} has nothing to convert: no dense Conv2d is followed or "
                "preceded by BatchNorm, GroupNorm or LayerNorm2d (see `skip` and `grouped`)"
            )
        self.dims: Any = nn.Conv3d if isinstance(converted[0], nn.Conv3d) else nn.Conv2d
        self._plan_heads()

    def names(self, kind: str) -> list[str]:
        return [name for name, action in self.actions.items() if action.kind == kind]

    def module(self, node: fx.Node) -> Any:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def operation(self, node: fx.Node) -> str:
        """The name of a function, a method or a module's class."""
        if node.op == "call_module":
            return type(self.module(node)).__name__
        return getattr(node.target, "__name__", str(node.target))

    def action(self, node: fx.Node) -> str | None:
        action = self.actions.get(str(node.target)) if node.op == "call_module" else None
        return action and action.kind

    def set_action(self, node: fx.Node, kind: str, reason: str) -> None:
        name = str(node.target)
        before = self.actions.setdefault(name, Action(kind, reason))
        if before.kind != kind:
            raise ValueError(
                f"{name!r} is called more than once, and its calls need different things "
                f"({before.kind}, {kind}): give each call a module of its own, or add it to skip"
            )
        if kind != "keep":
            _check_replaceable(name, self.modules[name])

    # Kinds of nodes.

    def is_norm(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), NORMS)

    def is_convolution(self, node: fx.Node) -> bool:
        module = self.module(node)
        return isinstance(module, CONVOLUTIONS) and not isinstance(module, KERNEL_LAYERS)

    def is_skipped(self, node: fx.Node) -> bool:
        return any(_matches(str(node.target), pattern) for pattern in self.skip)

    def is_candidate(self, node: fx.Node) -> bool:
        """Return whether a node is a convolution that may be converted."""
        dense = self.is_convolution(node) and (self.grouped or self.module(node).groups == 1)
        return dense and not self.is_skipped(node)

    def passes(self, node: fx.Node) -> bool:
        """Return whether a node has one input and neither normalizes it nor mixes channels."""
        module = self.module(node)
        if module is None:
            return self.operation(node) in PASSING_FUNCTIONS
        known = type(module).__module__ in PASSING_MODULES or isinstance(module, PASSING_CLASSES)
        return known and not _is_global_pool(module)

    def passes_or_merges(self, node: fx.Node) -> bool:
        return self.passes(node) or self.operation(node) in MERGES

    def is_last(self, node: fx.Node) -> bool:
        """Return whether only activations and resizing follow."""
        return {n.op for n in _nearest(node, _users, self.passes)} == {"output"}

    def is_head(self, node: fx.Node) -> bool:
        """Return whether a head may begin here: global pooling, or a layer not converted."""
        module = self.module(node)
        if self.action(node) == "convert":
            return False
        if module is None:
            return self.operation(node) in HEAD_FUNCTIONS
        return isinstance(module, HEAD_CLASSES) or _is_global_pool(module)

    def normalizes(self, node: fx.Node) -> bool:
        """Return whether the output of a node is normalized; a removed norm does nothing."""
        return self.action(node) != "remove" and "norm" in self.operation(node).lower()

    # Plans.

    def _plan_norms(self) -> None:
        waiting = []
        for norm in filter(self.is_norm, self.graph.nodes):
            sources = _nearest(norm, _inputs, self.passes)
            convolutions = [node for node in sources if self.is_convolution(node)]
            if self.is_skipped(norm) or any(map(self.is_skipped, convolutions)):
                self.set_action(norm, "keep", "skipped")
            elif convolutions and all(map(self.is_candidate, convolutions)):
                for convolution in convolutions:
                    self.set_action(convolution, "convert", "")
                self.set_action(norm, "remove", _normalizer(norm, convolutions))
            elif not self.traced and any(map(self.is_norm, sources)):
                raise ValueError(
                    f"{norm.target!r} follows another norm in the order of the model's modules, "
                    f"which torch.fx cannot trace: register it after its convolution, or skip it"
                )
            else:
                waiting.append((norm, bool(convolutions)))
        for norm, has_convolution in waiting:
            targets = _nearest(norm, _users, self.passes)
            ready = all(self.is_candidate(n) and not self.is_last(n) for n in targets)
            # The norm of a grouped convolution is the next one's, unless that has its own.
            free = not has_convolution or "convert" not in map(self.action, targets)
            if targets and ready and free:
                for convolution in targets:
                    self.set_action(convolution, "convert", "")
                self.set_action(norm, "remove", _normalizer(norm, targets))
            elif not isinstance(self.module(norm), BATCH_NORMS):
                self.set_action(norm, "keep", "does not depend on the batch")
            elif not self.traced and not norm.all_input_nodes:
                raise ValueError(
                    f"the order of the model's modules does not tell what {norm.target!r} "
                    "normalizes, and torch.fx cannot trace the model: skip it"
                )
            else:
                later = map(self.action, _reachable(norm, _users))
                reason = "its convolution stays" if has_convolution else "no convolution of its own"
                self.set_action(norm, "kernel norm", reason if "convert" in later else BEFORE_HEAD)

    def _plan_convolutions_without_norm(self) -> None:
        """Convert the readers of norms that are gone, such as the convolutions of an FPN."""
        for node in filter(self.is_candidate, self.graph.nodes if self.traced else ()):
            sources = _nearest(node, _inputs, self.passes_or_merges)
            if "remove" in map(self.action, sources) and not self.is_last(node):
                self.set_action(node, "convert", "")

    def _plan_heads(self) -> None:
        heads = set()
        for output in next(n for n in self.graph.nodes if n.op == "output").all_input_nodes:
            head = self._first_head(output)
            if head and head not in heads:
                heads.add(head)
                self._plan_head(head)

    def _first_head(self, output: fx.Node) -> fx.Node | None:
        """The first layer of a head on all paths from converted convolutions to an output."""
        raw = self._not_normalized()
        inside = {n for n in _reachable(output, _inputs, within=raw)} if output in raw else set()
        for node in self.graph.nodes:
            if node in inside and self.is_head(node):
                around = _reachable(output, _inputs, within=inside - {node})
                if "convert" not in map(self.action, around):
                    return node
        return None

    def _not_normalized(self) -> set[fx.Node]:
        """Nodes whose output comes from a KNConv without a norm in between."""
        raw: set[fx.Node] = set()
        for node in self.graph.nodes:
            converted = self.action(node) == "convert"
            carries = not self.normalizes(node) and self.operation(node) not in SIZES
            if converted or (carries and not raw.isdisjoint(node.all_input_nodes)):
                raw.add(node)
        return raw

    def _plan_head(self, head: fx.Node) -> None:
        """Put a KernelNorm as near to a head as the model has a place for it."""
        path = [head]  # backward from the head, as long as there is one input
        while path[-1] is head or self.passes(path[-1]):
            path.append(next(n for n in path[-1].all_input_nodes if n in self._not_normalized()))
        end = path[-1]
        pooled = self.is_head(head) and not isinstance(self.module(head), HEAD_CLASSES)
        if (
            self.action(end) == "remove"
            and self.is_called_once(end)
            and (self.traced or not pooled)
        ):
            self.actions[str(end.target)] = Action("kernel norm", BEFORE_HEAD)
            return
        for node in path[1:]:
            if stage := self._stage_that_ends(node):
                self.normed_stages.append(stage)
                return
        for node in sorted(path[:-1], key=lambda n: not isinstance(self.module(n), nn.Identity)):
            module = self.module(node)
            if module and self.is_called_once(node) and not list(module.parameters()):
                self.normed_inputs.append(str(node.target))
                return
        raise ValueError(
            f"no layer normalizes what {head.target!r} reads, and the model has no place for a "
            "KernelNorm2d: put an nn.Identity(), or a module that pools, before its head"
        )

    def is_called_once(self, node: fx.Node) -> bool:
        return sum(n.target == node.target for n in self.graph.nodes) == 1

    def _stage_that_ends(self, node: fx.Node) -> str | None:
        """Return the outermost nn.Sequential whose output a node is."""
        for name in _enclosing(node):
            ends = not any(name in _enclosing(user) for user in node.users)
            if name and ends and isinstance(self.modules[name], nn.Sequential):
                return name
        return None


def _normalizer(norm: fx.Node, convolutions: list[fx.Node]) -> str:
    """Name the convolutions that normalize in place of a norm, without the norm's parent."""
    parent = str(norm.target).rpartition(".")[0] + "."
    names = sorted({str(node.target).removeprefix(parent) for node in convolutions})
    return f"{' and '.join(names)} normalize{'s' if len(names) == 1 else ''}"


def _enclosing(node: fx.Node) -> list[str]:
    """Return the modules that contain an operation, the outermost first."""
    return [name for name, _ in node.meta.get("nn_module_stack", {}).values()]


def _inputs(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes


def _users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


Step = Callable[[fx.Node], list[fx.Node]]


def _nearest(start: fx.Node, step: Step, through: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """Return the nearest nodes of `start`, forward or backward, for which `through` is false."""
    passed: dict[fx.Node, bool] = {}  # a node, and whether to go on from it
    waiting = step(start)
    while waiting:
        node = waiting.pop()
        if node not in passed:
            passed[node] = through(node)
            waiting += step(node) if passed[node] else []
    return [node for node, goes_on in passed.items() if not goes_on]


def _reachable(start: fx.Node, step: Step, within: set[fx.Node] | None = None) -> set[fx.Node]:
    """`start` and the nodes after or before it; only those `within` a set, if there is one."""
    reached: set[fx.Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node not in reached and (within is None or node in within):
            reached.add(node)
            waiting += step(node)
    return reached


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")


def _is_global_pool(module: nn.Module) -> bool:
    return "Adaptive" in type(module).__name__ or "GlobalPool" in type(module).__name__


def _check_replaceable(name: str, module: Any) -> None:
    """Raise ValueError if a layer does more than its class, which a replacement would lose."""
    kind = type(module).__name__
    if is_parametrized(module):
        raise ValueError(f"{name!r} is parametrized: remove the parametrizations, or skip it")
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        raise ValueError(f"{name!r} has hooks, which would be lost: remove them, or skip it")
    if isinstance(module, NORMS):
        if type(module).forward.__module__.split(".")[0] not in ("torch", "timm", "torchvision"):
            raise ValueError(f"{name!r}: what {kind} does besides normalizing is unknown: skip it")
        return
    base = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), nn.Conv2d)
    if base not in KERNEL_NORMALIZED:
        raise ValueError(f"{name!r}: there is no kernel-normalized {base.__name__}: skip it")
    same = ("forward", "_conv_forward")
    if any(getattr(type(module), method) is not getattr(base, method) for method in same):
        raise ValueError(
            f"{name!r}: {kind} does more than {base.__name__}, and KNConv2d cannot do that: "
            f"use {base.__name__}, or skip it"
        )
    if module.padding_mode != "zeros":
        raise ValueError(
            f"{name!r} has padding_mode={module.padding_mode!r}, and KNConv2d pads with zeros: "
            "pad with F.pad before it, or skip it"
        )


def _refuse_batch_statistics(model: nn.Module, plan: _Plan) -> None:
    """Raise ValueError if a layer that is called would still normalize over the batch."""
    called = [str(node.target) for node in plan.graph.nodes if node.op == "call_module"]
    for name, module in model.named_modules():
        batch = isinstance(module, _BatchNorm) or getattr(module, "running_var", None) is not None
        kept = name in plan.names("keep") or any(_matches(name, p) for p in plan.skip)
        if batch and not kept and any(_matches(name, node) for node in called):
            raise ValueError(
                f"{name!r} ({type(module).__name__}) would still normalize over the batch, as it "
                "is of a kind, or in a place, that convert does not know: replace it, or skip it"
            )


Row = tuple[str, str, str, str]


def _rows(plan: _Plan, new: dict[nn.Module, nn.Module]) -> Iterator[Row]:
    """Yield name, layer before, layer after and reason for each convolution and norm."""
    for name, module in plan.modules.items():
        action = plan.actions.get(name)
        if name in plan.normed_stages:
            kernel_norm = next(iter(KERNEL_NORMALIZED[plan.dims][1:])).__name__
            yield f"{name}.kernel_norm", "", kernel_norm, BEFORE_HEAD
        elif module in new:
            yield (
                name,
                _label(module),
                _label(new[module]),
                action.reason if action else BEFORE_HEAD,
            )
        elif action:
            yield name, _label(module), "", action.reason
        elif isinstance(module, CONVOLUTIONS) and not isinstance(module, KERNEL_LAYERS):
            skipped = any(_matches(name, pattern) for pattern in plan.skip)
            grouped = "grouped" if module.groups > 1 else "no norm beside it"
            yield name, _label(module), "", "skipped" if skipped else grouped


def _label(module: Any) -> str:
    if isinstance(module, nn.Sequential):
        return ", ".join(map(_label, module))
    if isinstance(module, nn.Identity):
        return "-"
    size = getattr(module, "kernel_size", None) if isinstance(module, CONVOLUTIONS) else None
    return f"{type(module).__name__} {'x'.join(map(str, size))}" if size else type(module).__name__


def _print_table(title: str, rows: list[Row]) -> None:
    table = Table("module", "was", "is", "why", title=title, title_justify="left")
    for name, before, after, reason in rows:
        table.add_row(name, before, after or "(as it was)", reason)
    console = Console(highlight=False)
    if not console.is_terminal:  # in a file, lines are as long as they need to be
        console.width = max(console.width, 132)
    console.print(table, markup=False)
