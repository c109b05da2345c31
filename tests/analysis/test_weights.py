"""Checkpoints as people have them: which weights are taken out of them, and what is refused."""

import argparse
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3

from augment_cli.analysis import source
from augment_cli.analysis.source import load_checkpoint
from augment_cli.checkpoint.metadata import read_metadata
from augment_cli.errors import AugmentError
from tests.cli.helpers import ok, run

NAME = "test_resnet"


def model(**arguments):
    return timm.create_model(NAME, **arguments)


def equal(a, b) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture
def trained_by_timm(tmp_path):
    """The file that timm's train.py writes: weights, their average, optimiser, and its arguments in a Namespace."""
    trained = model()
    ema = ModelEmaV3(trained, decay=0.5)
    with torch.no_grad():
        ema.module.conv1[0].weight.mul_(2)
    arguments = argparse.Namespace(model=NAME, lr=0.1, opt="sgd", scale=[0.08, 1.0])
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(trained, optimizer, arguments, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, metric=71.2)
    return trained, ema.module, tmp_path / "last.pth.tar"


@pytest.mark.parametrize(("ema", "average"), [(None, True), (True, True), (False, False)])
def test_what_timms_train_script_writes_is_loaded_and_named(trained_by_timm, ema, average):
    trained, averaged, path = trained_by_timm
    loaded = model()
    notes = load_checkpoint(loaded, path, ema)
    assert equal((averaged if average else trained).state_dict(), loaded.state_dict())
    assert notes.startswith("checkpoint last.pth.tar")
    assert ("not the moving average" in notes) is not average


def test_an_average_that_timm_left_empty_is_no_average(tmp_path):
    torch.save({"state_dict": model().state_dict(), "state_dict_ema": None}, tmp_path / "a.pth")
    assert load_checkpoint(model(), tmp_path / "a.pth") == "checkpoint a.pth"
    with pytest.raises(AugmentError, match="no moving average"):
        load_checkpoint(model(), tmp_path / "a.pth", ema=True)


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "net.backbone.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.module."]
)
def test_names_that_wrappers_put_before_a_models_own_are_taken_off(tmp_path, prefix):
    trained = model()
    state_dict = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state_dict, "epoch": 3}, tmp_path / "a.ckpt")
    loaded = model()
    assert load_checkpoint(loaded, tmp_path / "a.ckpt") == "checkpoint a.ckpt"
    assert equal(trained.state_dict(), loaded.state_dict())


def test_lightning_with_a_loss_and_an_average_of_its_own(tmp_path):
    trained, averaged = model(), model()
    state_dict = {f"model.{name}": value for name, value in trained.state_dict().items()}
    state_dict |= {f"ema_model.module.{name}": value for name, value in averaged.state_dict().items()}
    state_dict["loss.weight"] = torch.ones(1000)
    torch.save({"state_dict": state_dict, "hyper_parameters": {"lr": 0.1}, "loops": {}}, tmp_path / "a.ckpt")
    for ema, expected in ((None, averaged), (True, averaged), (False, trained)):
        loaded = model()
        notes = load_checkpoint(loaded, tmp_path / "a.ckpt", ema)
        assert equal(expected.state_dict(), loaded.state_dict())
        assert "other tensors left out" in notes


def test_the_average_of_torch_is_loaded(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(model())
    torch.save({"model_ema": averaged.state_dict(), "model": model().state_dict()}, tmp_path / "a.pth")
    loaded = model()
    assert "the moving average" in load_checkpoint(loaded, tmp_path / "a.pth")
    assert equal(averaged.module.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_single_and_that_is_said(tmp_path, dtype):
    trained = model()
    state_dict = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    save_file(state_dict, tmp_path / "a.safetensors")
    loaded = model()
    notes = load_checkpoint(loaded, tmp_path / "a.safetensors")
    assert f"{str(dtype).removeprefix('torch.')} made float32" in notes
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    state_dict = model().state_dict()
    state_dict["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    torch.save(state_dict, tmp_path / "a.pth")
    with pytest.raises(AugmentError, match=r"layer2\.0\.conv1\.weight is not finite in 1 of its"):
        load_checkpoint(model(), tmp_path / "a.pth")


def test_another_number_of_classes_says_what_to_give(tmp_path):
    torch.save(model(num_classes=10).state_dict(), tmp_path / "a.pth")
    with pytest.raises(AugmentError, match=r"10 classes, and the model 1000: add the argument `num_classes=10`"):
        load_checkpoint(model(), tmp_path / "a.pth")
    torch.save(model(num_classes=0).state_dict(), tmp_path / "b.pth")
    with pytest.raises(AugmentError, match=r"no classifier: .*num_classes=0"):
        load_checkpoint(model(), tmp_path / "b.pth")


def test_another_architecture_with_other_classes_is_told_as_such(tmp_path):
    torch.save(timm.create_model("resnet18", num_classes=10).state_dict(), tmp_path / "a.pth")
    with pytest.raises(AugmentError, match=r"does not fit ResNet: .*unexpected"):
        load_checkpoint(model(), tmp_path / "a.pth")


class Code:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("contents", [{"model": Code()}, timm.create_model(NAME), {"state_dict": {}, "c": Code()}])
def test_code_is_refused_without_advice_to_run_it(tmp_path, capsys, contents, new):
    torch.save(contents, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(AugmentError, match="would run code") as caught:
        load_checkpoint(model(), tmp_path / "a.pth")
    for advice in ("weights_only", "add_safe_globals", "trust", "arbitrary"):
        assert advice not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


def test_a_bare_pickle_and_a_torchscript_archive_are_refused_without_advice(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": Code()}))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        with pytest.raises(AugmentError, match="cannot be read") as caught:
            load_checkpoint(model(), tmp_path / name)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "contents",
    [{1: torch.ones(2), None: torch.ones(3)}, [1, 2], {"state_dict": {"a": 3}}, {"a": "b"}, 3, {"state_dict": None}],
)
def test_what_holds_no_state_dict_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(AugmentError, match="holds no state dict"):
        load_checkpoint(model(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    "value",
    [torch.zeros(2, 2).to_sparse(), torch.empty(2, device="meta"), torch.zeros(1).expand(10**6, 10**6)],
    ids=["sparse", "meta", "huge"],
)
def test_tensors_that_are_none_of_the_models_are_refused(tmp_path, value):
    torch.save(model().state_dict() | {"fc.weight": value}, tmp_path / "a.pth")
    with pytest.raises(AugmentError, match=r"does not fit ResNet|cannot be read"):
        load_checkpoint(model(), tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["starnet_s050.untrained", "resnet18", "resnet18.a1_in1k"])
def test_names_with_and_without_weights_are_taken(name):
    assert source.describe(name)[0].name == name


def test_a_converted_model_is_no_source(in_tmp):
    ok("convert", NAME, "-o", "a.safetensors")
    with pytest.raises(AugmentError, match="converted model already"):
        load_checkpoint(model(), in_tmp / "a.safetensors")


@pytest.mark.parametrize(("flag", "note"), [((), "the moving average"), (("--no-ema",), "not the moving average")])
def test_which_weights_were_taken_is_said_and_written_into_file_and_card(trained_by_timm, in_tmp, flag, note):
    result = ok("convert", NAME, "--checkpoint", "last.pth.tar", *flag, "-o", "out")
    assert f"source weights: checkpoint last.pth.tar, {note} of its weights" in result.stderr
    assert f"checkpoint last.pth.tar, {note} of its weights" in (in_tmp / "out" / "README.md").read_text()
    assert read_metadata(in_tmp / "out").weights == f"checkpoint last.pth.tar, {note} of its weights"


def test_ema_without_a_checkpoint_is_refused(in_tmp):
    for flag in ("--ema", "--no-ema"):
        result = run("convert", NAME, flag)
        assert result.exit_code == 2
        assert f"{flag} is for --checkpoint" in result.stderr
