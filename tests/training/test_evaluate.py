import csv
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from augment_cli.cli import app
from augment_cli.errors import AugmentError
from augment_cli.training.assess import Assessment, Result, assess, write_confusion
from augment_cli.training.evaluate import Scores, evaluate
from augment_cli.training.loss import Distillation, divergence


class Table(torch.nn.Module):
    """Looks the logits up: the images are their numbers."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x):
        return self.logits[x.long()]


@pytest.fixture
def tables():
    labels = torch.randint(0, 7, (50,))
    return Table(torch.randn(50, 7)), Table(torch.randn(50, 7)), labels


def loader(labels):
    return DataLoader(TensorDataset(torch.arange(len(labels)), labels), batch_size=8)


def test_scores_are_what_their_definitions_say(tables):
    model, other, labels = tables
    scores = evaluate(model, loader(labels), Accelerator(cpu=True), other=other, num_classes=7)
    ranks = model.logits.argsort(-1, descending=True)
    assert scores.images == 50
    assert scores.loss == pytest.approx(F.cross_entropy(model.logits, labels).item(), rel=1e-5)
    assert scores.top1 == pytest.approx(100 * (ranks[:, 0] == labels).double().mean().item())
    assert scores.top5 == pytest.approx(100 * (ranks[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert scores.agreement == pytest.approx(100 * (ranks[:, 0] == other.logits.argmax(-1)).double().mean().item())
    p, q = other.logits.double().softmax(-1), model.logits.double().softmax(-1)
    assert scores.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    expected = torch.zeros(7, 7, dtype=torch.long)
    for label, predicted in zip(labels, ranks[:, 0], strict=True):
        expected[label, predicted] += 1
    assert torch.equal(scores.confusion, expected)


def test_evaluation_leaves_the_mode_as_it_was(tables):
    model, _, labels = tables
    for mode in (True, False):
        evaluate(model.train(mode), loader(labels), Accelerator(cpu=True))
        assert model.training is mode


def test_evaluation_leaves_the_modes_of_parts_as_they_were(tables):
    model, other, labels = tables
    model.norm, other.norm = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    model.train().norm.eval()
    other.eval().norm.train()
    evaluate(model, loader(labels), Accelerator(cpu=True), other=other)
    assert (model.training, model.norm.training, other.training, other.norm.training) == (True, False, False, True)


def test_fewer_than_five_classes_have_a_top_5_too():
    scores = evaluate(Table(torch.randn(4, 2)), loader(torch.tensor([0, 1, 1, 0])), Accelerator(cpu=True))
    assert scores.top5 == 100


@pytest.mark.parametrize("image", [3, 30])
def test_labels_without_a_class_are_refused(tables, image):
    """In the first batch and in a later one."""
    model, _, labels = tables
    labels[image] = 7
    with pytest.raises(AugmentError, match="have a label 7, and the model has 7 classes"):
        evaluate(model, loader(labels), Accelerator(cpu=True))


def test_the_divergence_is_in_nats_and_none_of_a_model_from_itself():
    a, b = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    assert divergence(a, a).item() == pytest.approx(0, abs=1e-7)
    assert divergence(a, b).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_distillation_weighs_labels_and_teacher():
    teacher, images, labels = Table(torch.randn(4, 5)), torch.arange(4), torch.tensor([0, 1, 2, 3])
    logits = torch.randn(4, 5, requires_grad=True)
    loss = Distillation(torch.nn.CrossEntropyLoss(), teacher, weight=0.3, temperature=2.0)(images, logits, labels)
    taught = 4 * F.kl_div((logits / 2).log_softmax(-1), (teacher.logits / 2).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss, 0.7 * F.cross_entropy(logits, labels) + 0.3 * taught)
    assert loss.requires_grad


def test_a_confusion_matrix_is_a_table_or_a_picture(tmp_path):
    scores = Scores(6, 0.0, 50.0, 100.0, confusion=torch.tensor([[1, 2], [0, 3]]))
    result = Result(scores, ["ants", "bees"], [])
    write_confusion(result, tmp_path / "c.csv")
    rows = list(csv.reader((tmp_path / "c.csv").open()))
    assert rows == [["true \\ predicted", "ants", "bees"], ["ants", "1", "2"], ["bees", "0", "3"]]
    write_confusion(result, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AugmentError, match="confusion"):
        write_confusion(Result(Scores(6, 0.0, 50.0, 100.0), ["ants", "bees"], []), tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_data_of_other_classes_are_refused(model, images):
    with pytest.raises(AugmentError, match=r"have 3 classes, and .* has 1000: say with `class_map` which"):
        assess(Assessment(str(model), str(images), workers=0, cpu=True))


def test_a_class_map_says_which_classes_the_data_have(model, images, tmp_path):
    names = [f"other {i}" for i in range(997)] + ["red", "green", "blue"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    asked = Assessment(str(model), str(images), class_map=tmp_path / "names.txt", confusion=True, workers=0, cpu=True)
    confusion = assess(asked).scores.confusion
    assert confusion.sum(1)[997:].tolist() == [4, 4, 4]


def test_which_weights_of_a_checkpoint_were_taken_is_said(tmp_path, images):
    weights = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": weights}, tmp_path / "a.pth")
    arguments = ["--data", str(images), "--checkpoint", str(tmp_path / "a.pth"), "-a", "num_classes=3", "--cpu"]
    for command in (
        ["evaluate"],
        ["finetune", "-b", "16", "--epochs", "1", "--overwrite", "-o", str(tmp_path / "out")],
    ):
        result = CliRunner().invoke(app, [*command, "test_resnet", *arguments, "--img-size", "32", "-j", "0"])
        assert result.exit_code == 0, result.output
        assert "weights: checkpoint a.pth, the moving average" in result.stderr
        asked = CliRunner().invoke(
            app, [*command, "test_resnet", *arguments, "--img-size", "32", "-j", "0", "--no-ema"]
        )
        assert asked.exit_code == 0, asked.output
        assert "weights: checkpoint a.pth, not the moving average" in asked.stderr
