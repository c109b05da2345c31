"""augment convert --init fit: what a user sees."""

import json
from pathlib import Path

import pytest

from augment_cli.checkpoint.metadata import read_metadata
from tests.cli.helpers import ok, run
from tests.surgery.test_calibration import picture_folder

CONVERT = ("convert", "test_resnet", "-r", "aa", "--img-size", "32")


@pytest.fixture
def pictures(in_tmp: Path) -> Path:
    return picture_folder(in_tmp / "pictures", 30)


def test_a_fitted_model_says_how_near_it_is_to_its_source(pictures, in_tmp):
    result = ok(*CONVERT, "--init", "fit", "--calibrate", "pictures", "-o", "out")
    assert "Error" in result.stdout
    assert "6 held-out calibration images" in result.stdout
    metadata = read_metadata(in_tmp / "out")
    assert {record.kind for record in metadata.inheritance} == {"fitted"}
    assert all(record.error >= 0 for record in metadata.inheritance)
    assert (metadata.fidelity.images, metadata.fidelity.fitted_on) == (6, 24)
    data = json.loads(ok("report", "out", "--format", "json").stdout)
    assert data["fidelity"] == metadata.fidelity.model_dump()
    assert [site["inheritance"]["error"] for site in data["sites"]] == [r.error for r in metadata.inheritance]
    card = (in_tmp / "out" / "README.md").read_text()
    assert "Fitted, not fine-tuned" in card
    assert "untrained" not in card
    assert "passed" in ok("check", "out", "--json").stdout


def test_the_same_command_writes_the_same_bytes(pictures, in_tmp):
    for name in ("a", "b"):
        ok(*CONVERT, "--init", "fit", "--calibrate", "pictures", "-o", f"{name}.safetensors")
    assert (in_tmp / "a.safetensors").read_bytes() == (in_tmp / "b.safetensors").read_bytes()


def test_carry_is_the_default_and_has_no_error(in_tmp):
    ok(*CONVERT, "-o", "m.safetensors")
    metadata = read_metadata(in_tmp / "m.safetensors")
    assert {(record.kind, record.error) for record in metadata.inheritance} == {("carried", None)}
    assert metadata.fidelity is None


BAD = [
    (("--init", "fit"), "--init fit needs images to fit on"),
    (("--calibrate", "pictures"), "--calibrate and --calibrate-images are for --init fit"),
    (("--calibrate-images", "9"), "--calibrate and --calibrate-images are for --init fit"),
    (("--init", "fit", "--calibrate", "none"), "data none: no such folder"),
    (("--init", "fit", "--calibrate", "empty"), "is an empty folder"),
    (("--init", "fit", "--calibrate", "pictures", "--calibrate-images", "0"), "--calibrate-images 0: give 20 at least"),
    (("--init", "fit", "--calibrate", "pictures", "-r", "aw"), "there is nothing to fit"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_message(pictures, in_tmp, arguments, message):
    (in_tmp / "empty").mkdir()
    result = run(*CONVERT, *arguments, "-o", "m.safetensors")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (in_tmp / "m.safetensors").exists()
