from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from augment_cli.errors import AugmentError
from augment_cli.surgery.calibration import Calibration, compare, load_images, predictions


def picture_folder(folder: Path, count: int, size: tuple[int, int] = (40, 48)) -> Path:
    """Images of random colours, in no class folders."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        colours = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size).save(folder / f"{i:03}.png")
    return folder


def test_a_flat_folder_goes_through_timms_evaluation_transform(tmp_path):
    from timm.data import create_transform, resolve_data_config

    folder = picture_folder(tmp_path / "images", 25)
    model = timm.create_model("resnet10t")
    loaded = load_images(str(folder), model, (3, 32, 32), seed=3)
    assert loaded.images.shape == (25, 3, 32, 32)
    assert loaded.images.dtype == torch.uint8
    config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    transform = create_transform(**config, is_training=False)
    expected = torch.stack([transform(Image.open(file)) for file in sorted(folder.iterdir())])
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    batches = torch.cat([*loaded.fitting(), *loaded.held_out()])
    torch.testing.assert_close(batches, expected[order], atol=1e-5, rtol=0)


def test_the_last_fifth_is_held_out():
    images = Calibration(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), (0.0,), (1.0,))
    fitted, held = (torch.cat([*part()]).flatten() * 255 for part in (images.fitting, images.held_out))
    torch.testing.assert_close(fitted, torch.arange(40.0))
    torch.testing.assert_close(held, torch.arange(40.0, 50.0))


def test_no_more_images_are_taken_than_were_asked_for(tmp_path):
    folder = picture_folder(tmp_path / "images", 30)
    drawn = [
        load_images(str(folder), timm.create_model("resnet10t"), (3, 32, 32), 21, seed).images for seed in (0, 0, 1)
    ]
    assert len(drawn[0]) == 21
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_class_folders_and_grey_models_work(tmp_path):
    for label in ("a", "b"):
        picture_folder(tmp_path / label, 12)
    loaded = load_images(str(tmp_path), timm.create_model("resnet10t", in_chans=1), (1, 32, 32))
    assert loaded.images.shape == (24, 1, 32, 32)
    assert len(loaded.mean) == len(loaded.std) == 1


def test_too_few_images_and_missing_folders_are_named(tmp_path):
    model = timm.create_model("resnet10t")
    with pytest.raises(AugmentError, match=r"few has 3 images: give 20 at least"):
        load_images(str(picture_folder(tmp_path / "few", 3)), model, (3, 32, 32))
    with pytest.raises(AugmentError, match="calibrate_images=4"):
        load_images(str(tmp_path / "few"), model, (3, 32, 32), 4)
    with pytest.raises(AugmentError, match="absent"):
        load_images(str(tmp_path / "absent"), model, (3, 32, 32))
    (tmp_path / "empty").mkdir()
    with pytest.raises(AugmentError, match="empty"):
        load_images(str(tmp_path / "empty"), model, (3, 32, 32))


def test_agreement_and_divergence():
    images = Calibration(torch.zeros(10, 1, 1, 1, dtype=torch.uint8), (0.0,), (1.0,))
    source = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1]], dtype=torch.float64).log()
    other = torch.tensor([[0.5, 0.4, 0.1], [0.6, 0.3, 0.1]], dtype=torch.float64).log()
    found = compare(source, other, images)
    assert (found.images, found.fitted_on, found.agreement) == (2, 8, 0.5)
    wanted = nn.functional.kl_div(other, source, log_target=True, reduction="batchmean")
    assert found.divergence == pytest.approx(float(wanted), abs=1e-6)
    same = compare(source, source, images)
    assert (same.agreement, same.divergence) == (1, 0)


def test_a_model_without_classes_has_no_agreement():
    images = Calibration(torch.zeros(25, 3, 32, 32, dtype=torch.uint8), (0.5,) * 3, (0.2,) * 3)
    assert predictions(timm.create_model("resnet10t", num_classes=0), images) is None
    model = timm.create_model("resnet10t", num_classes=4)
    found = predictions(model, images)
    assert found.shape == (5, 4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5, dtype=torch.float64))
    assert model.training
