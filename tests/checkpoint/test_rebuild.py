"""timm builds, adapts and taps a converted model like any other of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from augment_cli import conversion
from augment_cli.analysis import source
from augment_cli.checkpoint import rebuild
from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d
from augment_cli.reporting.output import write_model
from tests.conftest import graph_of, plan_of


def folder(path: Path, name: str, recipe: str = "aa"):
    described, _ = source.describe(name)
    model = source.create(described, 0)
    metadata = conversion.operate(model, plan_of(name, recipe), graph_of(name), "random, seed 0")
    write_model(model, metadata, path)
    return model.eval()


def test_a_converted_model_names_no_place_that_the_bases_weights_come_from():
    """Else timm would load the source's weights into it."""
    base = timm.get_pretrained_cfg("resnet18").to_dict()
    assert base["hf_hub_id"]
    assert base["url"] or base["hf_hub_id"]
    cfg = rebuild.build(plan_of("resnet18", "aa")).pretrained_cfg
    for place in ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"):
        assert not cfg.get(place)
    assert cfg["architecture"] == "augmented"
    assert cfg["mean"] == base["mean"]
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("augmented", pretrained=True, plan=plan_of("resnet18", "aa").model_dump(by_alias=True))


def changed_config(folder: Path, change) -> str:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model_args"]["plan"]["sites"].pop(), "two plans"),
        (lambda c: c["model_args"]["plan"]["sites"][0]["split"].update(key_channels=4), "two plans"),
        (lambda c: c["model_args"]["plan"].update(model="resnet18"), "two plans"),
        (lambda c: c["model_args"]["plan"].update(sites=[]), "sites"),
        (lambda c: c["model_args"].update(layers=[100_000, 1, 1, 1]), "more than [0-9,]+ modules and tensors"),
        (lambda c: c["model_args"].update(stem_width=100_000), "more than [0-9,]+ numbers|do not fit|be created"),
        (lambda c: c["model_args"].update(num_classes=10), "tensors do not fit"),
        (lambda c: c.update(num_classes=10**9), "more than [0-9,]+ numbers"),
        (lambda c: c["model_args"].update(nonsense=1), "nonsense"),
    ],
)
def test_a_folder_whose_config_was_changed_is_refused(tmp_path, change, message, pretrained):
    folder(tmp_path / "m", "test_resnet")
    name = changed_config(tmp_path / "m", change)
    with pytest.raises(AugmentError, match=message):
        timm.create_model(name, pretrained=pretrained)


def test_a_folder_with_the_weights_of_another_conversion_is_refused(tmp_path):
    folder(tmp_path / "a", "test_resnet", "aa")
    folder(tmp_path / "b", "test_resnet", "aw")
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(AugmentError, match="two plans"):
        timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True)


def test_config_json_gives_transformers_no_argument_twice(tmp_path):
    """transformers creates the model with num_classes from the top of config.json and all of model_args besides."""
    model = folder(tmp_path / "m", "test_resnet")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert "num_classes" not in config["model_args"]
    again = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    again.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(again.eval()(x), model(x))


def test_transformers_gives_timms_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = folder(tmp_path / "m", "test_resnet")
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    x = torch.randn(1, 3, 160, 160)
    expected = model(x)
    loaded = wrapped.timm_model.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    # transformers maps the file: its tensors' addresses have another alignment, so that sums may round differently
    torch.testing.assert_close(wrapped(x).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_for_other_classes_and_channels(tmp_path):
    model = folder(tmp_path / "m", "resnet18")
    other = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, num_classes=10, in_chans=1)
    assert other(torch.randn(2, 1, 64, 64)).shape == (2, 10)
    assert torch.equal(other.layer4[1].conv2.qkv.weight, model.layer4[1].conv2.qkv.weight)
    assert torch.equal(other.layer4[1].conv2.channel_order, model.layer4[1].conv2.channel_order)


FEATURES = [
    "resnet18",
    "vgg11_bn",
    "densenet121",
    "tf_efficientnetv2_b0",
    "hrnet_w18_small",
    "cspdarknet53",
    "test_nfnet",
]


@pytest.mark.parametrize("name", FEATURES)
def test_features_only_gives_the_converted_models_features(tmp_path, name):
    model = folder(tmp_path / "m", name)
    indices = (1, 3) if name != "hrnet_w18_small" else (1, 2, 3)
    extractor = timm.create_model(
        f"local-dir:{tmp_path / 'm'}", pretrained=True, features_only=True, out_indices=indices
    ).eval()
    x = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        features = extractor(x)
        source_model = timm.create_model(name, features_only=True, out_indices=indices).eval()
        assert [f.shape for f in features] == [f.shape for f in source_model(x)]
        if hasattr(model, "forward_intermediates"):
            expected = model.forward_intermediates(x, indices=list(indices), intermediates_only=True)
            assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))
    assert any(isinstance(m, AAConv2d) for m in extractor.modules())
    assert extractor.feature_info.channels() == source_model.feature_info.channels()


def test_a_feature_extractor_has_the_last_level_too(tmp_path):
    model = folder(tmp_path / "m", "resnet18")
    extractor = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(extractor(x)[-1], model.forward_features(x))


def test_the_graph_extractor_of_timm_works_or_says_why_not(tmp_path):
    folder(tmp_path / "m", "resnet18")
    name = f"local-dir:{tmp_path / 'm'}"
    extractor = timm.create_model(name, pretrained=True, features_only=True, feature_cls="fx").eval()
    plain = timm.create_model(name, pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(extractor(x), plain(x), strict=True))
    folder(tmp_path / "std", "resnetv2_50x1_bit")
    with pytest.raises(AugmentError, match="graph feature extractor looks inside"):
        timm.create_model(f"local-dir:{tmp_path / 'std'}", pretrained=True, features_only=True, feature_cls="fx")


@pytest.mark.parametrize("order", ["import augment_cli, timm", "import timm, augment_cli"])
def test_importing_the_package_is_enough_in_either_order_and_costs_no_timm(tmp_path, order):
    folder(tmp_path / "m", "resnet18")
    code = (
        "import sys, augment_cli; assert 'timm' not in sys.modules and 'torch' not in sys.modules\n"
        if order.startswith("import augment_cli")
        else ""
    ) + f"{order}\nprint(type(timm.create_model('local-dir:{tmp_path / 'm'}', pretrained=True)).__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "ResNet\n"


def test_the_plugin_alone_registers_the_architecture():
    code = "import augment_cli.checkpoint.timm_plugin, timm; print(timm.is_model('augmented'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "True\n"


def test_the_architecture_without_a_plan_or_with_a_bad_one_says_so():
    with pytest.raises(AugmentError, match="give its plan"):
        timm.create_model("augmented")
    with pytest.raises(AugmentError, match="the plan is not valid: model: Field required"):
        timm.create_model("augmented", plan={"schema": 1})
