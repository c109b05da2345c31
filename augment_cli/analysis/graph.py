"""The graph of a model: every convolution call in it, with its shapes and its place.

torch.fx traces with timm's own leaf modules and functions. Shapes are propagated on the meta device, so that nothing is
computed. Hooks record the convolutions inside timm's leaf modules while these run.
"""

import copy
import inspect
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from augment_cli.analysis.facts import Analysis
from augment_cli.analysis.site import ConvSite, Size
from augment_cli.compat import tree_map_only
from augment_cli.errors import AugmentError, InputError

# Modules that may stand between a convolution and its normalisation.
_PASSES_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class ModelGraph(Analysis):
    """The analysis of a model with its graph and the shapes in it.

    `constants` are tensors that a forward pass creates, and that the graph takes from the traced copy.
    """

    graph: fx.Graph
    shapes: dict[str, Any] = field(repr=False)
    constants: dict[str, Tensor] = field(default_factory=dict, repr=False)


def analyze(model: nn.Module, input_size: tuple[int, int, int]) -> ModelGraph:
    """Trace a model and find every convolution in it.

    Args:
        model: any timm model, on any device; it is not changed.
        input_size: (channels, height, width) of one image.

    Raises:
        AugmentError: the model cannot be traced, or does not run on images of this size.
    """
    model = meta_copy(model).eval().requires_grad_(False)
    graph = trace(model)
    with CallRecorder(model) as calls, FlopCounterMode(display=False) as flops:
        shapes = propagate_shapes(model, graph, input_size)
    sites = tuple(_sites(model, graph, calls))
    macs = flops.get_total_flops() // 2
    return ModelGraph(input_size, sites, count_parameters(model), macs, graph, shapes, _constants(model, graph))


def _constants(model: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    taken = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {name: getattr(model, name) for name in taken if name.startswith("_tensor_constant")}


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_classes(model: nn.Module) -> int:
    """Number of classes of a model; 0 for a feature extractor.

    It is `num_classes` of a timm model, and the width of the last linear layer of others.
    """
    known = getattr(model, "num_classes", None)
    if isinstance(known, int):
        return known
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1].out_features if linear else 0


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's structure, its parameters and buffers on the meta device. Copies no data."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            memo.setdefault(id(p), nn.Parameter(p.detach().to("meta"), p.requires_grad))
        for b in module.buffers(recurse=False):
            memo.setdefault(id(b), b.to("meta"))
    return copy.deepcopy(model, memo)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (nn.Conv2d, *get_notrace_modules())

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, self.leaves) or is_norm(module) or super().is_leaf_module(module, name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a model called on images alone, every convolution and normalisation a leaf."""
    optional = [*inspect.signature(model.forward).parameters.values()][1:]
    constants = {p.name: p.default for p in optional if p.default is not p.empty}
    try:
        return _Tracer().trace(model, concrete_args=constants)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        raise InputError(f"{type(model).__name__} cannot be traced with torch.fx: {_reason(error)}") from error


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation of torch or timm, with or without a fused activation."""
    return "norm" in type(module).__name__.lower() and not any(isinstance(m, nn.Conv2d) for m in module.modules())


class _ShapeInterpreter(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.shapes[n.name] = tree_map_only(Tensor, lambda t: tuple(t.shape), result)
        return result


def propagate_shapes(model: nn.Module, graph: fx.Graph, input_size: tuple[int, int, int]) -> dict[str, Any]:
    """The shape of every node's result, for one image of `input_size`; the model is on the meta device."""
    interpreter = _ShapeInterpreter(model, graph)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        interpreter.run(torch.empty(1, *input_size, device="meta", dtype=dtype))
    except Exception as error:  # the model's own code may raise anything on a size that it does not support
        size = "x".join(map(str, input_size))
        raise InputError(f"{type(model).__name__} does not run on an image of {size}: {_reason(error)}") from error
    return interpreter.shapes


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class CallRecorder:
    """Input and output sizes of every call of every convolution, while the context is open."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes: dict[str, list[tuple[Size, Size]]] = defaultdict(list)
        self._modules = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def __enter__(self) -> "CallRecorder":
        self._handles = [m.register_forward_hook(self._recorder(name)) for name, m in self._modules.items()]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _recorder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            self.sizes[name].append((_size(args[0].shape[-2:]), _size(out.shape[-2:])))

        return record


def _sites(model: nn.Module, graph: fx.Graph, calls: CallRecorder) -> Iterator[ConvSite]:
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    order = [name for name in calls.sizes if name in convs] + [name for name in convs if name not in calls.sizes]
    stage_of = _stages(model, graph, calls)
    in_stem = _stem_matcher(model)
    norms = _following_norms(model, graph)
    image_readers = _image_readers(model, graph)
    blocks = {name: _block(model, name) for name in order}
    seen: Counter = Counter()
    for name in order:
        conv, sizes = convs[name], calls.sizes.get(name, [])
        place = (blocks[name], conv.kernel_size)
        in_size, out_size = sizes[0] if sizes else ((0, 0), (0, 0))
        yield ConvSite(
            name=name,
            conv_class=type(conv).__name__,
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            kernel_size=_size(conv.kernel_size),
            stride=_size(conv.stride),
            padding=conv_padding(conv),
            dilation=_size(conv.dilation),
            groups=conv.groups,
            params=count_parameters(conv),
            in_resolution=in_size,
            resolution=out_size,
            calls=len(sizes),
            stage=stage_of(name),
            block=blocks[name],
            block_index=seen[place],
            reads_image=name in image_readers,
            stem=name in image_readers or in_stem(name),
            pyramid=_in_pyramid(model, name),
            norm=norms.get(name),
            obstacle=_obstacle(sizes),
        )
        seen[place] += 1


def conv_padding(conv: nn.Conv2d) -> Size | str:
    """The padding of a convolution, as nn.Conv2d takes it; timm's Conv2dSame kin say 0 and pad dynamically."""
    if getattr(conv, "same_pad", False) or type(conv).__name__.startswith("Conv2dSame"):
        return "same"
    if isinstance(conv.padding, str):
        return "same" if conv.padding == "same" else (0, 0)
    return _size(conv.padding)


def _size(sides: Sequence[int]) -> Size:
    height, width = sides
    return height, width


def _obstacle(sizes: list[tuple[Size, Size]]) -> str | None:
    if not sizes:
        return "never called in a forward pass"
    maps = sorted({size for size, _ in sizes})
    if len(maps) > 1:
        return "called at several sizes: " + ", ".join(f"{h}x{w}" for h, w in maps)
    return None


def _block(model: nn.Module, name: str) -> str:
    """The smallest module around a convolution that holds a second one: as a rule its residual block."""
    while name:
        name = name.rpartition(".")[0]
        if sum(isinstance(m, nn.Conv2d) for m in model.get_submodule(name).modules()) > 1:
            break
    return name


def _in_pyramid(model: nn.Module, name: str) -> bool:
    """Whether a convolution belongs to a feature pyramid of torchvision, or to one made like it."""
    around = (type(model.get_submodule(module)).__mro__ for module in _ancestors(name))
    return any(kind.__name__ == "FeaturePyramidNetwork" for kinds in around for kind in kinds)


def _stages(model: nn.Module, graph: fx.Graph, calls: CallRecorder) -> Callable[[str], int]:
    """A function from a convolution's name to its stage: timm's feature level, as out_indices counts, from 0.

    A convolution belongs to the first level whose output comes after it. In models without levels the stage is the rank
    of the convolution's output map by size, the largest first, which agrees with timm's levels where there are some.
    """
    paths = [_path(node) for node in graph.nodes]
    infos = getattr(model, "feature_info", None) or []
    levels = [info.get("module") for info in infos if isinstance(info, dict)]
    ends = [max((i for i, p in enumerate(paths) if _within(p, level)), default=None) for level in levels if level]
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        first.setdefault(path, i)
    by_size = _stages_by_size(calls)

    def stage(name: str) -> int:
        # A convolution inside a leaf module takes the place of the leaf.
        index = next((first[p] for p in _ancestors(name) if p in first), None)
        if not ends or None in ends or index is None:
            return by_size.get(name, 0)
        return next((level for level, end in enumerate(ends) if end is not None and index <= end), len(ends))

    return stage


def _stages_by_size(calls: CallRecorder) -> dict[str, int]:
    """The rank of each called convolution's map by size. A map of one position, as in a gate, takes the rank before."""
    outputs = {name: sizes[0][1] for name, sizes in calls.sizes.items()}
    ranks = {
        size: rank for rank, size in enumerate(sorted({*outputs.values()} - {(1, 1)}, key=math.prod, reverse=True))
    }
    stages, latest = {}, 0
    for name, size in outputs.items():
        latest = stages[name] = ranks.get(size, latest)
    return stages


def _path(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack)) if stack else ""


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def _ancestors(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _stem_matcher(model: nn.Module) -> Callable[[str], bool]:
    """Whether a convolution, by name, is in the part that timm's `group_matcher` calls the model's stem."""
    matcher: Callable[[], dict[str, Any]] = getattr(model, "group_matcher", dict)
    try:
        pattern = matcher().get("stem")
    except (AttributeError, AssertionError):  # in timm a method that nobody has written for this model yet
        pattern = None
    specs = [pattern] if isinstance(pattern, str) else [spec[0] for spec in pattern or ()]
    return lambda name: any(re.match(spec, f"{name}.weight") for spec in specs)


def _image_readers(model: nn.Module, graph: fx.Graph) -> set[str]:
    """The convolutions that read the image without another convolution before them."""
    readers: set[str] = set()
    raw: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            raw.add(node)
        elif any(n in raw for n in node.all_input_nodes):
            convs = _convs_of(model, node)
            readers.update(convs[:1])
            if not convs:
                raw.add(node)
    return readers


def _convs_of(model: nn.Module, node: fx.Node) -> list[str]:
    if node.op != "call_module":
        return []
    prefix = str(node.target)
    inner = model.get_submodule(prefix).named_modules(prefix=prefix)
    return [name for name, m in inner if isinstance(m, nn.Conv2d)]


def _following_norms(model: nn.Module, graph: fx.Graph, prefix: str = "") -> dict[str, str]:
    """For each convolution whose output only a normalisation reads, the normalisation's name."""
    norms: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        name = str(node.target)
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            norm = _next_norm(model, node)
            if norm:
                norms[prefix + name] = prefix + norm
        elif any(isinstance(m, nn.Conv2d) for m in module.modules()):
            norms |= _norms_in_leaf(module, f"{prefix}{name}.")
    return norms


def _norms_in_leaf(leaf: nn.Module, prefix: str) -> dict[str, str]:
    try:
        return _following_norms(leaf, trace(leaf), prefix)
    except AugmentError:  # timm makes it a leaf because it cannot be traced
        return {}


def _next_norm(model: nn.Module, node: fx.Node) -> str | None:
    while len(node.users) == 1:
        (node,) = node.users
        if node.op != "call_module":
            return None
        module = model.get_submodule(str(node.target))
        if is_norm(module):
            return str(node.target)
        if not isinstance(module, _PASSES_THROUGH):
            return None
    return None
