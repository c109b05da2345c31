"""Detectors over converted backbones are torchvision's own, and files bring them back."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models import detection as torchvision_detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import augment_cli as augment
from augment_cli import detection
from augment_cli.detection.build import detector
from augment_cli.errors import AugmentError
from augment_cli.formats import DETECTOR_KEY, METADATA_KEY
from augment_cli.layers import AAConv2d, AWConv2d

MAKERS = {
    "retinanet": (detection.retinanet, torchvision_detection.RetinaNet),
    "fcos": (detection.fcos, torchvision_detection.FCOS),
    "faster-rcnn": (detection.faster_rcnn, torchvision_detection.FasterRCNN),
    "mask-rcnn": (detection.mask_rcnn, torchvision_detection.MaskRCNN),
}


@pytest.fixture(scope="module")
def converted():
    return augment.convert("test_resnet", "aa", input_size=64, zero_init_last=False)


def images(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, *size, generator=generator) for size in sizes]


def targets(label: int) -> list[dict[str, torch.Tensor]]:
    masks = torch.zeros(1, 64, 80, dtype=torch.uint8)
    masks[:, 8:40, 8:40] = 1
    return [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([label]), "masks": masks}]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_detector_is_torchvisions_and_trains_and_finds(kind, converted):
    make, cls = MAKERS[kind]
    model = make(converted, ["cat", "dog"], levels=(1, 2, 3), norm="batch", min_size=64, max_size=128)
    assert type(model) is cls
    assert any(isinstance(m, AAConv2d) for m in model.backbone.body.modules())
    losses = model(images((64, 80)), targets(model.augment_detector.first_label))
    sum(losses.values()).backward()
    attention = next(m for m in model.modules() if isinstance(m, AAConv2d))
    assert attention.qkv.weight.grad.abs().sum() > 0
    found = model.eval()(images((64, 80), (50, 90)))
    assert [set(entry) >= {"boxes", "scores", "labels"} for entry in found] == [True, True]


def test_two_stages_keep_a_label_for_the_background():
    model = detection.faster_rcnn("test_resnet", 3, min_size=64)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    assert detection.retinanet("test_resnet", 3, min_size=64).head.classification_head.num_classes == 3


def test_the_defaults_are_torchvisions():
    """Anchors, pyramid and heads: the same tensors in all parts but the body."""
    pairs = [
        (detection.retinanet("resnet18", 91), torchvision_detection.RetinaNet, [2, 3, 4], "p6p7"),
        (detection.faster_rcnn("resnet18", 90), torchvision_detection.FasterRCNN, [1, 2, 3, 4], None),
    ]
    for ours, cls, levels, extra in pairs:
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7

        blocks = {"extra_blocks": LastLevelP6P7(256, 256)} if extra else {}
        body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=levels, **blocks)
        if cls is torchvision_detection.RetinaNet:
            theirs = torchvision_detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
            theirs.backbone = body
            assert ours.anchor_generator.sizes == theirs.anchor_generator.sizes
            assert ours.anchor_generator.aspect_ratios == theirs.anchor_generator.aspect_ratios
        else:
            theirs = cls(body, 91)
            assert ours.rpn.anchor_generator.sizes == theirs.rpn.anchor_generator.sizes
        shapes = [
            {k: v.shape for k, v in m.state_dict().items() if not k.startswith("backbone.body")} for m in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]


def test_the_backbone_computes_what_the_converted_model_does(converted):
    """The maps before the pyramid are those of the model's own stages."""
    pyramid = detection.backbone(converted, levels=(1, 2, 3), norm="frozen")
    model, x = converted.eval(), images((64, 64))[0][None]
    expected = []
    y = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    for stage in (model.layer1, model.layer2, model.layer3):
        expected.append(y := stage(y))
    for a, b in zip(pyramid.body(x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_statistics_stay_and_batch_statistics_follow(converted):
    for norm, changes in (("frozen", False), ("batch", True)):
        model = detection.retinanet(converted, 2, levels=(1, 2, 3), norm=norm, min_size=64)
        buffers = {name: b.clone() for name, b in model.backbone.body.named_buffers() if "running" in name}
        model(images((64, 80)), targets(0))
        assert buffers
        assert changes == any(not torch.equal(b, model.backbone.body.get_buffer(name)) for name, b in buffers.items())
        assert changes == any("bn1.weight" in name for name, _ in model.backbone.body.named_parameters())


def test_the_given_model_stays_as_it_is(converted):
    before = {name: tensor.clone() for name, tensor in converted.state_dict().items()}
    modules = dict(converted.named_modules())
    model = detection.retinanet(converted, 2, levels=(1, 2, 3), min_size=64)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in converted.state_dict().items())
    assert dict(converted.named_modules()) == modules


@pytest.mark.parametrize("source", [torchvision_detection.retinanet_resnet50_fpn, detection.retinanet])
def test_an_existing_detectors_backbone_is_converted_in_its_place(source):
    """The pyramid stays unless it is asked for, and what stays keeps its trained weights."""
    options = {"weights": None, "weights_backbone": None, "min_size": 64}
    model = (
        source(**options) if source is not detection.retinanet else source("resnet50", 91, norm="batch", min_size=64)
    )
    pyramid = {k: v.clone() for k, v in model.backbone.fpn.state_dict().items()}
    model.backbone = augment.convert(model.backbone, "aa-retinanet", input_size=64)
    plan = model.backbone.augment_metadata.plan
    assert {site.name for site in plan.sites} == {
        f"body.layer{stage}.{block}.conv2" for stage, last in ((2, 3), (3, 5), (4, 2)) for block in range(1, last + 1)
    }
    assert all(torch.equal(v, model.backbone.fpn.state_dict()[k]) for k, v in pyramid.items())
    assert len(model.eval()(images((64, 80)))[0]["boxes"]) <= 300
    asked = (
        augment.plan(source(**options).backbone, "aw", "select.include_pyramid=true", input_size=64)
        if (source is not detection.retinanet)
        else None
    )
    if asked:
        assert any(site.name.startswith("fpn.") for site in asked.sites)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("recipe", [None, "aa", "aw"])
def test_a_file_brings_the_detector_back(kind, recipe, tmp_path):
    model = (
        timm.create_model("test_resnet") if recipe is None else augment.convert("test_resnet", recipe, input_size=64)
    )
    made = (
        detector(kind, model, ["cat", "dog"], levels=(1, 2), norm="batch", min_size=(64, 96), box_detections_per_img=7)
        if ("rcnn" in kind)
        else detector(kind, model, ["cat", "dog"], levels=(1, 2), norm="batch", min_size=(64, 96), detections_per_img=7)
    )
    augment.save(made, tmp_path / "detector.safetensors")
    again = augment.load(tmp_path / "detector.safetensors")
    assert again.augment_detector == made.augment_detector
    assert getattr(again, "augment_metadata", None) == getattr(made, "augment_metadata", None)
    for a, b in zip(made.eval()(images((64, 80))), again.eval()(images((64, 80))), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert len(again(images((64, 80)))[0]["boxes"]) <= 7
    expected = {None: 0, "aa": AAConv2d, "aw": AWConv2d}[recipe]
    assert not expected or any(isinstance(m, expected) for m in again.backbone.body.modules())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schema": 7}, "newer"),
        ({"kind": "yolo"}, "kind"),
        ({"model": "resnet10t"}, "resnet10t"),
        ({"model": "hf-hub:a/b"}, "registry"),
        ({"levels": [1, 9]}, "levels"),
        ({"levels": [2, 1]}, "rising"),
        ({"classes": ["a", "b", "c"]}, "do not fit"),
        ({"channels": 128}, "do not fit"),
        ({"channels": 10**9}, "channels"),
        ({"options": {"weights": "x"}}, "weights"),
        ({"options": {"pretrained": True}}, "cannot be set"),
        ({"model_args": {"width": 10**9}}, "number"),
        ({"extra": 1}, "unknown key"),
    ],
)
def test_a_file_whose_settings_do_not_fit_is_refused(change, word, tmp_path, converted):
    file = tmp_path / "detector.safetensors"
    augment.save(detection.retinanet(converted, 2, levels=(1, 2), norm="batch", min_size=64), file)
    with safe_open(file, "pt") as opened:
        entries, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    entries[DETECTOR_KEY] = json.dumps(json.loads(entries[DETECTOR_KEY]) | change)
    save_file(tensors, file, metadata=entries)
    with pytest.raises(AugmentError, match=word):
        augment.load(file)


def test_a_detectors_file_is_not_a_models_and_the_other_way_round(tmp_path, converted):
    from augment_cli.checkpoint.files import load
    from augment_cli.detection.files import load_detector

    augment.save(converted, tmp_path / "model.safetensors")
    augment.save(detection.retinanet(converted, 2, levels=(1, 2), min_size=64), tmp_path / "detector.safetensors")
    with pytest.raises(AugmentError, match="detector"):
        load(tmp_path / "detector.safetensors")
    with pytest.raises(AugmentError, match=DETECTOR_KEY):
        load_detector(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "detector.safetensors", "pt") as opened:
        assert METADATA_KEY in opened.metadata()
    with pytest.raises(AugmentError, match="safetensors"):
        augment.save(detection.retinanet("test_resnet", 2, levels=(1, 2), min_size=64), tmp_path / "folder")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"levels": (1, 9)}, "levels"),
        ({"classes": []}, "classes"),
        ({"min_size": 0}, "min_size"),
        ({"norm": "none"}, "norm"),
        ({"nonsense": 1}, "nonsense"),
        ({"model": "resnet999"}, "resnet999"),
        ({"model": torch.nn.Conv2d(3, 3, 1)}, "timm"),
        ({"pretrained": True}, "pretrained"),
    ],
)
def test_settings_that_a_detector_does_not_take_are_refused(options, word, converted):
    given = {"model": converted, "classes": 2, "min_size": 64, **options}
    with pytest.raises(AugmentError, match=word):
        detection.retinanet(**given)


def test_fcos_takes_no_anchors():
    with pytest.raises(AugmentError, match="anchors"):
        detection.fcos("test_resnet", 2, anchors=detection.Anchors())
