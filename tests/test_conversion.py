"""The library's calls leave the caller's process as it was."""

import logging
import random

import numpy as np
import pytest
import survey
import torch

import augment_cli
from augment_cli.errors import AugmentError


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), logging_level()


def logging_level() -> int:
    return logging.getLogger("timm").level


@pytest.fixture
def file(tmp_path):
    from typer.testing import CliRunner

    from augment_cli.cli import app

    assert CliRunner().invoke(app, ["convert", "test_resnet", "-o", str(tmp_path / "m")]).exit_code == 0
    return tmp_path / "m"


def test_converting_changes_neither_random_state_nor_logger(monkeypatch):
    monkeypatch.setattr(logging.getLogger("timm"), "level", logging.INFO)
    before = states()
    augment_cli.convert("test_resnet", "aa", seed=3)
    assert states() == before
    with pytest.raises(AugmentError):
        augment_cli.convert("test_resnet", "aa", nonsense=1)
    assert states() == before


def test_loading_checking_and_surveying_change_neither(file, monkeypatch):
    from augment_cli.checkpoint.check import verify_file

    monkeypatch.setattr(logging.getLogger("timm"), "level", logging.INFO)
    before = states()
    augment_cli.load(file)
    verify_file(file)
    survey.survey("test_resnet")
    assert states() == before


def test_the_seed_alone_says_what_the_weights_are():
    torch.manual_seed(1)
    first = augment_cli.convert("test_resnet", "aa", seed=5).state_dict()
    torch.manual_seed(2)
    random.seed(2)
    second = augment_cli.convert("test_resnet", "aa", seed=5).state_dict()
    other = augment_cli.convert("test_resnet", "aa", seed=6).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    drawn = [name for name, value in first.items() if value.is_floating_point() and value.unique().numel() > 2]
    assert any("qkv" in name for name in drawn)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_weights_that_are_not_finite_are_refused_before_conversion(monkeypatch):
    create = augment_cli.conversion.source.create

    def broken(*args, **kwargs):
        model = create(*args, **kwargs)
        model.fc.bias.data[3] = float("nan")
        return model

    monkeypatch.setattr(augment_cli.conversion.source, "create", broken)
    with pytest.raises(AugmentError, match=r"fc\.bias is not finite in 1 of its"):
        augment_cli.convert("test_resnet", "aw")
