"""Detectors are trained by the one engine: resumed, averaged, in any precision, on several processes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import augment_cli as augment
from augment_cli.detection.assess import finetune
from augment_cli.detection.task import Detection
from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d
from augment_cli.training.finetune import finetune as classify
from augment_cli.training.settings import read_settings
from augment_cli.training.state import read_state
from tests.cli.helpers import ok, run
from tests.detection.conftest import in_process, short, summary, weights
from tests.training.conftest import short as short_classification
from tests.training.test_distributed import DEVICE, on_two_processes

# What every part of the state is needed for: moments, a moving average, groups of batches, sizes, crops and flips.
CHANGES = {
    "epochs": 3,
    "batch_size": 2,
    "accumulate": 2,
    "ema_decay": 0.9,
    "checkpoint_every": "2",
    "new_first": 1,
    "scales": (0.5, 1.5),
}

KILLED_AT_A_BATCH = """
import os
from augment_cli.training import engine
whole = engine._train_batch
def killed(run, *batch):
    if (run.epoch, run.batch) == (1, 5):
        os.kill(os.getpid(), 9)
    whole(run, *batch)
engine._train_batch = killed
"""


@pytest.fixture(scope="module")
def tuned(backbone, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "run"
    finetune(short(backbone, data, folder, **CHANGES))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_to_the_same_result_bit_for_bit(backbone, data, tuned, tmp_path, workers):
    settings = short(backbone, data, tmp_path / "run", **CHANGES, workers=workers)
    broken = in_process(settings, before=KILLED_AT_A_BATCH)
    assert broken.returncode == -9, broken.stderr
    assert read_state(tmp_path / "run/state.safetensors")["position"] == [1, 2, 4]
    finetune(settings, resume=True)
    assert weights(tmp_path / "run") == weights(tuned)
    assert summary(tmp_path / "run") == summary(tuned)


def test_a_run_leaves_all_that_a_user_looks_at(tuned, data):
    names = {path.name for path in tuned.iterdir()}
    assert names >= {
        "best.safetensors",
        "last.safetensors",
        "summary.csv",
        "curves.png",
        "examples.png",
        "settings.json",
    }
    assert summary(tuned)[0] == ["epoch", "train_loss", "val_ap", "val_ap50", "val_ap75", "lr"]
    assert len(summary(tuned)) == 4
    model = augment.load(tuned / "best.safetensors")
    assert type(model).__name__ == "RetinaNet"
    assert (model.augment_detector.classes, model.augment_detector.category_ids) == (("disc", "square"), (3, 7))
    assert model.augment_metadata.plan.recipe == "aa"
    assert "fine-tuned on" in model.augment_metadata.weights
    assert any(isinstance(m, AAConv2d) for m in model.modules())


def test_learning_rates_go_by_provenance(backbone, data, tmp_path, capfd):
    finetune(short(backbone, data, tmp_path / "run", epochs=1, lr_carried=0.0, lr_new=1.0, new_first=0, norm="frozen"))
    before, after = load_file(backbone), load_file(tmp_path / "run/last.safetensors")
    changed = {
        name for name, value in before.items() if not torch.equal(value, after.get(f"backbone.body.{name}", value))
    }
    assert changed
    assert all(part in name for name in changed for part in ["conv"])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} <= {"qkv", "proj", "conv1", "conv2"}
    assert not [name for name in changed if name.endswith("conv.weight") or "bn" in name or "downsample" in name]
    assert "0 for " in capfd.readouterr().err


def test_the_saved_state_says_which_parameters_are_new(tuned):
    kinds = read_state(tuned / "state.safetensors")["kinds"]
    new = {name for name, kind in kinds.items() if kind == "new"}
    assert {name.split(".")[0] for name in kinds} == {"backbone", "head"}
    assert all(name in new for name in kinds if name.startswith(("head.", "backbone.fpn.")))
    inside = {name for name in new if name.startswith("backbone.body.")}
    assert inside
    assert all(name.endswith(("qkv.weight", "proj.weight", "rel_height", "rel_width")) for name in inside)


def test_training_finds_what_it_is_shown(data, tmp_path):
    """A plain detector learns a dozen images by heart: the loss falls by half, and most boxes are found."""
    easy = {"crop_scale": 1.0, "scales": (1.0, 1.0), "flip": 0.0, "val_split": "train"}
    size = {"levels": (2, 3), "anchor_base": 12, "channels": 64}
    finetune(short("test_resnet", data, tmp_path / "run", epochs=25, lr=4e-3, **easy, **size))
    rows = summary(tmp_path / "run")[1:]
    assert float(rows[-1][1]) < 0.5 * float(rows[0][1])
    assert max(float(row[3]) for row in rows) > 20


@pytest.mark.parametrize("detector", ["fcos", "faster-rcnn", "mask-rcnn"])
def test_every_detector_trains_and_is_evaluated(detector, backbone, data, tmp_path):
    finetune(short(backbone, data, tmp_path / "run", detector=detector, epochs=1))
    arguments = ("--data", str(data), "--cpu", "-j", "0", "--json")
    scores = json.loads(ok("detect", "evaluate", str(tmp_path / "run/last.safetensors"), *arguments).stdout)
    assert scores["images"] == 6
    assert set(scores["boxes"]["classes"]) == {"disc", "square"}
    assert ("masks" in scores) == (detector == "mask-rcnn")


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"grad_checkpointing": True}])
def test_other_ways_to_run(changes, backbone, data, tmp_path):
    finetune(short(backbone, data, tmp_path / "run", epochs=1, **changes))
    assert math.isfinite(float(summary(tmp_path / "run")[1][1]))


def test_a_compiled_run_learns_the_same_on_images_of_any_size(backbone, data, tmp_path, monkeypatch):
    """Two graphs to train, one for the first size and one for all others, and the same names."""
    changes = {"batch_size": 2, "epochs": 1, "scales": (0.5, 1.5), "ema_decay": 0.5}
    finetune(short(backbone, data, tmp_path / "plain", **changes))
    whole, graphs = torch.nn.Module.compile, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend=count))
    finetune(short(backbone, data, tmp_path / "run", **changes, compile=True))
    assert len(graphs) == 2
    rows = [[float(row[1]) for row in summary(tmp_path / name)[1:]] for name in ("plain", "run")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)
    plain, other = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "run"))
    assert plain.keys() == other.keys()


def test_two_processes_give_the_losses_of_one_with_twice_the_batch(backbone, data, tmp_path):
    common = ("--data", data, "--detector", "retinanet", "--levels", "1,2,3", "--norm", "frozen", "--img-size", "64x96")
    common = (*common, *DEVICE, "--scales", "1,1", "--epochs", "2", "-j", "0", "--warmup-epochs", "0", "--opt", "sgd")
    start = ("detect", "finetune", backbone, *common)
    ok(*map(str, start), "-b", "4", "-o", str(tmp_path / "one"))
    two = on_two_processes(*start, "-b", "2", "-o", tmp_path / "two")
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("epoch 2/2: ") == 1
    a, b = summary(tmp_path / "one"), summary(tmp_path / "two")
    # The losses of an image are divided by its own boxes, and images are shared out evenly: means of means agree.
    assert [float(row[1]) for row in b[1:]] == pytest.approx([float(row[1]) for row in a[1:]], rel=1e-2)


def test_the_evaluation_is_that_of_the_training(tuned, data, tmp_path):
    """The command's table has the AP that the run's history has for its best epoch."""
    best = max(summary(tuned)[1:], key=lambda row: float(row[2]))
    common = ("--data", str(data), "--cpu", "-j", "0")
    result = ok("detect", "evaluate", str(tuned / "best.safetensors"), *common, "--json")
    scores = json.loads(result.stdout)["boxes"]
    assert [scores[key] for key in ("AP", "AP50", "AP75")] == pytest.approx([float(x) for x in best[2:5]], rel=1e-4)
    picture = tmp_path / "found.png"
    table = ok("detect", "evaluate", str(tuned / "best.safetensors"), *common, "--pictures", str(picture)).stdout
    assert picture.stat().st_size > 5000
    for word in ("AP50", "AP75", "AP small", "AP of disc", "AP of square"):
        assert word in table


def test_a_detectors_file_is_trained_further(tuned, data, tmp_path):
    own = {"detector": None, "levels": None, "norm": None}
    finetune(short(tuned / "best.safetensors", data, tmp_path / "more", epochs=1, **own))
    kinds = read_state(tmp_path / "more/state.safetensors")["kinds"]
    assert set(kinds.values()) == {"carried"}
    with pytest.raises(AugmentError, match="leave out `levels`"):
        finetune(short(tuned / "best.safetensors", data, tmp_path / "no", **{**own, "levels": (1, 2)}))


def test_resuming_from_the_command_line(tuned, data, tmp_path):
    import shutil

    shutil.copytree(tuned, tmp_path / "run")
    ok("detect", "finetune", "--resume", str(tmp_path / "run"), "--epochs", "4", "--lr", "0.01")
    assert len(summary(tmp_path / "run")) == 5
    assert read_settings(tmp_path / "run/settings.json", type(short("m", data, tmp_path))).lr == 0.01
    refused = run("detect", "finetune", "--resume", str(tmp_path / "run"), "--levels", "1,2")
    assert refused.exit_code == 2
    assert "--levels" in refused.stderr


def test_the_runs_of_the_two_tasks_are_not_taken_for_one_another(tuned, data, tmp_path):
    settings = short_classification("test_resnet", data, tuned)
    with pytest.raises(AugmentError, match="another task"):
        classify(settings, resume=True)
    assert Detection.name == read_state(tuned / "state.safetensors")["task"]
