"""Rollout is the product of every layer's matrix, which is never made."""

import math

import pytest
import torch
from torch import nn

import augment_cli as augment
from augment_cli.attention import maps, rollout
from augment_cli.attention.looking import attention_maps
from augment_cli.attention.rollout import Rollout, resized, roll_out
from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d, AWConv2d
from tests.attention.test_attention import logits, model, picture


def attends(channels: int, out: int, size: tuple[int, int], **options) -> AAConv2d:
    split = {"heads": 2, "key_channels": 8, "value_channels": 4} | options
    layer = AAConv2d(channels, out, 3, padding=1, **split, resolution=size)
    with torch.no_grad():
        layer.qkv.weight.mul_(3)
    return layer


def network(**options) -> nn.Sequential:
    """Maps of 8x6, 8x6 and, as 3 does not divide 8, 3x2."""
    layers = attends(3, 10, (8, 6)), nn.ReLU(), attends(10, 12, (8, 6), **options), nn.AdaptiveAvgPool2d((3, 2))
    return nn.Sequential(*layers, attends(12, 9, (3, 2)), nn.Flatten(), nn.Linear(54, 5)).double().eval()


NAMES = ["0", "2", "4"]


def matrices(net: nn.Sequential, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each layer's weights (HW, HW), the mean of its heads, all at once."""
    found = {}
    for name, module in net.named_children():
        if isinstance(module, AAConv2d):
            content, position, _ = logits(module, x)
            found[name] = (content + position).softmax(-1).mean(0)
        x = module(x)
    return found


def overlap(old: int, new: int) -> torch.Tensor:
    """Parts of a line in others, by counting the line's smallest common parts."""
    counts = torch.zeros(old, new, dtype=torch.float64)
    for part in range(old * new):
        counts[part // new, part // old] += 1
    return counts / new


@torch.no_grad()
def test_the_maps_are_the_product_of_all_matrices():
    net, x = network(), torch.randn(1, 3, 8, 6, dtype=torch.float64)
    found = roll_out(net, x, NAMES)
    each = matrices(net, x)
    mixing = {n: (1 - found.shares[n]) * torch.eye(len(a)).double() + found.shares[n] * a for n, a in each.items()}
    grown = torch.kron(overlap(3, 8), overlap(2, 6))
    still = math.prod(1 - share for share in found.shares.values())
    expected = mixing["4"] @ grown @ mixing["2"] @ mixing["0"] - still * grown
    assert found.moved == pytest.approx(1 - still)
    torch.testing.assert_close(expected.sum(1), torch.full((6,), found.moved, dtype=torch.float64))
    expected = torch.cat([expected, expected.mean(0, keepdim=True)]) / found.moved
    torch.testing.assert_close(found.maps.flatten(1), expected, rtol=1e-12, atol=1e-14)
    assert (found.map_size, found.grid) == ((3, 2), (3, 2))

    places = torch.cartesian_prod(torch.arange(3), torch.arange(2))
    inside = (places[:, None] - places).abs().amax(-1) <= 1
    back = expected[:-1] @ torch.kron(overlap(8, 3), overlap(6, 2))
    assert found.outside == pytest.approx(1 - float((back * inside).sum(1).mean()))


@torch.no_grad()
def test_a_share_is_how_far_the_output_moves_when_positions_attend_to_themselves():
    net, x = network(), torch.randn(1, 3, 8, 6, dtype=torch.float64)
    found, whole = roll_out(net, x, NAMES), net(x)
    layer = net[2]
    inner = net[:2](x)
    own = layer.proj(layer.qkv(inner)[:, 2 * layer.key_channels :])
    still = net[3:](torch.cat([layer.conv(inner), own], 1))
    moved = float((whole - still).norm())
    assert found.shares["2"] == pytest.approx(moved / (moved + float(still.norm())))
    assert torch.equal(net(x), whole)


@torch.no_grad()
def test_attention_to_itself_moves_nothing_and_even_attention_looks_everywhere():
    net, x = network(), torch.randn(1, 3, 8, 6, dtype=torch.float64)
    for name in ("0", "2"):
        net[int(name)].proj.weight.zero_()
    for table in (net[4].rel_height, net[4].rel_width):
        table.zero_()
    net[4].qkv.weight[:16].zero_()
    found = roll_out(net, x, NAMES)
    assert found.shares["0"] == found.shares["2"] == 0
    assert found.moved == pytest.approx(found.shares["4"])
    torch.testing.assert_close(found.maps, torch.full((7, 8, 6), 1 / 48, dtype=torch.float64))
    net[4].proj.weight.zero_()
    nothing = roll_out(net, x, NAMES)
    assert nothing.moved == nothing.outside == float(nothing.maps.sum()) == 0
    assert "moved nothing" in nothing.summary
    assert "moved nothing" not in found.summary


@torch.no_grad()
def test_no_more_logits_are_made_at_a_time_than_allowed(monkeypatch):
    net, x = network(attention_pool=2), torch.randn(1, 3, 8, 6, dtype=torch.float64)
    whole = roll_out(net, x, NAMES)
    monkeypatch.setattr(maps, "_MOST_LOGITS", 200)
    sizes, made = [], rollout.logits_of

    def counted(*args):
        for places, content, position in made(*args):
            sizes.append(content.numel())
            yield places, content, position

    monkeypatch.setattr(rollout, "logits_of", counted)
    parts = roll_out(net, x, NAMES)
    assert max(sizes) <= 200
    torch.testing.assert_close(parts.maps, whole.maps)


def test_weight_stays_when_a_map_changes_its_size():
    rows = torch.rand(4, 35, dtype=torch.float64)
    wider = resized(rows, (5, 7), (9, 3))
    torch.testing.assert_close(wider.sum(1), rows.sum(1))
    torch.testing.assert_close(resized(resized(rows, (5, 7), (10, 21)), (10, 21), (5, 7)), rows)


def test_rollout_takes_the_layers_that_are_named_in_the_order_in_which_they_run():
    made = model("aa-aw")
    every = attention_maps(made, picture(), rollout=True).seen[0].layers[-1]
    assert isinstance(every, Rollout)
    assert list(every.shares) == [name for name, layer in maps.layers_of(made).items() if isinstance(layer, AAConv2d)]
    one = attention_maps(made, picture(), layers=["layer2.0.conv1"], rollout=True).seen[0].layers[-1]
    assert list(one.shares) == ["layer2.0.conv1"]
    assert one.shares["layer2.0.conv1"] == pytest.approx(every.shares["layer2.0.conv1"], rel=1e-4)
    kernels = [name for name, layer in maps.layers_of(made).items() if isinstance(layer, AWConv2d)]
    with pytest.raises(AugmentError, match="AW moves nothing"):
        augment.attention_maps(made, picture(), layers=kernels, rollout=True)
