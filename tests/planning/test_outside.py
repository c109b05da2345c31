"""Plans, recipes and metadata from strangers: every number, text, list and nesting has a bound."""

import json

import pytest

from augment_cli.errors import AugmentError, boundary
from augment_cli.files import read_text
from augment_cli.planning.plan import make_plan
from augment_cli.planning.reading import parse_plan, read_plan
from augment_cli.planning.recipe import builtin_recipes, load_recipe
from augment_cli.reporting import FORMATS, Report
from tests.conftest import graph_of, plan_of


def data() -> dict:
    return json.loads(plan_of("test_resnet", "aa").to_json())


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no object of arguments"),
        (3, "no object of arguments"),
        ("layers", "no object of arguments"),
        ({"layers": nested(5)}, "nested more than 4 deep"),
        ({"layers": nested(300)}, "nested more than 4 deep"),
        ({"layers": [1] * 1001}, "holds 1,001 values"),
        ({"block": "x" * 1001}, "text of 1,001 characters"),
        ({"width": 10**22}, "number that is not from"),
        ({"width": 1e300}, "number that is not from"),
        ({"width": float("nan")}, "number that is not from"),
        ({"width": float("-inf")}, "number that is not from"),
        ({"x" * 1001: 1}, "name that is too long"),
        ({"plan": {}}, "plan cannot be set"),
    ],
)
def test_arguments_of_a_plan_are_bounded(value, message):
    with pytest.raises(AugmentError, match=message):
        parse_plan(json.dumps(data() | {"model_args": value}), "plan")


def test_dictionaries_among_a_models_arguments_stay_dictionaries():
    given = {"act_kwargs": {"inplace": True}, "layers": [[1, 2], [3]]}
    plan = parse_plan(json.dumps(data() | {"model_args": given}), "plan")
    assert json.loads(plan.to_json())["model_args"] == given
    hash(plan)


SPLIT = ("heads", "key_channels", "value_channels", "attention_pool")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("in_channels", 2**16 + 1),
        ("out_channels", 0),
        ("kernel_size", [256, 3]),
        ("kernel_size", [0, 3]),
        ("stride", [1, 10**9]),
        ("resolution", [8193, 1]),
        ("resolution", [0, 1]),
        ("groups", 7),
        ("heads", 10**22),
        ("key_channels", 128 * 192 + 2),
        ("value_channels", -1),
        ("attention_pool", 10**9),
        ("params_after", 10**30),
        ("name", "x" * 501),
    ],
)
def test_every_number_of_a_site_is_bounded(key, value):
    plan = data()
    site = plan["sites"][-1]
    (site["split"] if key in SPLIT else site)[key] = value
    with pytest.raises(AugmentError, match=rf"sites\.\d+.*{key}|{value} groups|positive multiple"):
        parse_plan(json.dumps(plan), "plan")


@pytest.mark.parametrize(
    "change",
    [
        {"budget": {"params": "9" * 400}},
        {"budget": {"params": "+" + "9" * 400 + "%"}},
        {"input_size": [3, 10**6, 10**6]},
        {"input_size": [0, 64, 64]},
        {"params_before": 10**40},
        {"recipe_sha256": "\x1b[2J"},
        {"model": "m" * 501},
        {"model": "hf-hub:someone/else"},
        {"model": "local-dir:/tmp"},
        {"skipped": [{"name": "a", "reason": "r" * 501}]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_rest_of_a_plan_is_bounded(change):
    with pytest.raises(AugmentError, match=next(iter(change))):
        parse_plan(json.dumps(data() | change), "plan")


@pytest.mark.parametrize(
    "text", ['{"schema": ' + "9" * 5000 + "}", '{"schema": ' + "[" * 100_000 + "]" * 100_000 + "}", "[]", "null", "3"]
)
def test_integers_of_thousands_of_digits_and_deep_nesting_are_refused(text):
    with pytest.raises(AugmentError, match="plan") as caught:
        parse_plan(text, "plan")
    assert "set_int_max_str_digits" not in str(caught.value)


def test_many_skipped_names_are_read_and_shown_and_more_are_refused():
    """In seconds: checked in quadratic time, so many would take minutes."""
    plan = data()
    plan["skipped"] = [{"name": f"layer{i}", "reason": "r"} for i in range(99_000)]
    report = Report.of(parse_plan(json.dumps(plan), "plan"))
    assert report.convolutions == 99_000 + len(report.sites)
    plan["skipped"] *= 2
    with pytest.raises(AugmentError, match="skipped"):
        parse_plan(json.dumps(plan), "plan")


def test_names_that_come_twice_are_named_three_at_most():
    plan = data()
    plan["skipped"] *= 2
    with pytest.raises(AugmentError, match=r"named more than once: .*, .*, .* and \d+ more"):
        parse_plan(json.dumps(plan), "plan")


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_plan_of_hostile_texts_is_shown_in_every_form(form):
    plan = data() | {"recipe": "[red]x[/blink]\x1b[2J", "model": "=1+1\n| a |"}
    plan["sites"][0]["name"] = "@x\ty"
    text = FORMATS[form](Report.of(parse_plan(json.dumps(plan), "plan")))
    assert "\x1b" not in text
    assert "\ty" not in text


def test_files_that_are_too_long_are_refused_unread(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(AugmentError, match="more than"):
        read_plan(path)
    with pytest.raises(AugmentError, match="more than"):
        load_recipe(str(path))
    with pytest.raises(AugmentError, match="cannot be read"):
        read_text(tmp_path, "plan")
    with pytest.raises(AugmentError, match="cannot be read"):
        read_text(tmp_path / "a\0b", "plan")


OVERRIDES = [
    ("aa.heads=1" + "0" * 22, "heads"),
    ("aa.heads=" + "9" * 5000, "digits"),
    ("aa.heads=0x" + "f" * 5000, "heads"),
    ("aa.min_key_channels=65", "min_key_channels"),
    ("select.names=" + "[" * 500 + "]" * 500, "nested too deeply|valid string"),
    ("select.names=" + "[" * 60 + "]" * 60, "select.names"),
    ("select.kernel=1000000", "kernel"),
    ("select.stages=[" + "1," * 2000 + "]", "stages"),
    ("aa.key_ratio=nan", "key_ratio"),
    ("aa.value_ratio=inf", "value_ratio"),
    ("select.largest_map=" + "9" * 30, "largest_map"),
    ("aa.attention_pool=99999", "attention_pool"),
    ("aw.reduction=99999999", "reduction"),
    ("budget.params=" + "9" * 400, "no budget"),
    ("budget.macs=1e400", "no budget"),
    ("paper.title=" + "x" * 6000, "paper.title"),
    ("select.regex=(a+)+$", "a group is repeated"),
    ("select.regex=(.|.)*z", "a group is repeated"),
    ("select.regex=.*.*.*.*.*.*z", "more than 5"),
    ("select.regex=" + "a?" * 30, "more than 10"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[o[:40] for o, _ in OVERRIDES])
def test_every_value_of_a_recipe_is_bounded(override, message):
    with pytest.raises(AugmentError, match=message):
        load_recipe("aa-aw", (override,))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stages = " + "9" * 5000, "not a TOML file"),
        ("stages = 0x" + "f" * 5000, "stages"),
        ("names = " + "[" * 500 + "]" * 500, "nested too deeply|valid string"),
        ("names = [" + "'a'," * 1001 + "]", "at most 1000"),
        ("a" + ".a" * 2000 + " = 1", "unknown key"),
        ("x = " + "{a = " * 400 + "1" + "}" * 400, "nested too deeply|unknown key"),
    ],
    ids=lambda value: value[:20],
)
def test_a_recipe_file_of_absurd_values_is_refused(tmp_path, line, message):
    path = tmp_path / "r.toml"
    path.write_text(f'description = "x"\noperator = "aa"\n[select]\n{line}\n')
    with pytest.raises(AugmentError, match=message):
        load_recipe(str(path))


def test_regular_expressions_that_are_quick_are_taken():
    for pattern in (r"layer[34]\.\d+\.conv[12]$", r"(?:layer3|layer4)\..*conv2", r"[)*+]|layer4", r"\(*\)+|conv"):
        assert load_recipe("aa", (f"select.regex='{pattern}'",)).select.regex == pattern


def test_built_in_recipes_are_within_the_bounds_and_plan_the_widest_models():
    for name in builtin_recipes():
        load_recipe(name)
    for override in ("aa.heads=16", "aa.min_key_channels=64", "aa.key_ratio=4", "aa.value_ratio=1"):
        plan, _ = make_plan("resnet50", graph_of("resnet50"), load_recipe("aa-resnet", (override,)))
        assert parse_plan(plan.to_json(), "plan") == plan


def test_whatever_is_raised_becomes_one_line():
    for error in (
        KeyError("x"),
        RuntimeError("a\nb"),
        RecursionError(),
        MemoryError(),
        AssertionError(),
        OSError(2, "n"),
    ):
        with pytest.raises(AugmentError, match=r"^file: .") as caught, boundary("file"):
            raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(AugmentError, match=r"^as it is$"), boundary("file"):
        raise AugmentError("as it is")
    with pytest.raises(KeyboardInterrupt), boundary("file"):
        raise KeyboardInterrupt
    with pytest.raises(AugmentError) as caught, boundary("file"):
        raise ValueError("x" * 10_000)
    assert len(str(caught.value)) < 400
