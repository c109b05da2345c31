"""What is kept of an analysis is what an analysis finds, and a damaged file is as good as none."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from augment_cli.analysis import cache
from augment_cli.analysis.cache import look
from augment_cli.errors import AugmentError
from tests.cli.helpers import ok


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of analyses."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "analyses"


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were analysed anew."""
    names, find = [], cache._find
    monkeypatch.setattr(cache, "_find", lambda name, *rest: (names.append(name), find(name, *rest))[1])
    return names


def test_a_model_is_analysed_once_for_each_question(kept, analysed):
    for _ in range(2):
        for question in (
            ("test_resnet",),
            ("test_resnet", {"num_classes": 3}),
            ("test_resnet", {}, (64, 96)),
            ("vit_tiny_patch16_224", {"act_layer": None}, (64, 64)),
        ):
            assert look(*question) == look(*question, cached=False)
    assert analysed.count("test_resnet") == 3 + 6  # the six of cached=False
    assert len(list(kept.iterdir())) == 4


def test_errors_are_told_each_time(kept, analysed):
    for _ in range(2):
        with pytest.raises(AugmentError):
            look("test_resnet", {"no_such": 1})
    assert len(analysed) == 2


def test_other_versions_ask_anew(kept, analysed, monkeypatch):
    look("test_resnet")
    monkeypatch.setattr(cache, "_versions", lambda: ["of tomorrow"])
    look("test_resnet")
    assert len(analysed) == 2


def _rewritten(file: Path, change) -> None:
    """The file with other contents under a right digest."""
    data = json.loads(file.read_text().partition("\n")[2])
    change(data)
    text = json.dumps(data)
    file.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


CHANGES = [
    lambda data: data.pop("source"),
    lambda data: data["source"].update(base="other"),
    lambda data: data["source"].update(name="local-dir:there"),
    lambda data: data["source"].update(input_size=[3, 8, 8]),
    lambda data: data["source"].update(args={"pretrained": True}),
    lambda data: data["analysis"].update(params=-1),
    lambda data: data["analysis"]["sites"][0].update(in_channels=10**30),
    lambda data: data["analysis"]["sites"][0].update(groups=5),
    lambda data: data["analysis"]["sites"].append(data["analysis"]["sites"][0]),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_says_what_no_analysis_finds_is_none(kept, analysed, change):
    expected = look("test_resnet")
    (file,) = kept.iterdir()
    _rewritten(file, lambda data: None)
    assert look("test_resnet") == expected
    assert len(analysed) == 1
    _rewritten(file, change)
    assert look("test_resnet") == expected
    assert len(analysed) == 2


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b"abc\n{}", b"[" * 10_000])
def test_a_damaged_file_is_none(kept, analysed, content):
    expected = look("test_resnet")
    (file,) = kept.iterdir()
    file.write_bytes(content)
    assert look("test_resnet") == expected
    flipped = bytearray(file.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(flipped)
    assert look("test_resnet") == expected
    assert len(analysed) == 3


def test_a_folder_that_refuses_is_no_error(tmp_path, monkeypatch, analysed):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv(cache.VARIABLE, str(place))
        look("test_resnet")
    assert len(analysed) == 2


def test_a_model_that_others_have_registered_is_looked_at_each_time(kept, analysed, monkeypatch):
    look("test_resnet")

    def test_resnet(pretrained=False, **kwargs):
        return timm.models.resnet.resnet10t(pretrained, **kwargs)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "test_resnet", test_resnet)
    for _ in range(2):
        assert look("test_resnet")[1].params > 5e6
    assert len(analysed) == 3
    monkeypatch.undo()
    monkeypatch.setenv(cache.VARIABLE, str(kept.parent))
    assert look("test_resnet")[1].params < 5e5


def test_only_the_newest_answers_are_kept(kept, monkeypatch):
    monkeypatch.setattr(cache, "_MOST_FILES", 2)
    for side in (32, 64, 96):
        look("test_resnet", {}, (side, side))
    assert len(list(kept.iterdir())) == 2


def test_without_a_cache_nothing_is_kept(kept, analysed):
    ok("plan", "test_resnet", "--no-cache")
    assert not kept.exists()
    for _ in range(2):
        ok("plan", "test_resnet")
    assert len(analysed) == 2


def test_a_model_seen_before_is_planned_without_torch(kept):
    look("test_resnet")
    code = (
        "import sys; from typer.testing import CliRunner; from augment_cli.cli import app\n"
        "result = CliRunner().invoke(app, sys.argv[1:])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert not {'torch', 'timm'} & sys.modules.keys()\n"
    )
    for arguments in (("plan", "test_resnet", "--set", "budget.params=keep"), ("plan", "test_resnet", "--json")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, env=os.environ
        )
        assert done.returncode == 0, done.stderr
