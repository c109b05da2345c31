"""Scripts of the shape of timm's own, which call what those call, run converted models."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import augment_cli

SCRIPTS = Path(__file__).parent / "timm_scripts"
CLASSES = ("--num-classes", "3")


def outcome(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)


def script(name: str, *arguments) -> subprocess.CompletedProcess:
    """`augment timm` on one of the scripts, which succeeds."""
    done = outcome("-m", "augment_cli", "timm", SCRIPTS / f"{name}.py", "--", *arguments)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def trained(model, images, tmp_path_factory) -> Path:
    """A folder of train.py's checkpoints after two epochs."""
    output = tmp_path_factory.mktemp("timm")
    found = script("train", *named(model), "--pretrained", *CLASSES, "--data-dir", images, "--output", output)
    (output / "printed.json").write_text(found.stdout)
    return output


def named(model: Path) -> tuple[str, str]:
    return "--model", f"local-dir:{model}"


def test_train_trains_a_converted_model_either_way(model, images, trained, tmp_path):
    arguments = (*named(model), "--pretrained", *CLASSES, "--data-dir", images, "--output", tmp_path)
    unaware = outcome(SCRIPTS / "train.py", *arguments)
    assert unaware.returncode != 0
    assert "augmented" in unaware.stderr
    plugged = outcome(SCRIPTS / "train.py", *arguments, "--device-modules", "augment_cli.checkpoint.timm_plugin")
    assert plugged.returncode == 0, plugged.stderr
    assert plugged.stdout == (trained / "printed.json").read_text()
    found = json.loads(plugged.stdout)
    assert (len(found["losses"]), found["size"], found["type"]) == (8, [3, 32, 32], "ResNet")


def test_checkpoints_are_averaged_validated_and_predicted_with(model, images, trained, tmp_path):
    averaged = tmp_path / "averaged.pth"
    assert script("avg_checkpoints", "--input", trained, "--output", averaged).stdout == "2\n"
    options = (*named(model), *CLASSES, "--data-dir", images)
    best = ("--checkpoint", trained / "model_best.pth.tar", "--use-ema", "--channels-last")
    found = json.loads(script("validate", *options, *best).stdout)
    assert found["size"] == [3, 32, 32]
    assert 0 <= found["top1"] <= 100
    predicted = json.loads(script("inference", *options, "--checkpoint", averaged).stdout)
    assert len(predicted) == 12
    assert set(predicted.values()) <= {0, 1, 2}


def test_a_checkpoint_of_train_becomes_a_converted_folder_again(model, trained, tmp_path):
    """The same classes: timm loads the weights into the converted model, and augment saves it."""
    loaded = timm.create_model(f"local-dir:{model}", num_classes=3, checkpoint_path=str(trained / "last.pth.tar"))
    x = torch.randn(1, 3, 32, 32)
    kept = augment_cli.load(model)
    state = {key: value for key, value in loaded.state_dict().items() if not key.startswith("fc.")}
    kept.load_state_dict(state, strict=False)
    augment_cli.save(kept, tmp_path / "m")
    again = augment_cli.load(tmp_path / "m")
    assert torch.equal(again.eval().forward_features(x), loaded.eval().forward_features(x))


def test_validate_takes_the_folder_itself(model, images):
    found = json.loads(script("validate", *named(model), "--pretrained", "--data-dir", images, "--reparam").stdout)
    assert found["size"] == [3, 32, 32]


def test_validate_with_torchscript_says_what_to_use(model, images):
    done = outcome(
        "-m", "augment_cli", "timm", SCRIPTS / "validate.py", "--", *named(model), "--torchscript", "--data-dir", images
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: torch.jit.script cannot express AAConv2d: use augment export"
    )


def test_benchmark_times_inference_and_a_training_step(model):
    found = json.loads(script("benchmark", *named(model), "--precision", "bfloat16").stdout)
    assert found["param_count"] == augment_cli.load(model).augment_metadata.plan.params_after
    assert found["infer_step_time"] > 0
    assert found["train_step_time"] > 0


def test_onnx_export_by_the_newer_exporter(model, tmp_path):
    script("onnx_export", tmp_path / "m.onnx", *named(model), "--dynamo", "--img-size", 32, "--num-classes", 1000)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    x = torch.randn(3, 3, 32, 32)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = augment_cli.load(model).eval()(x)
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_onnx_export_by_the_older_exporter_says_what_to_use(model, tmp_path):
    arguments = (tmp_path / "m.onnx", *named(model), "--img-size", 32, "--num-classes", 1000)
    done = outcome("-m", "augment_cli", "timm", SCRIPTS / "onnx_export.py", "--", *arguments)
    assert done.returncode == 2
    assert "--dynamo" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "m.onnx").exists()


def test_a_missing_script_is_named(tmp_path):
    done = outcome("-m", "augment_cli", "timm", tmp_path / "train.py")
    assert done.returncode == 2
    assert "train.py: no such script" in done.stderr


def test_a_script_ends_with_its_own_exit_code(tmp_path):
    (tmp_path / "exits.py").write_text("import sys; print(sys.argv); sys.exit(3)")
    result = outcome("-m", "augment_cli", "timm", tmp_path / "exits.py", "--", "--epochs", "2")
    assert result.returncode == 3
    assert result.stdout == f"['{tmp_path}/exits.py', '--epochs', '2']\n"


def test_a_script_sees_to_ctrl_c_itself(tmp_path):
    code = (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('seen')"
    )
    (tmp_path / "stops.py").write_text(code)
    command = [sys.executable, "-m", "augment_cli", "timm", str(tmp_path / "stops.py")]
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert (result.returncode, result.stdout) == (0, "seen\n")
