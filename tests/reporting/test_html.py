import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from augment_cli.reporting import Report
from augment_cli.reporting.folding import fold
from augment_cli.reporting.html import to_html
from augment_cli.reporting.markup import Markup, tag
from tests.reporting.conftest import attended, metadata, plan, site

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Holds tags to balance; gathers elements and the text of each kind."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, name: str) -> list[dict]:
        return [attributes for element, attributes in self.elements if element == name]


def one_site() -> Report:
    return Report.of(plan(site("features.40")))


def exact() -> Report:
    made = plan(attended("a.0.conv"), attended("a.1.conv"))
    return Report.of(made, metadata(made))


@pytest.mark.parametrize("name", ["report", "hostile", "many"])
def test_tags_balance(name: str, request: pytest.FixtureRequest):
    Page(to_html(request.getfixturevalue(name)))


def test_tags_balance_for_one_site_without_a_header():
    assert "augment-cli plan" in Page(to_html(one_site())).texts["p"]


def test_every_site_has_a_row(report: Report):
    rows = re.findall(r'<th scope="row"><code>(.*?)</code>', to_html(report))
    assert rows == [line.name for line in fold(report.sites)]


def test_many_rows_fold_by_block(report: Report):
    many = [replace(report.sites[0], name=f"layer{i % 2}.{i}.conv", given_up=i) for i in range(24)]
    page = Page(to_html(replace(report, sites=tuple(many))))
    assert len(page.all("table")) == 3
    assert {"layer0", "layer1"} <= set(page.texts["code"])


def test_every_cell_has_its_title_for_narrow_screens(report: Report):
    assert all(cell.get("data-label") for cell in Page(to_html(report)).all("td"))


def test_random_weights_come_first(report: Report):
    text = to_html(replace(report, weights="random, seed 0", file="a b.safetensors"))
    assert text.index("Not trained.") < text.index('class="cards"')
    assert "augment export &#x27;a b.safetensors&#x27;" in text or "augment export 'a b.safetensors'" in text


def test_headline_numbers(report: Report):
    text = to_html(report)
    for number in ("1.299M", "of 15", "1,298,556", "\N{MINUS SIGN}216,364", "7.558G FLOPs", "90%"):
        assert number in text


def test_loads_nothing(report: Report):
    text = to_html(report)
    bare = text.replace("</", "").replace("/>", "").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//|url\(|@import|src=|href=", bare)
    assert not Page(text).all("script")
    policy = next(meta for meta in Page(text).all("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in policy["content"]


def test_hostile_names_stay_text(hostile: Report):
    text = to_html(hostile)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "\x1b" not in text


def test_charts_and_tables_are_described(report: Report):
    page = Page(to_html(report))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for chart in page.all("svg"):
        assert chart["role"] == "img"
        assert set(chart["aria-labelledby"].split()) <= set(ids)
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert all(cell.get("scope") in ("row", "col", "colgroup") for cell in page.all("th"))


def test_rows_are_as_wide_as_the_head(report: Report):
    table = to_html(report).partition('<table class="sites stack">')[2].partition("</table>")[0]
    titles = sum(int(span) for span in re.findall(r'colspan="(\d+)"', table)) + 1
    for row in re.findall(r"<tr>(.*?)</tr>", table)[2:]:
        assert len(re.findall(r"<t[hd][ >]", row)) == titles


def test_says_whether_to_fine_tune(report: Report):
    assert "Fine-tune before use." in to_html(report)
    assert "Fine-tune" not in to_html(exact())
    assert "our reading of AW" in to_html(exact())


def test_light_dark_and_print(report: Report):
    style = "".join(Page(to_html(report)).texts["style"])
    for query in ("prefers-color-scheme: dark", "@media print", "max-width"):
        assert query in style
    assert re.findall(r"@media (.*)prefers-color-scheme: dark", style) == [
        "screen and (",
        "screen and (",
        "screen and (",
    ]
    printed = style[style.index("@media print") :]
    for rule in (
        "tr, .card, details { break-inside: avoid",
        "details-content { content-visibility: visible",
        "summary {",
    ):
        assert rule in printed
    used = set(re.findall(r"var\((--[\w-]+)\)", style))
    assert used <= set(re.findall(r"(--[\w-]+):", style))


def test_markup_escapes_what_is_not_markup():
    assert tag("b", "<i>", Markup("<i></i>")) == "<b>&lt;i&gt;<i></i></b>"
    assert tag("b", class_='"x"') == '<b class="&quot;x&quot;"></b>'
