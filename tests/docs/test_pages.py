"""The documentation is true: its commands are run, its numbers and keys are counted again."""

import re
from pathlib import Path

import pytest

import augment_cli as augment
from augment_cli.cli import app
from augment_cli.operators import operator_names, registry
from augment_cli.planning.recipe import builtin_recipes, recipe_type
from augment_cli.reporting.network import network_picture
from tests.conftest import plan_of
from tests.docs.pages import blocks, check_output, run_page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "howto").glob("*.md"))
ALL = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(autouse=True)
def _forgets_operators_of_pages():
    yield
    for name in registry._operators.keys() - registry._BUILT_IN.keys():
        del registry._operators[name]


@pytest.mark.parametrize("page", [ROOT / "README.md", *HOW_TO], ids=lambda page: page.stem)
def test_the_commands_of_a_page_do_what_it_says(page, in_tmp):
    run_page(page)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_a_how_to_page_has_commands_that_are_run(page):
    assert {block.language for block in blocks(page)} & {"sh", "python"}


@pytest.mark.parametrize("shown", ["b\na", "a\nc", "a\n...\nd", "d", "aa..."])
def test_an_output_that_is_not_as_shown_is_found(shown):
    check_output("a\n...\nc", "a\nb\nc\n", "page:1")
    with pytest.raises(AssertionError):
        check_output(shown, "a\nb\nc\n", "page:1")


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def _rows(page: Path, columns: int) -> list[list[str]]:
    """The cells of a page's tables that have so many columns, without backticks."""
    lines = re.findall(r"^\|(.*)\|$", page.read_text(encoding="utf-8"), re.M)
    rows = [[cell.strip().replace("`", "") for cell in line.split("|")] for line in lines]
    return [row for row in rows if len(row) == columns and not set(row[0]) <= set("-: ")]


def test_the_counts_beside_the_published_ones_are_the_plans():
    header, *rows = _rows(DOCS / "papers.md", 6)
    assert header == ["model", "recipe", "parameters", "published", "GFLOPs", "published"]
    assert len(rows) >= 7
    for model, recipe, params, published_params, gflops, _ in rows:
        if recipe == "none":
            plan = plan_of(model, "aa-resnet")
            counts = plan.params_before, plan.macs_before
        else:
            name, *overrides = recipe.split()
            plan = plan_of(model, name, *overrides)
            counts = plan.params_after, plan.macs_after
        assert f"{counts[0]:,}" == params
        assert f"{2 * counts[1] / 1e9:.2f}" == gflops
        assert published_params in (f"{counts[0] / 1e6:.1f}M", "-")


def test_every_builtin_recipe_is_listed():
    listed = {row[0]: row[3] for row in _rows(DOCS / "recipes.md", 4)}
    listed.pop("recipe")
    assert listed == {name: augment.load_recipe(name).budget.params for name in builtin_recipes()}


@pytest.mark.parametrize("operator", [name for name in operator_names() if name in ("aa", "aw", "aa+aw")])
def test_every_key_of_a_recipe_is_listed_with_its_default(operator):
    listed = {row[0]: row[1] for row in _rows(DOCS / "recipes.md", 3)}
    for table, field in recipe_type(operator).model_fields.items():
        for key, value in getattr(field.annotation, "model_fields", {}).items():
            default = (
                ", ".join(map(str, value.default)) if isinstance(value.default, tuple) else str(value.default).lower()
            )
            expected = ("any", "none", "torch's") if default in ("", "none") else (default,)
            assert listed[f"{table}.{key}"] in expected


def test_every_command_is_listed():
    listed = {row[0].split()[1] for row in _rows(DOCS / "commands.md", 2) if row[0].startswith("augment ")}
    commands = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert listed == commands


def test_every_public_name_is_in_the_reference():
    reference = (DOCS / "api.md").read_text(encoding="utf-8")
    assert {name for name in augment.__all__ if f"::: augment_cli.{name}\n" not in reference} == set()


def test_the_picture_of_the_readme_is_of_its_plan():
    picture = (DOCS / "assets" / "aa-resnet50.svg").read_text(encoding="utf-8")
    assert picture == network_picture(plan_of("resnet50", "aa-resnet", "budget.params=keep"))
