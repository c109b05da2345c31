from pathlib import Path

import pytest

from augment_cli.errors import AugmentError
from augment_cli.planning.recipe import builtin_recipes, load_recipe, resolve_amount

BUILTIN = [
    "aa",
    "aa-aw",
    "aa-mnasnet",
    "aa-ratio",
    "aa-resnet",
    "aa-resnet34",
    "aa-retinanet",
    "aw",
    "aw-aa-resnet",
    "aw-faster-rcnn",
    "aw-mobilenet",
    "aw-resnet",
]


def test_the_built_in_recipes_are_there_and_named_like_their_files():
    assert sorted(builtin_recipes()) == BUILTIN
    assert [load_recipe(name).name for name in BUILTIN] == BUILTIN


@pytest.mark.parametrize("name", [n for n in BUILTIN if "resnet" in n or "ratio" in n or "rcnn" in n])
def test_recipes_from_the_papers_say_paper_table_and_trust_and_set_no_budget(name):
    recipe = load_recipe(name)
    assert "arXiv" in recipe.paper.title
    assert recipe.paper.table
    assert recipe.paper.trust
    assert (recipe.budget.params, recipe.budget.macs) == ("free", "free")


def test_overrides_take_bare_words_numbers_and_lists():
    recipe = load_recipe(
        "aa",
        ("budget.params=+1%", "aa.key_ratio=0.25", "aa.heads=4", "select.names=layer3.*", "select.stages=[2, 3]"),
    )
    assert recipe.budget.params == "+1%"
    assert (recipe.aa.key_ratio, recipe.aa.heads) == (0.25, 4)
    assert (recipe.select.names, recipe.select.stages) == (("layer3.*",), (2, 3))
    assert load_recipe("aa", ('select.names=["a*", "b*"]',)).select.names == ("a*", "b*")


def test_an_override_changes_the_digest():
    assert load_recipe("aa").digest() == load_recipe("aa").digest()
    assert load_recipe("aa", ("aa.heads=4",)).digest() != load_recipe("aa").digest()


@pytest.mark.parametrize(
    ("amount", "source", "expected"),
    [
        ("free", 100, None),
        ("keep", 25_557_032, 25_557_032),
        ("25.6M", 1, 25_600_000),
        ("1.5G", 1, 1_500_000_000),
        ("800k", 1, 800_000),
        ("123456", 1, 123_456),
        ("+1%", 1000, 1010),
        ("-10%", 1000, 900),
        ("+0.5%", 1000, 1005),
    ],
)
def test_budgets_resolve_to_counts(amount, source, expected):
    assert resolve_amount(amount, source) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.params=less", "no budget: write free, keep"),
        ("budget.parms=keep", "unknown key budget.parms; did you mean params"),
        ("aa.key_ration=0.1", "unknown key aa.key_ration; did you mean key_ratio"),
        ("selct.names=a", "unknown key selct; did you mean select"),
        ("aw.reduction=4", r"\[aw\] is not a table of operator aa, which reads \[aa\]"),
        ("aa.heads=0", "aa.heads: Input should be greater than or equal to 1"),
        ("aa.heads=many", "aa.heads: Input should be a valid integer"),
        ("select.regex=(", "not a regular expression"),
        ("operator=ab", "no operator named ab; did you mean"),
        ("heads=4", "write it as table.key=value"),
        ("aa.heads", "write it as table.key=value"),
        ("name.x=4", "name is not a table"),
    ],
)
def test_a_wrong_override_is_refused_with_what_would_be_right(override, message):
    with pytest.raises(AugmentError, match=message):
        load_recipe("aa", (override,))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(AugmentError, match="no built-in recipe named aa-resnt; did you mean aa-resnet"):
        load_recipe("aa-resnt")


def test_a_recipe_file_is_read_and_bad_ones_are_named(tmp_path: Path):
    good = tmp_path / "mine.toml"
    good.write_text('description = "mine"\noperator = "aw"\n')
    assert load_recipe(str(good)).name == "mine"
    bad = tmp_path / "bad.toml"
    bad.write_text("[select\n")
    with pytest.raises(AugmentError, match=r"bad\.toml is not a TOML file: .*line 1"):
        load_recipe(str(bad))
    with pytest.raises(AugmentError, match="no such file"):
        load_recipe(str(tmp_path / "none.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AugmentError, match="is not a text file"):
        load_recipe(str(binary))


def test_attended_kernels_need_a_convolution_branch():
    with pytest.raises(AugmentError, match="value_ratio=1 leaves none"):
        load_recipe("aa-aw", ("aa.value_ratio=1.0",))
