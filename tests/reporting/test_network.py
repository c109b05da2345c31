"""The picture of a network: a mark for each convolution, in its band, in its operator's colour."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from augment_cli.planning.plan import Plan
from augment_cli.reporting import Report
from augment_cli.reporting.html import to_html
from augment_cli.reporting.network import _MOST_MARKS, NARROW, WIDE, Mark, draw_network, marks, network_picture
from tests.cli.helpers import ok, run
from tests.conftest import graph_of, plan_of
from tests.reporting.conftest import attended, plan, site

SVG = "{http://www.w3.org/2000/svg}"


def bars(picture: str) -> list[ElementTree.Element]:
    """The groups of a mark: those with a title of their own."""
    return [group for group in ElementTree.fromstring(picture).iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]


def heights(group: ElementTree.Element) -> list[float]:
    return [float(rect.get("height")) for rect in group.findall(f"{SVG}rect")]


@pytest.mark.parametrize("model", ["test_resnet", "resnet18"])
def test_every_convolution_is_a_mark_in_the_band_of_its_map(model: str):
    picture = network_picture(plan_of(model, "aa"))
    sites = {conv.name: conv for conv in graph_of(model).sites}
    assert len(bars(picture)) == len(sites)
    bands = {}
    for group in ElementTree.fromstring(picture).findall(f"{SVG}g")[1:]:
        label = group.find(f"{SVG}text").text
        bands |= {bar.find(f"{SVG}title").text.split(":")[0]: label for bar in group.findall(f"{SVG}g")}
    assert bands == {name: "{} \N{MULTIPLICATION SIGN} {}".format(*conv.resolution) for name, conv in sites.items()}


def test_the_solid_part_is_the_share_that_attention_took():
    made = plan(*(site(f"layer{i}", value_channels=channels) for i, channels in enumerate((8, 64, 128))), attended("z"))
    *augmented, kernel_only = bars(network_picture(made))
    for bar, entry in zip(augmented, made.sites, strict=False):
        pale, solid = heights(bar)
        assert solid / pale == pytest.approx(entry.given_up / entry.out_channels, abs=0.01)
    assert len(heights(kernel_only)) == 1
    colours = {group.find(f"{SVG}rect").get("fill") for group in (*augmented, kernel_only)}
    assert len(colours) == 2


def narrow(found: tuple[Mark, ...], title: str) -> str:
    return draw_network(found, title, "network-narrow", NARROW)


@pytest.mark.parametrize("wanted", [WIDE, NARROW])
def test_nothing_lies_outside_the_picture(wanted: int):
    for made in (plan_of("resnet18", "aa"), plan_of("hrnet_w18", "aa"), plan(site("a"))):
        root = ElementTree.fromstring(draw_network(marks(made), "title", width=wanted))
        _, _, width, height = map(float, root.get("viewBox").split())
        assert width == wanted
        assert len(bars(ElementTree.tostring(root))) == len(marks(made))
        for text in root.iter(f"{SVG}text"):
            assert float(text.get("x")) + 6 * len(text.text) <= width
        for rect in root.iter(f"{SVG}rect"):
            x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width
            assert 0 <= y <= y + h <= height


def test_a_plan_of_unknown_shapes_and_one_of_thousands_of_convolutions_are_drawn(small: Plan):
    assert "map unknown" in network_picture(small)
    many = marks(small) * 1000
    picture = draw_network(many, "many")
    assert len(bars(picture)) == _MOST_MARKS
    assert f"{len(many) - _MOST_MARKS:,} more" in picture


def test_a_phone_shows_the_narrow_picture_and_scrolls_nothing_sideways(report: Report):
    page = to_html(report)
    assert NARROW <= 375 - 2 * 2 * 0.9 * 16 + 4  # what the page's and the section's padding leave, about
    assert "min-width: 40rem" not in page
    phone = page[page.index("@media (max-width: 40rem)") :]
    assert ".wide { display: none; }" in phone
    assert ".narrow { display: block; }" in phone
    assert ".narrow { display: none;" in page[: page.index("@media (max-width: 40rem)")]


def test_hostile_names_stay_text(hostile: Report):
    picture = draw_network(hostile.marks, hostile.model)
    assert "<script" not in picture
    ElementTree.fromstring(picture)


def test_the_picture_is_in_the_page_and_every_variable_is_defined(report: Report):
    page = to_html(report)
    title = f"The convolutions of {report.model} by map size"
    for picture, kind in ((draw_network(report.marks, title), "wide"), (narrow(report.marks, title), "narrow")):
        assert f'<div class="{kind}">{picture}</div>' in page
    assert len(re.findall(r' id="([^"]*)"', page)) == len(set(re.findall(r' id="([^"]*)"', page)))
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used <= set(re.findall(r"(--[\w-]+):", page))
    assert 'class="network"' in to_html(replace(report, marks=report.marks[:1]))


def test_the_command_draws_it_and_a_converted_folder_holds_it(in_tmp):
    ok("plan", "test_resnet", "--plot", "net.svg")
    ElementTree.parse("net.svg")
    ok("convert", "test_resnet", "-o", "out")
    assert (in_tmp / "out/network.svg").read_text() == (in_tmp / "net.svg").read_text()
    assert "](network.svg)" in (in_tmp / "out/README.md").read_text()
    (in_tmp / "edited.json").write_text(plan_of("test_resnet", "aa").to_json())
    ok("plan", "--plan", "edited.json", "--plot", "again.svg")
    for name, word in (("net.png", ".svg"), ("none/net.svg", "none"), ("edited.json", ".svg")):
        result = run("plan", "--plan", "edited.json", "--plot", name)
        assert result.exit_code == 2
        assert word in result.stderr
