"""Exported files, run in the runtimes that they are for, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import augment_cli
from augment_cli.errors import AugmentError
from augment_cli.exporting import export as module
from augment_cli.exporting.export import export
from augment_cli.exporting.formats import format_of
from augment_cli.surgery.calibration import load_images
from tests.cli.helpers import ok, run

SIZE = (3, 48, 48)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    made = augment_cli.convert("test_resnet", "aa-aw", input_size=SIZE)
    for layer in made.modules():
        if isinstance(layer, augment_cli.AWConv2d):
            torch.nn.init.normal_(layer.expand.weight, std=0.2)
        if isinstance(layer, torch.nn.BatchNorm2d):  # timm starts the last one of a block at zero
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.1)
    return made


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".xml"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_file_gives_what_the_model_gives(model, tmp_path: Path, suffix: str, precision: str):
    found = export(model, tmp_path / f"m{suffix}", SIZE, precision=precision)
    assert found.difference < {"fp32": 1e-5, "fp16": 1e-2}[precision]
    assert found.agreement == 100
    told = json.loads((tmp_path / f"m{suffix}.json").read_text())
    assert told["plan_sha256"] == model.augment_metadata.plan.digest()
    assert told["input_size"] == list(SIZE)


def test_an_onnx_file_says_what_it_is_and_takes_any_batch(model, tmp_path: Path):
    import onnx
    import onnxruntime

    export(model, tmp_path / "m.onnx", SIZE)
    entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert entries["augment.plan_sha256"] == model.augment_metadata.plan.digest()
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 7):
        images = torch.randn(batch, *SIZE)
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            wanted = model.eval()(images).numpy()
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".xml"])
def test_a_file_for_images_of_any_size_gives_what_the_model_gives(model, tmp_path: Path, suffix: str):
    found = export(model, tmp_path / f"m{suffix}", (3, 64, 64), dynamic="batch,size")
    assert found.difference < 1e-5
    assert found.stride == 32
    run = format_of(tmp_path / f"m{suffix}").run(tmp_path / f"m{suffix}")
    images = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        wanted = model.eval()(images).numpy()
    np.testing.assert_allclose(run(images.numpy()), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_int8_is_quantised_on_images(model, image_folder: Path, tmp_path: Path, suffix: str, capsys):
    images = load_images(str(image_folder), model, SIZE, 24)
    found = export(model, tmp_path / f"m{suffix}", SIZE, precision="int8", calibration=images)
    assert 1e-4 < found.difference < 0.5
    assert export(model, tmp_path / f"plain{suffix}", SIZE).difference < found.difference
    assert not capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_int8_makes_a_model_with_attention_smaller(image_folder: Path, tmp_path: Path, suffix: str):
    model = augment_cli.convert("test_resnet", "aa", input_size=SIZE)
    images = load_images(str(image_folder), model, SIZE, 24)
    sizes = {}
    for precision in ("fp32", "int8"):
        file = tmp_path / f"{precision}{suffix}"
        export(model, file, SIZE, precision=precision, calibration=images)
        sizes[precision] = file.with_suffix(format_of(file).parts[-1]).stat().st_size
    assert sizes["int8"] < 0.6 * sizes["fp32"]


def test_openvino_sends_no_reports(image_folder: Path, tmp_path: Path):
    """OpenVINO and NNCF report their use unless told not to; before they do, they make a folder in the home folder."""
    code = "\n".join(
        (
            "import sys, augment_cli",
            "model = augment_cli.convert('test_resnet', 'aa', input_size=(3, 48, 48))",
            "augment_cli.export(model, sys.argv[1], precision='int8', calibrate=sys.argv[2], calibrate_images=24)",
        )
    )
    home = tmp_path / "home"
    home.mkdir()
    settings = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
    command = [sys.executable, "-c", code, str(tmp_path / "m.xml"), str(image_folder)]
    subprocess.run(command, check=True, env=settings | {"HOME": str(home)})
    assert (tmp_path / "m.bin").exists()
    assert not (home / "intel").exists()


def test_a_file_that_differs_too_much_is_not_written(model, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "_run_all", lambda run, images, kind: np.zeros((len(images), 1000), np.float32))
    with pytest.raises(AugmentError, match="tolerance"):
        export(model, tmp_path / "m.onnx", SIZE)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_reports(in_tmp: Path):
    ok("convert", "test_resnet", "--recipe", "aa", "--img-size", "48", "-o", "m.safetensors")
    told = json.loads(ok("export", "m.safetensors", "-o", "m.pt2", "--json").stdout)
    assert told["difference"] < 1e-5
    assert Path("m.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("m.tflite",), "onnx"),
        (("m.onnx", "--dynamic", "batch,size", "--img-size", "72"), "--img-size"),
        (("m.onnx", "--dynamic", "size"), "batch,size"),
        (("m.onnx", "--precision", "int8"), "--calibrate"),
        (("m.pt2", "--precision", "int8"), "fp16"),
        (("m.onnx", "--precision", "fp8"), "fp16"),
        (("m.onnx", "--opset", "9"), "opset"),
        (("m.onnx", "--tolerance", "0"), "tolerance"),
    ],
)
def test_what_cannot_be_exported_is_refused(in_tmp: Path, arguments: tuple[str, ...], word: str):
    assert word in run("export", "test_resnet", "-o", *arguments).stderr
    assert not list(in_tmp.iterdir())


def test_a_format_whose_packages_are_missing_names_the_extra(in_tmp: Path, monkeypatch):
    monkeypatch.setattr("augment_cli.exporting.formats.find_spec", lambda name: None)
    with pytest.raises(AugmentError, match=r"augment-cli\[export\]"):
        export(torch.nn.Identity(), in_tmp / "m.onnx", SIZE)


STOPPED = """
import os, signal, torch
from augment_cli import signals
from augment_cli.exporting import export as module
write = module.write_file
module.write_file = lambda *args: (write(*args), os.kill(os.getpid(), signal.SIGTERM))
signals.install()
try:
    module.export(torch.nn.Conv2d(3, 4, 1), "m.pt2", (3, 8, 8))
except signals.Stopped as stop:
    print(stop.exit_code)
"""


def test_a_signal_between_its_files_waits_for_the_last(tmp_path):
    made = subprocess.run([sys.executable, "-c", STOPPED], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.stdout == f"{128 + 15}\n", made.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt2", "m.pt2.json"]
