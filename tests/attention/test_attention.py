"""Maps and numbers of attention are those of the layers, at any size, and the pictures hold them."""

import base64
import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import augment_cli as augment
from augment_cli.attention import maps
from augment_cli.attention.maps import HeadMaps, KernelMaps, choose, layers_of, observe
from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d, AWConv2d
from augment_cli.layers.aa.relative import relative_logits
from tests.cli.helpers import ok, run
from tests.surgery.test_replace import randomized


def layer_and_input(size: tuple[int, int] = (6, 9), **options) -> tuple[AAConv2d, torch.Tensor]:
    split = {"heads": 2, "key_channels": 8, "value_channels": 4} | options
    layer = AAConv2d(5, 12, 3, padding=1, **split, resolution=size)
    with torch.no_grad():
        layer.qkv.weight.mul_(3)
    return layer, torch.randn(1, 5, *size)


def seen(layer: torch.nn.Module, x: torch.Tensor) -> HeadMaps | KernelMaps:
    return observe(torch.nn.Sequential(layer), x, ["0"])[0]


def logits(layer: AAConv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Content and position logits (heads, HW, HW) and values (heads, HW, e) of a layer without pooling."""
    keys = layer.key_channels
    q, k, v = (
        t[0].unflatten(0, (layer.heads, -1)).movedim(1, -1)
        for t in layer.qkv(x).split([keys, keys, layer.value_channels], 1)
    )
    q = q * q.shape[-1] ** -0.5
    rows, columns = (t[0].flatten(1, 2) for t in relative_logits(q[None], layer.rel_height, layer.rel_width))
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))
    return q @ k.transpose(1, 2), (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(2), v


@torch.no_grad()
def test_the_maps_are_the_layers_weights():
    layer, x = layer_and_input()
    found = seen(layer, x)
    content, position, v = logits(layer, x)
    assert (found.map_size, found.grid, found.heads) == ((6, 9), (6, 9), 2)
    for kind, own in (("weights", content + position), ("content", content), ("position", position)):
        weights = own.softmax(-1)
        torch.testing.assert_close(found.maps[kind][:, :-1].flatten(2), weights)
        torch.testing.assert_close(found.maps[kind][:, -1].flatten(1), weights.mean(1))
    attended = found.maps["weights"][:, :-1].flatten(2) @ v
    torch.testing.assert_close(layer.proj(attended.transpose(1, 2).reshape(1, -1, 6, 9)), layer.attend(x))


@torch.no_grad()
def test_the_numbers_are_those_of_the_weights():
    layer, x = layer_and_input()
    found = seen(layer, x)
    content, position, _ = logits(layer, x)
    weights = (content + position).softmax(-1).double()
    places = torch.cartesian_prod(torch.arange(6), torch.arange(9))
    inside = (places[:, None] - places).abs().amax(-1) <= 1
    torch.testing.assert_close(found.outside, 1 - (weights * inside).sum(-1).mean(1))
    torch.testing.assert_close(found.entropy, torch.special.entr(weights).sum(-1).mean(1))
    shares = position.var(-1) / (position.var(-1) + content.var(-1))
    torch.testing.assert_close(found.position, shares.double().mean(1))


def test_looking_everywhere_alike_and_at_oneself():
    layer, x = layer_and_input()
    with torch.no_grad():
        for table in (layer.rel_height, layer.rel_width):
            table.zero_()
        layer.qkv.weight.zero_()
    found = seen(layer, x)
    torch.testing.assert_close(found.entropy, torch.full((2,), math.log(54), dtype=torch.float64))
    corners, edges, middles = 4 * 4, 22 * 6, 28 * 9
    assert float(found.outside[0]) == pytest.approx(1 - (corners + edges + middles) / 54**2, abs=1e-6)


@torch.no_grad()
def test_no_more_logits_are_made_at_a_time_than_allowed(monkeypatch):
    layer, x = layer_and_input()
    whole = seen(layer, x)
    sizes, einsum = [], torch.einsum

    def counted(equation, *tensors):
        sizes.append(tensors[0].shape[1] * 2 * 54)
        return einsum(equation, *tensors)

    monkeypatch.setattr(torch, "einsum", counted)
    monkeypatch.setattr(maps, "_MOST_LOGITS", 600)
    parts = seen(layer, x)
    assert max(sizes) <= 600
    for kind in maps.KINDS:
        torch.testing.assert_close(parts.maps[kind], whole.maps[kind])
    for key in ("outside", "entropy", "position"):
        torch.testing.assert_close(getattr(parts, key), getattr(whole, key))


def test_a_large_map_is_looked_at_in_a_grid_and_strides_and_pools_are_followed():
    layer = AAConv2d(5, 12, 3, padding=1, stride=2, heads=2, key_channels=8, value_channels=4, resolution=(35, 20))
    found = seen(layer, torch.randn(1, 5, 70, 40))
    assert (found.map_size, found.grid) == ((35, 20), (14, 14))
    assert found.maps["weights"].shape == (2, 197, 24, 20)
    ys, xs = found.centres
    assert ys[0] == 1.5 / 35
    assert found.nearest(xs[3], ys[5]) == 5 * 14 + 3
    assert found.nearest(1, 1) == 195
    torch.testing.assert_close(found.maps["weights"].sum((-2, -1)), torch.ones(2, 197))
    assert seen(*layer_and_input((9, 5), attention_pool=2)).map_size == (5, 3)


@pytest.mark.parametrize("groups", [1, 2, 16])
@torch.no_grad()
def test_the_map_of_aw_is_the_factor_of_its_kernel(groups: int):
    layer = AWConv2d(16, 32, 3, padding=1, groups=groups, reduction=4)
    torch.nn.init.normal_(layer.expand.weight)
    x = torch.randn(1, 16, 8, 8)
    found = seen(layer, x)
    factors = layer.attended_kernels(x)[0] / layer.static_kernel() - 1  # C2, C1/groups, h, w
    assert found.magnitude == pytest.approx(float(factors.abs().mean()), rel=1e-3)
    assert found.largest == pytest.approx(float(factors.abs().max()), rel=1e-3)
    if groups == 1:
        torch.testing.assert_close(found.mean, factors.mean(0).unflatten(0, (-1, 4)).mean(1), rtol=1e-3, atol=1e-3)
    assert found.idle == float((layer.scales(x) == 0).double().mean())


def model(recipe: str = "aa"):
    return augment.convert(randomized("test_resnet"), recipe, "budget.params=free")


def picture(size: tuple[int, int] = (90, 70)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8))


def test_layers_are_chosen_by_name_or_one_of_each_map_size():
    made = model("aa-aw")
    assert choose(made, ("layer4.*",)) == [name for name in layers_of(made) if name.startswith("layer4.")]
    chosen = choose(made)
    sizes = [(m.resolution, m.attention_pool) for n, m in layers_of(made).items() if isinstance(m, AAConv2d)]
    assert len(chosen) == len(set(sizes)) + 1
    with pytest.raises(AugmentError, match=r"layr4"):
        choose(made, ("layr4.*",))
    with pytest.raises(AugmentError, match="convert it"):
        choose(torch.nn.Conv2d(3, 3, 3))


def test_modes_and_weights_stay_as_they_are():
    made = model().train()
    made.layer1.eval()
    modes = [m.training for m in made.modules()]
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    augment.attention_maps(made, picture())
    assert [m.training for m in made.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in made.state_dict().items())


def test_heads_can_be_chosen():
    found = augment.attention_maps(model(), picture(), layers=["layer4.0.conv1"], heads=[2, 0])
    (layer,) = found.seen[0].layers
    assert layer.numbers == (0, 2)
    whole = augment.attention_maps(model(), picture(), layers=["layer4.0.conv1"]).seen[0].layers[0]
    assert layer.maps["weights"].shape[0] == 2
    assert whole.maps["weights"].shape[0] == whole.heads
    with pytest.raises(AugmentError, match="99"):
        augment.attention_maps(model(), picture(), heads=[99])


def test_the_page_holds_every_map_and_loads_nothing():
    found = augment.attention_maps([model(), model("aa-aw")], [picture(), picture((40, 60))], input_size=(64, 96))
    page = found.to("html")
    bare = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page).replace("</", "").replace("/>", "")
    assert not re.search(r"https?:|url\(|@import|src=\"[^\"]|href=", bare.replace("//", ""))
    sprites = re.findall(r'<img src="data:image/png;base64,([\w+/=]+)" alt="" hidden="" data-kind="weights">', page)
    heads = [layer for one in found.seen for layer in one.layers if isinstance(layer, HeadMaps)]
    assert len(heads) == len(sprites) > 0
    order = sorted(range(len(found.seen)), key=lambda i: found.seen[i].image)
    in_page = [layer for i in order for layer in found.seen[i].layers if isinstance(layer, HeadMaps)]
    for layer, sprite in zip(in_page, sprites, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sprite))))
        own = layer.maps["weights"]
        assert pixels.shape == (own.shape[0] * own.shape[2], own.shape[1] * own.shape[3])
        tile = pixels[-own.shape[2] :, own.shape[3] :][:, : own.shape[3]]  # the last head, the second query
        expected = 255 * (own[-1, 1] / own[-1, 1].max()).sqrt().numpy()
        assert np.abs(tile - expected).max() <= 1
    assert page.count("<canvas") == sum(layer.heads for layer in heads)


def test_the_command_writes_a_page_a_picture_and_numbers(in_tmp):
    augment.save(model("aa-aw"), "m.safetensors")
    augment.save(model("aa"), "n")
    picture().save("p.png")
    picture().convert("L").save("grey.jpg")
    outputs = ("-o", "a.html", "-o", "a.png", "--at", "0,1", "--kind", "position")
    result = ok("attention", "m.safetensors", "p.png", "grey.jpg", "--beside", "n", *outputs, "--json", "--rollout")
    data = json.loads(result.stdout)
    assert [(one["model"], one["image"]) for one in data["seen"]] == [
        (name, image) for image in ("p.png", "grey.jpg") for name in ("m.safetensors", "n")
    ]
    assert all(0 <= head["outside"] <= 1 for one in data["seen"] for layer in one["heads"] for head in layer["heads"])
    assert all(0 < one["rollout"]["moved"] < 1 for one in data["seen"])
    assert all(list(one["rollout"]["shares"]) == list(data["seen"][0]["rollout"]["shares"]) for one in data["seen"])
    assert Image.open("a.png").width > 100
    assert (in_tmp / "a.html").read_text().startswith("<!doctype html>")
    assert "Share" in ok("attention", "n", "p.png", "--site", "layer4.*", "--rollout").stdout
    assert "Outside 3x3" in ok("attention", "n", "p.png", "--site", "layer4.*", "--head", "1").stdout


def test_titles_are_whole(in_tmp):
    augment.attention_maps(model("aw"), picture()).write_png("a.png")
    above = np.asarray(Image.open("a.png").convert("L"))[:4]
    assert above.min() == 255


def test_a_page_without_heads_asks_for_no_position():
    page = augment.attention_maps(model("aw"), picture()).to("html")
    assert "1 + A" in page
    assert not any(word in page for word in ("<script", "Point at", "<input"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("m.safetensors", "none.png"), "none.png"),
        (("m.safetensors", "text.png"), "text.png"),
        (("none.safetensors", "p.png"), "none.safetensors"),
        (("resnet18", "p.png"), "resnet18"),
        (("m.safetensors", "p.png", "--site", "none"), "none"),
        (("m.safetensors", "p.png", "--head", "77"), "77"),
        (("m.safetensors", "p.png", "--at", "3,4"), "--at"),
        (("m.safetensors", "p.png", "--kind", "all"), "--kind"),
        (("m.safetensors", "p.png", "-o", "a.gif"), ".html"),
        (("m.safetensors", "p.png", "-o", "p.png", "--overwrite"), "p.png"),
        (("m.safetensors", "p.png", "--img-size", "0"), "--img-size"),
    ],
)
def test_wrong_arguments_are_one_line(in_tmp, arguments, word):
    augment.save(model(), "m.safetensors")
    picture().save("p.png")
    (in_tmp / "text.png").write_text("no image")
    before = sorted(in_tmp.iterdir())
    result = run("attention", *arguments)
    assert result.exit_code == 2, result.output
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(in_tmp.iterdir()) == before
