import json
import struct
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2

from augment_cli.errors import AugmentError
from augment_cli.training.classification import Classification
from augment_cli.training.run import read_saved
from augment_cli.training.settings import Settings, read_settings
from augment_cli.training.state import SCHEMA, read_state, write_state


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


TREE = {
    "numbers": [1, 2.5, 0.1 + 0.2, float("inf"), float("nan"), True, None, "text"],
    "tuple": (0.9, 0.999),
    3: {"x": torch.randn(2, 3), "step": torch.tensor(7.0)},
    "kinds": [torch.arange(3), torch.tensor(True), torch.zeros(0), torch.randn(2).bfloat16()],
    "empty": {"dict": {}, "list": [], "tuple": ()},
    "view": torch.arange(6).reshape(2, 3).T,
}


def test_what_is_written_is_read(tmp_path):
    write_state(tmp_path / "s", TREE)
    assert same(read_state(tmp_path / "s"), TREE)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adafactor", "lion", "muon", "adan"])
def test_optimisers_go_on_as_if_they_had_not_been_saved(tmp_path, name):
    def steps(weight, optimizer, numbers):
        for number in numbers:
            weight.grad = torch.full_like(weight, 0.1 * number)
            optimizer.step()

    start = torch.randn(4, 4)
    unbroken, broken, resumed = (torch.nn.Parameter(start.clone()) for _ in range(3))
    first, second, third = (create_optimizer_v2([p], name, lr=0.1) for p in (unbroken, broken, resumed))
    steps(unbroken, first, range(1, 7))
    steps(broken, second, range(1, 4))
    write_state(tmp_path / "s", {"weight": broken, "optimizer": second.state_dict()})
    saved = read_state(tmp_path / "s")
    resumed.data.copy_(saved["weight"])
    third.load_state_dict(saved["optimizer"])
    steps(resumed, third, range(4, 7))
    assert torch.equal(unbroken, resumed)


def test_what_is_no_data_is_not_written(tmp_path):
    with pytest.raises(TypeError, match="a checkpoint cannot hold set"):
        write_state(tmp_path / "s", {"x": {1}})
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused(tmp_path):
    write_state(tmp_path / "good", TREE)
    whole = (tmp_path / "good").read_bytes()
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    header = json.dumps({"__metadata__": {"run": '{"schema": 9}'}}).encode()
    (tmp_path / "newer").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    for name in ("none", "other", "cut"):
        with pytest.raises(AugmentError, match=f"{name} is no checkpoint of a run"):
            read_state(tmp_path / name)
    with pytest.raises(AugmentError, match="has schema 9, and this version reads"):
        read_state(tmp_path / "newer")


SAVED = {
    "task": "classification",
    "settings": asdict(Settings("m", "d", "o")),
    "processes": 1,
    "images": 10,
    "kinds": {"weight": "carried"},
    "position": [0, 1, 1],
    "seconds": 1.0,
    "sums": [0.0, 0.0, 0.0],
    "history": [],
    "model": {"weight": torch.zeros(2)},
    "ema": None,
    "optimizer": {},
    "scaler": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"position": [0, 1]},
        {"position": [-1, 0, 0]},
        {"kinds": {"weight": "stolen"}},
        {"sums": "x"},
        {"history": [{"epoch": "x"}]},
        {"history": [{"epoch": 1.0}]},
        {"seconds": float("nan")},
        {"model": 3},
        {"processes": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_of_another_shape_is_refused(tmp_path, change):
    write_state(tmp_path / "s", SAVED)
    assert read_saved(tmp_path / "s", Classification)["position"] == [0, 1, 1]
    write_state(tmp_path / "s", SAVED | change)
    with pytest.raises(AugmentError, match=next(iter(change))):
        read_saved(tmp_path / "s", Classification)


@pytest.mark.parametrize(
    "tree",
    [
        "[" * 5000 + "]" * 5000,
        "null",
        "3",
        '{"dict": 3}',
        '{"tensor": "9"}',
        '{"set": []}',
        "{}",
        '{"dict": [[[], 1]]}',
    ],
)
def test_a_checkpoint_whose_contents_are_not_whole_is_refused(tmp_path, tree):
    save_file({"0": torch.zeros(1)}, tmp_path / "s", metadata={"run": f'{{"schema": {SCHEMA}, "tree": {tree}}}'})
    with pytest.raises(AugmentError, match="s is no checkpoint of a run"):
        read_state(tmp_path / "s")


@pytest.mark.parametrize(
    "change",
    [
        *({"epochs": value} for value in ("3", None, 1.5, True, 10**30, [])),
        *({"lr": value} for value in (float("nan"), float("inf"), -1, "x")),
        *({"img_size": value} for value in ([1], [1, "x"], 3, "224")),
        *({"on_corrupt": "cry"}, {"loss": "focal"}, {"schedule": "sine"}, {"precision": "fp8"}),
        *({"seed": -1}, {"mixup": 1e9}, {"model_args": []}, {"new_first": -5}, {"momentum": float("nan")}),
    ],
    ids=str,
)
def test_settings_of_other_types_and_ranges_are_refused(tmp_path, change):
    data = asdict(Settings(model="m", data="d", output="o", img_size=(64, 96)))
    (tmp_path / "settings.json").write_text(json.dumps(data))
    assert read_settings(tmp_path / "settings.json", Settings).img_size == (64, 96)
    (tmp_path / "settings.json").write_text(json.dumps(data | change))
    with pytest.raises(AugmentError, match=next(iter(change)).replace("_", "[-_]")):
        read_settings(tmp_path / "settings.json", Settings)
