"""Annotations in COCO's format: what is read, mended, counted and refused."""

import json
import shutil

import pytest
import torch
from PIL import Image

from augment_cli.detection.coco import read_annotations
from augment_cli.detection.data import DetectionImages, augment, make_loader
from augment_cli.detection.precision import average_precision
from augment_cli.errors import AugmentError
from augment_cli.training.accelerators import one_accelerator
from tests.cli.helpers import run
from tests.detection.conftest import draw_split, make_data, write_split
from tests.training.conftest import write_images

FINETUNE = ("detect", "finetune", "test_resnet", "--detector", "retinanet", "--cpu", "-j", "0")


def changed(data, tmp_path, change, split: str = "train2017"):
    """A copy of the data set, one of its files changed."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder, dirs_exist_ok=True)
    file = folder / "annotations" / f"instances_{split}.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(change(found) or found))
    return folder


def test_classes_are_in_the_order_of_their_ids_whatever_their_gaps(data):
    found = read_annotations(data, "train")
    assert (found.classes, found.category_ids) == (("disc", "square"), (3, 7))
    truth = json.loads(found.file.read_text())
    counts = [sum(a["category_id"] == id_ for a in truth["annotations"]) for id_ in (3, 7)]
    labels = [thing.label for record in found.records for thing in record.things]
    assert [labels.count(0), labels.count(1)] == counts


def test_images_without_annotations_are_negatives_and_stay(data):
    found = read_annotations(data, "train")
    assert len(found.records) == 12
    empty = [record for record in found.records if not record.things]
    assert len(empty) == 3
    images = DetectionImages(found)
    _, target = images[found.records.index(empty[0])]
    assert (target["boxes"].shape, target["labels"].shape) == ((0, 4), (0,))


@pytest.mark.parametrize("layout", ["instances", "roboflow", "plain"])
def test_the_usual_layouts_are_found(layout, tmp_path):
    folder = tmp_path / "data"
    made = draw_split(folder, "valid" if layout == "roboflow" else "val2017", 4, 0)
    if layout == "instances":
        write_split(folder, "val2017", made)
    elif layout == "roboflow":
        (folder / "valid" / "_annotations.coco.json").write_text(json.dumps(made))
    else:
        (folder / "val2017").rename(folder / "images")
        (folder / "val.json").write_text(json.dumps(made))
    assert len(read_annotations(folder, "validation").records) == 4


def test_boxes_outside_their_image_are_clipped_or_left_out_and_counted(data, tmp_path):
    def change(found):
        image = found["images"][0]["id"]
        boxes = [[-10, -10, 30, 30], [70, 60, 100, 100], [200, 5, 10, 10], [5, 5, 0, 10], [5, 5, 10, -3]]
        for box in boxes:
            found["annotations"].append({"id": 900, "image_id": image, "category_id": 3, "bbox": box, "iscrowd": 0})
        found["annotations"].append({"id": 901, "image_id": 123456, "category_id": 3, "bbox": [0, 0, 5, 5]})

    found = read_annotations(changed(data, tmp_path, change), "train")
    assert found.left_out == {
        "boxes clipped to their image": 2,
        "boxes outside their image or without area": 3,
        "annotations of images that are not listed": 1,
    }
    assert [thing.box for thing in found.records[0].things] == [(0, 0, 20, 20), (70, 60, 80, 64)]


def drop(*keys):
    def change(found):
        for key in keys:
            del found[key]

    return change


def on_first(key, **values):
    return lambda found: found[key][0].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: [found], "COCO"),
        (drop("annotations"), "'annotations'"),
        (drop("images"), "'images'"),
        (drop("categories"), "'categories'"),
        (lambda found: found.update(images=[]), "no images"),
        (lambda found: found.update(categories=[]), "no categories"),
        (lambda found: found.update(annotations=[3]), "no object"),
        (on_first("annotations", bbox=[1, 2, 3]), "bbox"),
        (on_first("annotations", bbox=[1, 2, 3, "x"]), "bbox"),
        (on_first("annotations", bbox=[1, 2, 3, float("nan")]), "bbox"),
        (on_first("annotations", category_id=99), "99"),
        (on_first("annotations", image_id=None), "image_id"),
        (on_first("images", file_name=3), "file_name"),
        (on_first("images", file_name="gone.png"), "gone.png"),
        (on_first("images", width=0), "large"),
        (on_first("images", id=10), "two images"),
        (on_first("categories", id=3), "two categories"),
        (on_first("categories", name="cube"), "same categories"),
    ],
    ids=lambda change: change if isinstance(change, str) else "",
)
def test_what_is_not_cocos_gets_one_message_and_leaves_no_folder(change, words, data, tmp_path):
    folder = changed(data, tmp_path, change)
    result = run(*FINETUNE, "--data", str(folder), "-o", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "words"), [("classes", "augment finetune"), ("empty", "no annotations"), ("none", "no such")]
)
def test_a_folder_that_has_no_annotations_gets_one_message(given, words, tmp_path):
    folder = tmp_path / "data"
    if given == "classes":
        write_images(folder / "train", 2, 0)
    elif given == "empty":
        folder.mkdir()
    result = run(*FINETUNE, "--data", str(folder), "-o", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_file_that_is_not_json_gets_one_message(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "annotations/instances_val2017.json").write_text("{")
    result = run(
        "detect", "finetune", "test_resnet", "--detector", "fcos", "--data", str(folder), "-o", str(tmp_path / "run")
    )
    assert result.exit_code == 2
    assert "JSON" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scales", "1"), "LOW,HIGH"),
        (("--scales", "2,1"), "--scales"),
        (("--levels", "a"), "--levels"),
        (("--levels", "1,9"), "levels"),
        (("--img-size", "0"), "img-size"),
        (("--img-size", "100x50"), "--img-size"),
        (("--anchor-ratios", "-1"), "ratios"),
        (("--detector", "fcos", "--anchor-base", "8"), "anchors"),
        (("--pretrained", "--checkpoint", "x"), "x"),
    ],
)
def test_options_that_are_wrong_get_one_message(options, words, data, tmp_path):
    result = run(*FINETUNE, "--data", str(data), "-o", str(tmp_path / "run"), *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_detector_and_a_file_that_is_none_are_refused(data, tmp_path, backbone):
    result = run("detect", "finetune", "test_resnet", "--data", str(data), "-o", str(tmp_path / "run"))
    assert (result.exit_code, "--detector" in result.stderr) == (2, True)
    result = run("detect", "evaluate", str(backbone), "--data", str(data))
    assert (result.exit_code, "no detector" in result.stderr) == (2, True)


def test_images_that_cannot_be_read_or_have_another_size(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    found = read_annotations(folder, "train")
    Image.new("RGB", (30, 30)).save(found.records[1].file)
    with pytest.raises(AugmentError, match="30 x 30"):
        DetectionImages(found)[1]
    found.records[2].file.write_bytes(b"no image")
    with pytest.raises(AugmentError, match=r"002\.png"):
        DetectionImages(found)[2]
    skipping = DetectionImages(found, on_corrupt="skip")
    assert int(skipping[2][1]["image_id"]) == found.records[3].id
    assert skipping.corrupt_names() == [str(found.records[2].file)]


def test_boxes_follow_what_augmentation_does_to_the_image():
    """Each box is filled with a value of its own; the box found in the image afterwards is the target's."""
    for seed in range(40):
        torch.manual_seed(seed)
        boxes = torch.tensor([[4.0, 6, 20, 30], [40, 10, 70, 50], [60, 52, 66, 60]])
        image = torch.zeros(1, 64, 80)
        for value, (left, top, right, bottom) in enumerate(boxes.int().tolist(), start=1):
            image[:, top:bottom, left:right] = value
        masks = torch.stack([(image[0] == value) for value in (1, 2, 3)]).to(torch.uint8)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2, 3]), "masks": masks, "image_id": torch.tensor(0)}
        out, found = augment(image.repeat(3, 1, 1), target, flip=0.5, crop_scale=0.3)
        assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"])
        for box, label, mask in zip(found["boxes"], found["labels"], found["masks"], strict=True):
            rows, columns = (out[0] == label).nonzero(as_tuple=True)
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(x) for x in expected]
            assert torch.equal(mask.bool(), out[0] == label)


def test_a_crop_keeps_a_box_by_its_centre():
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        target = {"boxes": torch.tensor([[0.0, 0, 80, 64]]), "labels": torch.tensor([0]), "image_id": torch.tensor(0)}
        out, found = augment(torch.zeros(3, 64, 80), target, flip=0.0, crop_scale=0.1)
        seen.add(len(found["boxes"]))
        if len(found["boxes"]):
            assert found["boxes"][0].tolist() == [0, 0, out.shape[2], out.shape[1]]
    assert seen == {0, 1}


def test_average_precision_of_known_predictions(data):
    found = read_annotations(data, "validation")
    perfect = {
        record.id: [{"box": list(t.box), "label": t.label, "score": 0.9} for t in record.things]
        for record in found.records
    }
    scores = average_precision(found, perfect)
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((100, 100, 100))
    assert scores.classes == pytest.approx({"disc": 100, "square": 100})
    assert (scores.small, scores.medium, scores.large) == (pytest.approx(100), None, None)
    no_squares = {image: [e for e in entries if e["label"] == 0] for image, entries in perfect.items()}
    scores = average_precision(found, no_squares)
    assert scores.classes == pytest.approx({"disc": 100, "square": 0})
    assert scores.ap == pytest.approx(50)
    assert average_precision(found, {}).ap == 0


def test_boxes_that_overlap_by_two_thirds_count_at_some_thresholds_only(data):
    """Four of the ten thresholds, 0.5 to 0.65, are below 0.667: AP is 40 where every box is cut to two thirds."""
    found = read_annotations(data, "validation")
    cut = {
        record.id: [
            {
                "box": [t.box[0], t.box[1], t.box[2] - (t.box[2] - t.box[0]) / 3, t.box[3]],
                "label": t.label,
                "score": 0.9,
            }
            for t in record.things
        ]
        for record in found.records
    }
    scores = average_precision(found, cut)
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((40, 100, 0))


def test_a_validation_without_boxes_is_refused(data, tmp_path):
    folder = changed(data, tmp_path, lambda found: found.update(annotations=[]), "val2017")
    result = run(*FINETUNE, "--data", str(folder), "-o", str(tmp_path / "run"))
    assert (result.exit_code, "no boxes" in result.stderr) == (2, True)


def test_negatives_alone_are_still_trained_on(tmp_path, data):
    """An epoch in which no image has a box has a loss, and nothing fails."""
    from augment_cli.detection.assess import finetune
    from tests.detection.conftest import short

    folder = changed(data, tmp_path, lambda found: found.update(annotations=[]))
    for detector in ("retinanet", "faster-rcnn"):
        finetune(short("test_resnet", folder, tmp_path / detector, epochs=1, detector=detector))


def test_the_data_set_of_these_tests_is_deterministic(tmp_path, data):
    again = make_data(tmp_path / "again")
    a, b = (folder / "annotations/instances_train2017.json" for folder in (data, again))
    assert a.read_bytes() == b.read_bytes()


def test_images_cross_as_bytes_and_are_fractions_on_the_device(data):
    split = read_annotations(data, "train")
    images = DetectionImages(split, flip=0.5, crop_scale=0.5)
    with one_accelerator(cpu=True) as accelerator:
        found = [batch for workers in (0, 2) for batch in make_loader(images, 4, workers, accelerator)]
    assert len(found) == 2 * 3
    for pictures, targets in found:
        for picture, target in zip(pictures, targets, strict=True):
            place = next(i for i, record in enumerate(split.records) if record.id == int(target["image_id"]))
            pixels, expected = images[place]
            assert pixels.dtype == torch.uint8
            assert torch.equal(picture, pixels.float() / 255)
            assert torch.equal(target["boxes"], expected["boxes"])
