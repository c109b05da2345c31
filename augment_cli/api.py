"""The Python API: plan, convert, save, check and report, with the names of the command line's commands.

A model is the name of a timm model, `package.module:function`, or a torch.nn.Module that torch.fx can trace. No call
changes the caller's random state, loggers or signal handlers.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from augment_cli.analysis import source
from augment_cli.analysis.graph import ModelGraph, analyze
from augment_cli.checkpoint.check import Finding, verify_file, verify_model
from augment_cli.checkpoint.files import load as load_model
from augment_cli.checkpoint.metadata import Metadata, metadata_of, read_metadata, weights_file
from augment_cli.conversion import check_fittable, operate
from augment_cli.detection.build import settings_of
from augment_cli.detection.files import load_detector, save_detector
from augment_cli.errors import InputError
from augment_cli.exporting.export import Exported
from augment_cli.exporting.export import export as write_exported
from augment_cli.files import check_output
from augment_cli.formats import DETECTOR_KEY, read_tensor_metadata
from augment_cli.latency.timer import Timer, measure_latency, plan_within
from augment_cli.planning.plan import Plan, make_plan
from augment_cli.planning.reading import check_budget, fit_plan, read_plan
from augment_cli.planning.recipe import Recipe, as_recipe, latency_settings
from augment_cli.publishing import pack, send
from augment_cli.reporting.output import check_target, write_model
from augment_cli.reporting.printed import PrintedReport
from augment_cli.seeds import preserved
from augment_cli.specs import ImageSize, check_channels, height_width
from augment_cli.surgery import replace
from augment_cli.surgery.calibration import Calibration, gather_images

if TYPE_CHECKING:
    from augment_cli.checkpoint.rebuild import Base

Model = str | nn.Module


def plan(
    model: Model, recipe: str | Recipe = "aa", *overrides: str, input_size: ImageSize | None = None, **args: Any
) -> Plan:
    """Plan the replacement of a model's convolutions. Needs no weights, and computes nothing on images.

    A budget of latency, such as "budget.latency=+5%", is the exception: the model is made and timed on this machine, as
    the recipe's [latency] says, for a minute by default.

    Args:
        model: the name of a timm model, `package.module:function`, or a module, which is left as it is.
        recipe: a built-in recipe's name, a TOML file's path, or a recipe.
        overrides: values of the recipe, such as "budget.params=keep".
        input_size: of an image: side, (height, width) or (channels, height, width). None takes the model's own.
        args: arguments for timm.create_model or the function.

    Raises:
        AugmentError: no such model or recipe, nothing to replace, or a budget that cannot be met.

    Example:
        >>> made = plan("resnet18", "aa", "select.names=layer4.*")
        >>> len(made.sites), made.params_after <= made.params_before
        (4, True)
    """
    described, meta_model = _describe(model, input_size, args)
    return _planned(described, analyze(meta_model, described.input_size), recipe, overrides, model)


def convert(
    model: Model,
    plan: str | Path | Recipe | Plan = "aa",
    *overrides: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    input_size: ImageSize | None = None,
    calibrate: "str | Path | Tensor | Iterable[Any] | None" = None,
    calibrate_images: int = 512,
    seed: int = 0,
    **args: Any,
) -> nn.Module:
    """A converted copy of a model. It has the source's interface, and `augment_metadata` says what was done to it.

    Args:
        model: the name of a timm model, `package.module:function`, or a module with weights, which is left as it is.
        plan: what becomes of it: a recipe by name, path or as an object, or a plan.
        overrides: values of the recipe, such as "budget.params=keep".
        pretrained: for a timm model's name: timm's pretrained weights; otherwise they are random from the seed.
        checkpoint: for a name: a file with the source's weights, safetensors or torch.
        input_size: of an image: side, (height, width) or (channels, height, width). None takes the model's own.
        calibrate: unlabelled images to fit attention on: a folder or another data set of `augment convert --calibrate`,
            a tensor (N, C, H, W) of bytes, or of floats as the model takes them, or a torch data set of such tensors
            or PIL images. None leaves attention untrained.
        calibrate_images: how many of them at most.
        seed: of random weights, of what is added, and of the images drawn.
        args: arguments for timm.create_model or the function.

    Raises:
        AugmentError: bad input, nothing to replace, a budget that cannot be met, or weights that are not finite.

    Example:
        >>> model = convert("resnet18", "aa", "select.names=layer4.*")
        >>> type(model).__name__, type(model.layer4[0].conv1).__name__
        ('ResNet', 'AAConv2d')
    """
    if not isinstance(model, str) and (pretrained or checkpoint):
        raise InputError("a module has its weights: leave out `pretrained` and `checkpoint`")
    if pretrained and checkpoint:
        raise InputError("`pretrained` and `checkpoint` both name weights: give one of them")
    if isinstance(plan, Plan):
        input_size, args = (
            input_size or plan.input_size,
            args or (dict(plan.model_args) if isinstance(model, str) else {}),
        )
    described, meta_model = _describe(model, input_size, args)
    graph = analyze(meta_model, described.input_size)
    if isinstance(plan, Plan):
        made = _given(plan, described, graph)
    else:
        made = _planned(described, graph, plan, overrides, model)
    replace.verify(meta_model, made, graph)
    images = _images(calibrate, meta_model, made, calibrate_images, seed)
    with preserved():
        if isinstance(model, str):
            weights = source.create(described, seed, origin=model if pretrained else None)
            origin = source.weights_origin(pretrained, seed)
            if checkpoint is not None:
                origin = source.load_checkpoint(weights, Path(checkpoint))
        else:
            weights, origin = copy.deepcopy(model), "given"
        operate(weights, made, graph, origin, images, seed=seed)
    return weights


def save(model: nn.Module, path: str | Path, overwrite: bool = False) -> None:
    """Write a converted model or a detector with its weights as they are now, trained or not.

    Args:
        model: from `convert`, `load` or `detection`.
        path: a name that ends in .safetensors for one file, as detectors take it; any other for a folder, with reports
            and a model card, and for a timm model what timm loads as "local-dir:PATH".
        overwrite: replace what is there.

    Raises:
        AugmentError: not a converted model, or a path that cannot be written.
    """
    target = Path(path)
    if settings_of(model) is not None:
        check_output(target, overwrite)
        save_detector(model, target)
        return
    metadata = _metadata_of(model)
    check_target(target, overwrite)
    write_model(model, metadata, target)


def push(model: "nn.Module | str | Path", name: str, *, public: bool = False, overwrite: bool = False) -> str:
    """Push a converted model to the Hugging Face hub, where timm and `load` take it as "hf-hub:NAME".

    The token is that of `hf auth login`, or HF_TOKEN.

    Args:
        model: the folder of one, of which only the files that augment wrote are sent; or a model, which is saved first.
        name: OWNER/NAME, or NAME for the token's owner.
        public: let everyone see it. A repository that exists keeps its visibility.
        overwrite: commit to a repository that exists.

    Returns:
        The address of its page.

    Raises:
        AugmentError: not a converted model's folder, no token, no right to write, no connection, or a repository that
            exists.
    """
    if not isinstance(model, nn.Module):
        return send(pack(Path(model), name), public=public, overwrite=overwrite)
    with TemporaryDirectory() as folder:
        write_model(model, _metadata_of(model), Path(folder, "model"))
        return send(pack(Path(folder, "model"), name), public=public, overwrite=overwrite)


def load(path: str | Path, base: "Base | None" = None) -> nn.Module:
    """The converted model of a file, a folder with `model.safetensors` in it or the hub, or a detector; in train mode.

    A converted timm model comes back as a timm model, and a detector as torchvision's. Of any other model the file
    holds no code: `base` makes it.

    Args:
        path: of the file or folder, or "hf-hub:NAME" for a model on the Hugging Face hub.
        base: the source's architecture, for a model that timm does not know: a module, which is left as it is, or a
            function that makes one, called with the plan's `model_args`. Its weights do not matter.

    Raises:
        AugmentError: not a converted model's file, cut short, of a newer schema, or a plan or weights that do not fit.
    """
    file = weights_file(Path(path))
    if DETECTOR_KEY not in read_tensor_metadata(file):
        return load_model(path, base)
    if base is not None:
        raise InputError(f"{file} holds a detector, which is made again by its own settings: leave out `base`")
    return load_detector(file)


def check(model: "nn.Module | str | Path", base: "Base | None" = None) -> list[Finding]:
    """Hold a converted model, or its file, against its plan: recounted, and run on an image.

    Args:
        model: a converted model, or the file or folder of one, which is loaded first.
        base: for a file, as for `load`.

    Raises:
        AugmentError: it is no converted model, or cannot be loaded at all.
    """
    if isinstance(model, nn.Module):
        return verify_model(model, _metadata_of(model).plan)
    return verify_file(Path(model), base)


def export(
    model: "nn.Module | str | Path",
    path: str | Path,
    *,
    input_size: ImageSize | None = None,
    dynamic: str = "batch",
    precision: str = "fp32",
    opset: int = 20,
    calibrate: "str | Path | Tensor | Iterable[Any] | None" = None,
    calibrate_images: int = 128,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model for another runtime, run the file there, and compare it with the model in torch.

    Args:
        model: with weights, converted or not, or a converted model's file or folder.
        path: ends in .onnx, .pt2 (torch.export) or .xml (OpenVINO).
        input_size: of an image, as for `convert`; a converted model has its plan's.
        dynamic: "batch", which may have any size, or "batch,size" for images of other sizes too, in multiples of the
            model's total stride: attention's tables are resized in the graph.
        precision: fp32, fp16, or for ONNX and OpenVINO int8.
        opset: of ONNX.
        calibrate: images to compare on, and for int8 to measure ranges on, as for `convert`; None takes random ones.
        calibrate_images: how many of them at most.
        tolerance: largest difference allowed, as a share of the largest output. None takes 1e-4, 2e-2 or 0.5.
        overwrite: replace what is there.

    Raises:
        AugmentError: no such format, a model that it cannot express, or outputs that differ too much. Nothing is
            written then.
    """
    if not isinstance(model, nn.Module):
        model = load(model)
    metadata = metadata_of(model)
    if input_size is None and metadata is None:
        raise InputError("`input_size` is missing: a model that is not converted does not say its images' size")
    size = metadata.plan.input_size if metadata else (3, 0, 0)
    if sides := height_width(input_size):
        channels = input_size[0] if isinstance(input_size, tuple) and len(input_size) == 3 else size[0]
        size = (channels, *sides)
    images = None if calibrate is None else gather_images(calibrate, model, size, calibrate_images)
    options: dict[str, Any] = {"precision": precision, "opset": opset, "tolerance": tolerance, "overwrite": overwrite}
    with preserved():
        return write_exported(model, path, size, dynamic=dynamic, calibration=images, **options)


def report(
    model: "nn.Module | Plan | str | Path", latency: bool = False, base: str | None = None, **settings: Any
) -> PrintedReport:
    """The numbers of a plan or of a converted model; print it, or take `to("html")` and other forms.

    Args:
        model: a converted model, its file or folder, a plan, or a plan's JSON file.
        latency: measure the time of the model and its sites beside the source's, on this machine.
        base: `package.module:function`, which makes the source of a model that timm does not know; for `latency`.
        settings: how latency is measured: device, batch, threads, precision, mode, seconds, as in a recipe's [latency].

    Raises:
        AugmentError: none of these, or a latency that cannot be measured so.
    """
    metadata = None
    if isinstance(model, Plan):
        plan = model
    elif isinstance(model, nn.Module):
        metadata = _metadata_of(model)
    elif Path(model).suffix == ".json":
        plan = read_plan(Path(model))
    else:
        metadata = read_metadata(Path(model))
    plan = metadata.plan if metadata else plan
    if latency:
        plan = measure_latency(plan, latency_settings(**settings), base)
    elif settings or base:
        raise InputError(f"{', '.join(settings) or 'base'}: for `latency=True`; add it, or leave them out")
    path = None if isinstance(model, (Plan, nn.Module)) else Path(model)
    return PrintedReport.of(plan, metadata, path)


def _describe(model: Model, input_size: ImageSize | None, args: dict[str, Any]) -> tuple[source.Source, nn.Module]:
    if isinstance(model, str):
        described = source.describe(model, args, height_width(input_size))
    elif args:
        raise InputError(f"a module knows its own arguments: leave out {', '.join(args)}")
    else:
        described = source.describe_module(model, height_width(input_size))
    check_channels(input_size, described[0].input_size[0])
    return described


def _planned(
    described: source.Source,
    graph: ModelGraph,
    recipe: str | Path | Recipe,
    overrides: tuple[str, ...],
    model: Model,
) -> Plan:
    recipe = as_recipe(recipe, overrides)
    if recipe.budget.latency == "free":
        made, _ = make_plan(described.name, graph, recipe, described.args, base=described.base)
        return made

    def make() -> nn.Module:
        return source.create(described) if isinstance(model, str) else model

    timer = Timer(described, graph, recipe.latency, make, cached=isinstance(model, str))
    return plan_within(described, graph, recipe, timer)[0]


def _given(plan: Plan, described: source.Source, graph: ModelGraph) -> Plan:
    own = {"base": described.base, "model": described.name, "model_args": described.args}
    fitted = fit_plan(Plan(**dict(plan) | own), graph, "the plan")
    check_budget(fitted, "the plan")
    return fitted


def _images(calibrate: Any, model: nn.Module, plan: Plan, count: int, seed: int) -> Calibration | None:
    if calibrate is None:
        return None
    check_fittable(plan)
    return gather_images(calibrate, model, plan.input_size, count, seed)


def _metadata_of(model: nn.Module) -> Metadata:
    metadata = metadata_of(model)
    if metadata is None:
        raise InputError(
            f"{type(model).__name__} is not a converted model: take one from augment_cli.convert or augment_cli.load"
        )
    return metadata
