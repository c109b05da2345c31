"""`make gpu`, rehearsed on the CPU, and what its driver does when parts fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_parts  # noqa: E402
from gpu_rows import Rows  # noqa: E402
from gpu_targets import TARGETS, markdown, targets  # noqa: E402

from tests.layers.helpers import needs_triton  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))  # its modules have names that other packages look for

PROGRAM = [sys.executable, ROOT / "benchmarks" / "gpu.py"]


def call(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Run the program; what it did, and the results."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, "--rehearse", "--results", folder, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    path = folder / "gpu-rehearsal.json"
    return done, json.loads(path.read_text()) if path.exists() else {}


@needs_triton
def test_a_rehearsal_measures_everything_that_targets_name(tmp_path):
    parts = ("tests", "layers", "models", "detection", "fit", "finetune", "tune")
    done, found = call(tmp_path, "--one-process", "--parts", *parts, "--budget", "600")
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    assert {part for part, rows in found["rows"].items() if rows} == set(parts)
    assert all(row["measured"] is not None for row in found["targets"])
    assert found["rows"]["tests"]["tests/gpu"]["passed"] == 2
    assert found["rows"]["finetune"]["finetune --precision bf16"]["images_per_second"] > 0
    assert "| target |" in done.stdout


def test_a_machine_without_a_gpu_is_told_what_it_can_do(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert "--rehearse" in str(stop.value)


@pytest.mark.parametrize("budget", [["soon"], ["layer=30"], ["layers=x"]])
def test_a_budget_that_cannot_be_read_is_refused(budget, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--budget", *budget])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2
    assert "--budget" in capsys.readouterr().err


def test_budgets_keep_to_ten_minutes():
    assert sum(seconds for part, seconds in gpu_parts.SECONDS.items() if part != "tune") < 600
    assert gpu.budgets(["100", "models=7"]) == dict.fromkeys(gpu_parts.PARTS, 100) | {"models": 7}


FAKE = """
import sys
sys.path[:0] = ["{benchmarks}"]
import gpu, gpu_parts

def fail():
    raise ValueError("no such luck")

def die():
    import os
    os._exit(9)

def wait():
    import time
    time.sleep(600)

def count():
    with open("{count}", "a") as file:
        file.write("x")
    return {{"figure": 1.5}}

gpu_parts.PARTS["layers"] = lambda call: [("a", fail), ("b", die), ("c", count), ("d", count), ("e", {last})]
gpu_parts.PARTS["fit"] = lambda call: fail()
gpu_parts.PARTS["models"] = lambda call: [("f", count)]
gpu.GRACE = 1
gpu.__file__ = __file__
gpu.describe = lambda options: {{"card": {{"name": "rehearsal"}}}}
sys.exit(gpu.main())
"""


def fake(folder: Path, *arguments: str, last: str = "count") -> tuple[subprocess.CompletedProcess, Rows, int]:
    """The driver with other parts; what it did, the results, and how often `count` has run."""
    script, counts = folder / "fake.py", folder / "counts"
    script.write_text(FAKE.format(benchmarks=ROOT / "benchmarks", count=counts, last=last))
    command = [
        sys.executable,
        str(script),
        "--rehearse",
        "--results",
        str(folder),
        "--parts",
        "layers",
        "fit",
        "models",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    return done, Rows(folder / "gpu-rehearsal.json"), len(counts.read_text())


def test_what_fails_or_dies_stops_nothing_else_and_is_tried_again(tmp_path):
    done, rows, count = fake(tmp_path)
    assert done.returncode == 1
    assert count == 4
    failures = [("layers", "a", "ValueError"), ("layers", "b", "Died"), ("fit", "start", "ValueError")]
    assert [(part, key, error["class"]) for part, key, error in rows.failures()] == failures
    assert rows.part("layers")["a"]["error"]["message"] == "no such luck"
    assert rows.part("models")["f"]["figure"] == 1.5
    assert "ValueError: no such luck" in done.stdout
    shown = subprocess.run([*PROGRAM, "--show", "--results", tmp_path], capture_output=True, text=True, check=True)
    assert "figure 1.5" in shown.stdout
    _, rows, count = fake(tmp_path)
    assert count == 4  # what was measured is not measured again
    assert len(rows.failures()) == len(failures)
    *_, count = fake(tmp_path, "--again")
    assert count == 8


def test_a_part_that_hangs_is_killed_and_says_what_it_left_out(tmp_path):
    done, rows, _ = fake(tmp_path, "--budget", "layers=3", last="wait")
    assert rows.part("layers")["e"]["error"]["class"] == "Died"
    assert "time was over" in rows.part("layers")["e"]["error"]["message"]
    assert "f" in rows.part("models")
    done, rows, _ = fake(tmp_path, "--budget", "0", "--again")
    assert rows.left_out("models") == ["f"]
    assert "Left out for want of time: f" in done.stdout


def test_targets_without_results_are_not_measured(tmp_path):
    rows = Rows(tmp_path / "nothing.json")
    assert [row["measured"] for row in targets(rows)] == [None] * len(TARGETS)
    assert markdown(rows).count("not measured") == len(TARGETS)


@pytest.mark.parametrize(("speed", "held"), [(0.93, True), (0.91, False)])
def test_a_target_is_held_or_not(speed, held, tmp_path):
    rows = Rows(tmp_path / "some.json")
    target = TARGETS[0]
    figures = {"AA-ResNet-50": {"speed_against_source": {"median": speed}}}
    rows.put(target.part, target.key, {"by": figures, "call": "1", "commit": "x"})
    assert targets(rows)[0]["held"] is held


def test_memory_that_a_rival_does_not_get_is_a_finding(tmp_path):
    rows = Rows(tmp_path / "some.json")
    rival = {"error": {"class": "OutOfMemoryError", "message": "CUDA out of memory"}}
    rows.put("layers", "AA 56", {"by": {"timm": rival, "triton": {"milliseconds": {"median": 1.0}}}, "call": "1"})
    assert not rows.failures()
    assert "failed: OutOfMemoryError" in markdown(rows)
    rows.put("layers", "AA 28", {"by": {"flex": {"error": {"class": "RuntimeError", "message": "no"}}}, "call": "1"})
    assert [key for _, key, _ in rows.failures()] == ["AA 28 / flex"]
