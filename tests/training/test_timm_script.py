"""A script of the shape of timm's train.py and validate.py runs converted models."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import argparse, importlib, json, sys
import torch
from timm import create_model
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
import neighbour

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--num-classes", type=int)
parser.add_argument("--device-modules", default=None, type=str, nargs="+")
parser.add_argument("--opt", default="sgd")
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--weight-decay", type=float, default=0.0)
parser.add_argument("--momentum", type=float, default=0.9)
args = parser.parse_args()
for module in args.device_modules or ():
    importlib.import_module(module)
torch.manual_seed(0)
torch.set_num_threads(1)
model = create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes)
config = resolve_data_config(vars(args), model=model)
dataset = create_dataset("", root=args.data_dir, split="validation")
loader = create_loader(dataset, config["input_size"], 4, num_workers=0, use_prefetcher=False, mean=config["mean"])
optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
losses = []
for images, labels in loader:
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(json.dumps({"losses": losses, "size": config["input_size"], "argv": sys.argv[0], "type": type(model).__name__}))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def outcome(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)


def test_a_script_trains_a_converted_model_either_way(script, model, images):
    arguments = ("--model", f"local-dir:{model}", "--pretrained", "--num-classes", "3", "--data-dir", images)
    unaware = outcome(script, *arguments)
    assert unaware.returncode != 0
    assert "augmented" in unaware.stderr
    plugged = outcome(script, *arguments, "--device-modules", "augment_cli.checkpoint.timm_plugin")
    wrapped = outcome("-m", "augment_cli", "timm", script, "--", *arguments)
    assert plugged.returncode == wrapped.returncode == 0, wrapped.stderr
    assert plugged.stdout == wrapped.stdout
    found = json.loads(wrapped.stdout)
    assert len(found["losses"]) == 3
    assert (found["size"], found["argv"], found["type"]) == ([3, 32, 32], str(script), "ResNet")


def test_a_script_ends_with_its_own_exit_code(tmp_path):
    (tmp_path / "exits.py").write_text("import sys; print(sys.argv[1:]); sys.exit(3)")
    result = outcome("-m", "augment_cli", "timm", tmp_path / "exits.py", "--", "--epochs", "2")
    assert result.returncode == 3
    assert result.stdout == "['--epochs', '2']\n"


def test_a_script_sees_to_ctrl_c_itself(tmp_path):
    code = (
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('seen')"
    )
    (tmp_path / "stops.py").write_text(code)
    command = [sys.executable, "-m", "augment_cli", "timm", str(tmp_path / "stops.py")]
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert (result.returncode, result.stdout) == (0, "seen\n")
