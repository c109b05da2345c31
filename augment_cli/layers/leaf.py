"""The layers before torch.fx, TorchScript and its ONNX exporter, which look into forward and cannot follow theirs.

torch.fx has no attribute that makes a module a leaf, only tracers that say so. A layer that is called with a proxy
therefore records the call of itself, as a tracer does for its leaves.
"""

from typing import NoReturn

import torch
from torch import nn
from torch.fx import Proxy, Tracer
from torch.fx.proxy import TraceError

from augment_cli.errors import InputError


def record_call(layer: nn.Module, x: Proxy) -> Proxy:
    """Record one `call_module` node for a layer that torch.fx traces.

    Raises:
        TraceError: the layer is itself what is traced, so that the graph has no name to call it by.
    """
    tracer = x.tracer
    path = tracer.path_of_module(layer) if isinstance(tracer, Tracer) else ""
    if not path:
        kind = type(layer).__name__
        raise TraceError(f"{kind} is one node of a graph: trace the model that holds it, or nn.Sequential(layer)")
    return tracer.create_proxy("call_module", path, (x,), {})


def refuse_old_onnx(layer: nn.Module) -> None:
    """Stop torch's ONNX exporter of TorchScript, which refuses or misspells operations of these layers.

    Other uses of torch.jit.trace go on.

    Raises:
        AugmentError: that exporter is at work.
    """
    if torch.onnx.is_in_onnx_export():
        raise InputError(
            f"torch's older ONNX exporter cannot express {type(layer).__name__}: use torch.onnx.export(..., "
            f"dynamo=True), --dynamo of timm's onnx_export.py, or augment export"
        )


def refuse_script(layer: nn.Module) -> NoReturn:
    """Answer torch.jit.script, which asks every module by its `__prepare_scriptable__`."""
    raise InputError(
        f"torch.jit.script cannot express {type(layer).__name__}: use augment export for a file, torch.export for a "
        f"graph, torch.compile for speed, or torch.jit.trace"
    )
