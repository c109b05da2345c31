"""Fuzz targets: how a case of each is made, and how it is read."""

import argparse
import functools
import hashlib
import io
import json
import random
import struct
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import augment_cli
from augment_cli import conversion
from augment_cli.analysis import cache, source
from augment_cli.analysis.facts import Analysis
from augment_cli.analysis.graph import analyze
from augment_cli.checkpoint.metadata import read_metadata
from augment_cli.errors import AugmentError
from augment_cli.planning.plan import make_plan
from augment_cli.planning.reading import fit_plan, parse_plan, read_plan
from augment_cli.planning.recipe import builtin_recipes, load_recipe
from augment_cli.reporting import FORMATS, Report
from augment_cli.reporting.output import write_model
from augment_cli.reporting.table import plain_table
from augment_cli.surgery import replace
from augment_cli.training.classification import Classification
from augment_cli.training.run import read_saved
from augment_cli.training.settings import Settings, read_settings
from augment_cli.training.state import write_state
from tests.fuzz.mutate import ARGUMENTS, MODELS, dump, hostile, mutate_bytes, mutate_text, mutate_tree, toml

MODEL = "test_resnet"


@dataclass(frozen=True)
class Target:
    """`make` draws a case; `read` is what must accept it or raise AugmentError."""

    make: Callable[[random.Random], bytes]
    read: Callable[[Path], Any]


@functools.cache
def _graph():
    described, model = source.describe(MODEL)
    return described, analyze(model, described.input_size)


@functools.cache
def _model_file(recipe: str) -> bytes:
    described, graph = _graph()
    plan, _ = make_plan(MODEL, graph, load_recipe(recipe))
    model = source.create(described)
    metadata = conversion.operate(model, plan, graph, "random, seed 0")
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, metadata, Path(folder) / "m.safetensors")
        return (Path(folder) / "m.safetensors").read_bytes()


def _make_model(rng: random.Random) -> bytes:
    data = _model_file(rng.choice(["aa", "aw", "aa-aw"]))
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    return _with_header(data, lambda header: _mutated_header(rng, header))


def _with_header(data: bytes, change: Callable[[dict], dict]) -> bytes:
    """A safetensors file with another header, its length put right."""
    size = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _mutated_header(rng: random.Random, header: dict) -> dict:
    if rng.random() < 0.2:
        mutated = mutate_tree(rng, header)
        return mutated if isinstance(mutated, dict) else {}
    metadata = json.loads(header["__metadata__"]["augment"])
    if rng.random() < 0.2:
        arguments = {rng.choice(ARGUMENTS): hostile(rng, *_LIKELY) for _ in range(rng.randrange(1, 3))}
        metadata["plan"] |= {"model_args": arguments}
    elif rng.random() < 0.7:
        metadata["plan"] = mutate_tree(rng, metadata["plan"])
    else:
        metadata = mutate_tree(rng, metadata)
    text = dump(metadata)
    if rng.random() < 0.1:
        text = mutate_bytes(rng, text.encode()).decode("utf-8", "replace")
    return header | {"__metadata__": {"format": "pt", "augment": text}}


def _read_model(path: Path) -> None:
    path = path.rename(path.with_suffix(".safetensors"))
    header = read_metadata(path)
    _show(Report.of(header.plan, header))
    augment_cli.load(path)


def _show(report: Report) -> None:
    for form in FORMATS.values():
        form(report)
    plain_table(report)


def _make_plan(rng: random.Random) -> bytes:
    _, graph = _graph()
    plan, _ = make_plan(MODEL, graph, load_recipe(rng.choice(["aa", "aw", "aa-aw"])))
    if rng.random() < 0.1:
        return mutate_bytes(rng, plan.to_json().encode())
    data = json.loads(plan.to_json())
    if rng.random() < 0.3:
        data["model_args"] = {rng.choice(ARGUMENTS): hostile(rng, *_LIKELY) for _ in range(rng.randrange(3))}
    if rng.random() < 0.1:
        data["model"] = rng.choice(MODELS)
    return dump(mutate_tree(rng, data) if rng.random() < 0.7 else data).encode()


def _read_plan(path: Path) -> None:
    plan = read_plan(path)
    _show(Report.of(plan))
    for form in FORMATS:
        augment_cli.compare(plan, plan).to(form)
    described, model = source.describe(plan.model, dict(plan.model_args), plan.input_size[1:])
    graph = analyze(model, described.input_size)
    fitted = fit_plan(plan, graph, "plan")
    replace.verify(model, fitted, graph)
    assert parse_plan(fitted.to_json(), "plan") == fitted


def _make_recipe(rng: random.Random) -> bytes:
    text = rng.choice(list(builtin_recipes().values())).read_text(encoding="utf-8")
    if rng.random() < 0.2:
        return mutate_bytes(rng, text.encode())
    if rng.random() < 0.3:
        return mutate_text(rng, text).encode("utf-8", "surrogatepass")
    data = mutate_tree(rng, tomllib.loads(text))
    table, _, key = rng.choice(_KEYS).partition(".")
    if isinstance(data, dict) and isinstance(data.get(table), dict):
        data[table][key] = hostile(rng, *_LIKELY)
    return _toml_file(data).encode("utf-8", "surrogatepass")


def _toml_file(data: Any) -> str:
    if not isinstance(data, dict):
        return toml(data)
    lines = [f"{key} = {toml(value)}" for key, value in data.items() if not isinstance(value, dict)]
    for key, value in data.items():
        if isinstance(value, dict):
            lines += [f"[{key}]", *(f"{name} = {toml(item)}" for name, item in value.items())]
    return "\n".join(lines)


_LIKELY = [
    *("keep", "free", "+1%", "aa", "aw", "aa+aw", "layer*", "*.conv1", "auto", "dense", "depthwise", "more-keys"),
    *(1, 2, 4, 5, 16, 64, 500, 0.01, 0.1, 0.25, 0.9, True, ["dense", "grouped"], [3, 5], [0, -1]),
    *("(a+)+$", "(.*)*x", ".*.*.*.*.*.*.*.*.*.*.*.*x", "(conv1|conv1)*z", "a?" * 40, "[", "(" * 400),
]


_KEYS = [f"select.{key}" for key in ("kernel", "kinds", "names", "regex", "stages", "block_indices", "exclude")]
_KEYS += [f"select.{key}" for key in ("largest_map", "smallest_width", "include_stem")]
_KEYS += [f"aa.{key}" for key in ("heads", "key_ratio", "value_ratio", "narrow", "min_key_channels", "attention_pool")]
_KEYS += ["aa.largest_attention_map", "aa.max_attention_pool", "aw.reduction", "budget.params", "budget.macs"]
_KEYS += ["operator", "paper.title", "name", "a.b"]


def _read_recipe(path: Path) -> None:
    path = path.rename(path.with_suffix(".toml"))
    recipe = load_recipe(str(path))
    plan, _ = make_plan(MODEL, _graph()[1], recipe)
    _show(Report.of(plan))


def _make_override(rng: random.Random) -> bytes:
    value = hostile(rng, *_LIKELY, *_LIKELY, "[" * 500, "0x" + "f" * 5000)
    text = f"{rng.choice(_KEYS)}={value if isinstance(value, str) else toml(value)}"
    text = mutate_text(rng, text) if rng.random() < 0.4 else text
    return text.encode("utf-8", "surrogatepass")


def _read_override(path: Path) -> None:
    recipe = load_recipe("aa", (path.read_bytes().decode("utf-8", "surrogatepass"),))
    _show(Report.of(make_plan(MODEL, _graph()[1], recipe)[0]))


def _make_settings(rng: random.Random) -> bytes:
    data = asdict(Settings(model="m", data="d", output="o", img_size=(64, 64), model_args={"num_classes": 10}))
    if rng.random() < 0.1:
        return mutate_bytes(rng, json.dumps(data).encode())
    return dump(mutate_tree(rng, json.loads(json.dumps(data)))).encode()


@functools.cache
def _state_file() -> bytes:
    weight = torch.nn.Parameter(torch.arange(16.0).view(4, 4))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    row = dict.fromkeys(("epoch", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr", "seconds"), 1.0)
    tree = {
        "task": "classification",
        "settings": asdict(Settings("m", "d", "o")),
        "processes": 1,
        "images": 10,
        "kinds": {"weight": "carried"},
        "position": [0, 1, 1],
    }
    tree |= {"seconds": 1.0, "sums": [0.0, 0.0, 0.0], "history": [row], "model": {"weight": weight}, "ema": None}
    tree |= {"optimizer": optimizer.state_dict(), "scaler": None}
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder) / "s", tree)
        return (Path(folder) / "s").read_bytes()


def _make_state(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(rng, _state_file())

    def change(header: dict) -> dict:
        text = dump(mutate_tree(rng, json.loads(header["__metadata__"]["run"])))
        return header | {"__metadata__": {"run": text}}

    return _with_header(_state_file(), change)


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    return source.create(_graph()[0]).state_dict()


def _make_checkpoint(rng: random.Random) -> bytes:
    weights: dict[Any, Any] = dict(_weights())
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(weights))
        weights[rng.choice([name, 3, None, "x", ("a",)])] = rng.choice(_VALUES)(weights[name])
    prefix = rng.choice(["", "", "module.", "model.", "_orig_mod.", "net.model."])
    weights = {f"{prefix}{name}" if isinstance(name, str) else name: value for name, value in weights.items()}
    key = rng.choice(["state_dict", "state_dict_ema", "model", "weights"])
    wrapped = rng.choice([weights, {key: weights}, {key: weights, "state_dict_ema": None}, [weights], {1: weights}])
    if isinstance(wrapped, dict) and rng.random() < 0.3:
        wrapped["args"] = argparse.Namespace(model=MODEL, lr=0.1)
    file = io.BytesIO()
    new = rng.random() < 0.8
    torch.save(wrapped, file, _use_new_zipfile_serialization=new)
    return mutate_bytes(rng, file.getvalue()) if rng.random() < 0.5 and new else file.getvalue()


_VALUES: list[Callable[[Any], Any]] = [
    lambda value: value,
    lambda value: None,
    lambda value: 3,
    lambda value: value.half() if isinstance(value, torch.Tensor) else value,
    lambda value: torch.full((3,), float("nan")),
    lambda value: value * float("inf") if isinstance(value, torch.Tensor) else value,
    lambda value: torch.zeros(1).expand(10**6, 10**6),
    lambda value: torch.zeros(2, 2).to_sparse(),
    lambda value: torch.empty(2, device="meta"),
    lambda value: {"a": 1},
]


def _read_checkpoint(path: Path) -> None:
    path = path.rename(path.with_suffix(".pth"))
    source.load_checkpoint(source.create(_graph()[0]), path)


def _make_cache(rng: random.Random) -> bytes:
    described, graph = _graph()
    analysis = Analysis(graph.input_size, graph.sites, graph.params, graph.macs)
    data = json.loads(json.dumps({"source": asdict(described), "analysis": asdict(analysis)}))
    text = dump(mutate_tree(rng, data)).encode("utf-8", "surrogatepass")
    content = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
    return mutate_bytes(rng, content) if rng.random() < 0.1 else content


def _read_cache(path: Path) -> None:
    """A file that the cache takes can be planned with, as far as a recipe can be."""
    found = cache._read(path)
    if found is None:
        raise AugmentError("as good as none")
    plan, _ = make_plan(found.source.name, found.analysis, load_recipe("aa"), found.source.args)
    _show(Report.of(plan))


TARGETS = {
    "cache": Target(_make_cache, _read_cache),
    "model": Target(_make_model, _read_model),
    "plan": Target(_make_plan, _read_plan),
    "recipe": Target(_make_recipe, _read_recipe),
    "override": Target(_make_override, _read_override),
    "settings": Target(_make_settings, functools.partial(read_settings, kind=Settings)),
    "state": Target(_make_state, functools.partial(read_saved, task=Classification)),
    "checkpoint": Target(_make_checkpoint, _read_checkpoint),
}
