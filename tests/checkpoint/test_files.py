import json
import struct
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import augment_cli
from augment_cli import conversion
from augment_cli.analysis import source
from augment_cli.checkpoint.files import save_weights
from augment_cli.checkpoint.metadata import Metadata, read_metadata
from augment_cli.errors import AugmentError
from augment_cli.formats import METADATA_KEY
from augment_cli.reporting.output import write_model
from tests.conftest import graph_of, plan_of


def converted(name: str = "resnet18", recipe: str = "aa", seed: int = 0, **args):
    described, _ = source.describe(name, args)
    model = source.create(described, seed)
    return model, conversion.operate(model, plan_of(name, recipe), graph_of(name), f"random, seed {seed}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "resnet18-aa.safetensors"
    model, metadata = converted()
    write_model(model, metadata, path)
    return path


def rewritten(saved: Path, path: Path, change) -> Path:
    """A copy of a saved file with its `augment` metadata changed by hand."""
    with safe_open(saved, "pt") as opened:
        metadata = opened.metadata()
    data = json.loads(metadata[METADATA_KEY])
    data = change(data) or data
    save_file(load_file(saved), path, metadata | {METADATA_KEY: data if isinstance(data, str) else json.dumps(data)})
    return path


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnetv2_b0", "test_nfnet"])
@pytest.mark.parametrize("recipe", ["aa", "aw", "aa-aw"])
def test_loading_gives_the_same_logits_bit_for_bit(tmp_path, name, recipe):
    model, metadata = converted(name, recipe)
    write_model(model, metadata, tmp_path / "m.safetensors")
    write_model(model, metadata, tmp_path / "folder")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(augment_cli.load(tmp_path / "m.safetensors").eval()(x), expected)
        assert torch.equal(augment_cli.load(tmp_path / "folder").eval()(x), expected)
        again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
        assert torch.equal(again.eval()(x), expected)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(tmp_path):
    """Several times: safetensors itself orders metadata at random."""
    seeds = [1, 1, 1, 1, 2]
    for i, seed in enumerate(seeds):
        write_model(*converted("test_resnet", seed=seed), tmp_path / f"{i}.safetensors")
    contents = [(tmp_path / f"{i}.safetensors").read_bytes() for i in range(len(seeds))]
    assert len(set(contents[:4])) == 1
    assert contents[4] != contents[0]


def test_the_header_says_what_the_model_is_made_of(saved):
    with safe_open(saved, "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    metadata = read_metadata(saved)
    described, _ = source.describe("resnet18")
    assert metadata.plan == plan_of("resnet18", "aa")
    assert metadata.source_sha256 == source.weights_digest(source.create(described, 0))
    assert metadata.weights == "random, seed 0"
    assert {"torch", "timm", "augment-cli", "python"} <= metadata.versions.keys()
    assert [i.name for i in metadata.inheritance] == [s.name for s in metadata.plan.sites]
    assert Metadata.model_validate_json(metadata.to_metadata()[METADATA_KEY]) == metadata


def test_the_folder_has_what_timm_and_people_need(tmp_path):
    write_model(*converted(), tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "plan.json",
        "report.json",
        "report.html",
        "network.svg",
        "README.md",
    }
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architecture"] == "augmented"
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    assert config["pretrained_cfg"]["mean"] == list(timm.get_pretrained_cfg("resnet18").mean)
    assert json.loads((tmp_path / "out/plan.json").read_text()) == json.loads(plan_of("resnet18", "aa").to_json())


def test_a_converted_model_in_memory_can_be_saved_by_timm_itself(tmp_path):
    model, _ = converted()
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    x = torch.randn(1, 3, 64, 64)
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("cut", [0, 4, 100, -1000])
def test_a_truncated_file_is_refused(saved, tmp_path, cut):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(AugmentError, match="safetensors file"):
        augment_cli.load(path)


def test_files_that_are_not_ours_are_refused(tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(2)}, plain)
    with pytest.raises(AugmentError, match="no converted model: its metadata have no 'augment'"):
        augment_cli.load(plain)
    text = tmp_path / "text.safetensors"
    text.write_text("this is not a checkpoint at all, whatever its name may say")
    with pytest.raises(AugmentError, match="no safetensors file, or cut short"):
        augment_cli.load(text)
    with pytest.raises(AugmentError, match="no such file"):
        augment_cli.load(tmp_path / "none.safetensors")
    with pytest.raises(AugmentError, match=r"no model\.safetensors in this folder"):
        augment_cli.load(tmp_path)
    torch.save({"w": torch.zeros(2)}, tmp_path / "torch.safetensors")
    with pytest.raises(AugmentError, match="no safetensors file"):
        augment_cli.load(tmp_path / "torch.safetensors")


def test_a_header_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 40 * 2**20) + b"{")
        file.truncate(41 * 2**20)
    with pytest.raises(AugmentError, match="a header of 41,943,040 bytes is refused"):
        augment_cli.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=2), "has schema 2, and this version reads 1: install a newer augment-cli"),
        (lambda d: "{", "metadata are not JSON"),
        (lambda d: "[1]", "metadata are not JSON: no object"),
        (lambda d: d.update(code="import os"), "unknown key code"),
        (lambda d: d["plan"].update(model="/etc/passwd"), "'/etc/passwd' is not in timm's registry"),
        (lambda d: d["plan"].update(model="hf-hub:someone/else"), "is not in timm's registry"),
        (lambda d: d["plan"].update(model="augmented"), "is not in timm's registry"),
        (lambda d: d["plan"].update(model="vgg11"), r"VGG has no convolution layer1\.0\.conv1"),
        (lambda d: d["plan"].update(model="resnet34"), "tensors do not fit its plan"),
        (
            lambda d: d["plan"].update(model_args={"num_classes": 10}),
            r"fc\.bias: \(1000,\) in the file, \(10,\) by the plan",
        ),
        (lambda d: d["plan"].update(model_args={"checkpoint_path": "/x"}), "checkpoint_path cannot be set"),
        (lambda d: d["plan"].update(model_args={"nonsense": 1}), "unexpected keyword argument 'nonsense'"),
        (lambda d: d["plan"]["sites"][0]["split"].update(key_channels=28), "tensors do not fit its plan"),
        (lambda d: d["plan"]["sites"][0].update(resolution=[8192, 8192]), "not a multiple of one call"),
        (lambda d: d["plan"]["sites"][0].update(resolution=[10**6, 10**6]), "less than or equal to 8192"),
        (lambda d: d["plan"]["sites"][0].update(name="fc"), "has no convolution fc"),
        (lambda d: d["plan"].update(sites=d["plan"]["sites"][1:]), "tensors do not fit its plan"),
    ],
)
def test_metadata_that_do_not_fit_are_refused_with_the_reason(saved, tmp_path, change, message):
    path = rewritten(saved, tmp_path / "changed.safetensors", change)
    with pytest.raises(AugmentError, match=message):
        augment_cli.load(path)


def test_nothing_is_executed_or_unpickled_while_loading(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    augment_cli.load(saved)


def test_channels_last_weights_are_saved_as_the_same_values(tmp_path):
    model, metadata = converted()
    save_weights(model.to(memory_format=torch.channels_last), metadata, tmp_path / "m.safetensors")
    again = augment_cli.load(tmp_path / "m.safetensors").state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
