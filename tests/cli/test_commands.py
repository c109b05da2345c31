"""Every command as a user sees it when all is well."""

import csv
import io
import json
import subprocess
import sys
import tomllib

import pytest

from augment_cli.planning.recipe import builtin_recipes
from tests.cli.helpers import ok, run


@pytest.fixture
def made(in_tmp):
    ok("convert", "test_resnet", "-r", "aa", "-o", "m.safetensors")
    return in_tmp


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from augment_cli.cli import app\n"
        "from typer.testing import CliRunner\n"
        "for command in ('', 'plan', 'convert', 'report', 'check', 'recipes', 'models'):\n"
        "    assert CliRunner().invoke(app, [*command.split(), '--help']).exit_code == 0, command\n"
        "heavy = {'torch', 'timm', 'numpy', 'scipy'} & sys.modules.keys()\n"
        "print(sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"


def test_plan_prints_the_plan_as_json_alone_on_stdout():
    result = ok("plan", "resnet50", "--recipe", "aa-resnet", "--json")
    plan = json.loads(result.stdout)
    assert plan["params_after"] == 25_809_392
    assert len(plan["sites"]) == 13
    assert "13 to replace" in result.stderr


def test_plan_shows_every_total_in_its_table():
    out = ok("plan", "resnet50", "--recipe", "aa-resnet", "--set", "budget.params=keep").stdout
    assert "25,557,032" in out
    assert "layer3.1-5.conv2" in out
    assert "1x1 kernel, the recipe takes 3x3" in out


def test_settings_and_model_arguments_reach_the_plan():
    arguments = [
        "--set",
        "select.names=layer4.*",
        "--set",
        "aa.heads=4",
        "-a",
        "num_classes=10",
        "--img-size",
        "96x160",
    ]
    plan = json.loads(ok("plan", "resnet18", *arguments, "--json").stdout)
    assert {site["name"].split(".")[0] for site in plan["sites"]} == {"layer4"}
    assert {site["split"]["heads"] for site in plan["sites"]} == {4}
    assert plan["model_args"] == {"num_classes": 10}
    assert plan["input_size"] == [3, 96, 160]
    assert plan["sites"][-1]["resolution"] == [3, 5]


def test_convert_writes_a_file_shows_the_budget_and_check_confirms_it(in_tmp):
    result = ok("convert", "test_resnet", "--recipe", "aa", "--output", "m.safetensors")
    assert "wrote m.safetensors" in result.stderr
    assert "budget solved in" in result.stderr
    assert "469,688" in result.stdout
    assert [f.name for f in in_tmp.iterdir()] == ["m.safetensors"]
    checked = json.loads(ok("check", "m.safetensors", "--json").stdout)
    assert checked["passed"]
    assert {f["what"] for f in checked["findings"]} == {"parameters", "multiply-adds", "forward pass"}


def test_the_default_output_is_named_after_model_and_recipe(in_tmp):
    ok("convert", "test_resnet", "-r", "aw")
    assert [f.name for f in in_tmp.iterdir()] == ["test_resnet-aw.safetensors"]


def test_convert_writes_a_folder_that_check_reads_too(in_tmp):
    ok("convert", "test_resnet", "-r", "aa-aw", "-o", "out")
    assert (in_tmp / "out/README.md").read_text().startswith("---\n")
    assert "ok" in ok("check", "out").stdout


def test_an_edited_plan_is_converted_as_edited(in_tmp):
    plan = json.loads(ok("plan", "test_resnet", "--json").stdout)
    plan["sites"] = plan["sites"][-2:]
    plan["sites"][0]["split"]["value_channels"] += 2 * plan["sites"][0]["split"]["heads"]
    (in_tmp / "plan.json").write_text(json.dumps(plan))
    ok("convert", "--plan", "plan.json", "-o", "m.safetensors")
    made = json.loads(ok("report", "m.safetensors", "--format", "json").stdout)
    assert [site["name"] for site in made["sites"]] == [site["name"] for site in plan["sites"]]
    assert made["sites"][0]["split"]["value_channels"] == plan["sites"][0]["split"]["value_channels"]
    assert json.loads(ok("check", "m.safetensors", "--json").stdout)["passed"]


def test_an_edited_plan_is_shown_and_refused_over_its_budget_until_that_is_another(in_tmp):
    plan = json.loads(ok("plan", "test_resnet", "--json").stdout)
    plan["sites"][-1]["split"]["key_channels"] *= 2
    (in_tmp / "plan.json").write_text(json.dumps(plan))
    left = json.loads(ok("report", "plan.json", "-f", "json").stdout)["totals"]["params"]["left"]
    assert left < 0
    for command in (("plan",), ("convert", "-o", "m.safetensors")):
        result = run(*command, "--plan", "plan.json")
        assert result.exit_code == 2
        assert f"{-left:,} more than its budget.params=keep" in result.stderr
        assert not (in_tmp / "m.safetensors").exists()
    loose = ("--plan", "plan.json", "--set", "budget.params=+50%")
    shown = json.loads(ok("plan", *loose, "--json").stdout)
    assert shown["sites"][-1]["split"]["key_channels"] == plan["sites"][-1]["split"]["key_channels"]
    assert shown["params_after"] == plan["params_before"] - left
    assert shown["budget"]["params"] == "+50%"
    assert f"{shown['params_after']:,}" in ok("plan", *loose).stdout
    ok("convert", *loose, "-o", "m.safetensors")
    assert json.loads(ok("check", "m.safetensors", "--json").stdout)["passed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan",), "which model"),
        (("plan", "test_resnet", "--plan", "p"), "leave out MODEL"),
        (("plan", "--plan", "p", "-r", "aa"), "leave out --recipe"),
        (("plan", "--plan", "p", "--set", "aa.heads=4"), "only the budget"),
        (("plan", "--plan", "p", "--sensitivity", "--calibrate", "x", "--pretrained"), "leave out --plan"),
        (("convert", "--plan", "p", "--img-size", "64"), "leave out --img-size"),
    ],
)
def test_what_does_not_go_with_a_plan_is_refused(in_tmp, arguments, message):
    (in_tmp / "p").write_text(ok("plan", "test_resnet", "--json").stdout)
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_nothing_but_the_plan_reaches_stdout():
    """HiGHS prints a line by itself while it solves this one, or did."""
    command = [sys.executable, "-m", "augment_cli", "plan", "resnet50", "--set", "budget.macs=2890053512", "--json"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(out)["macs_after"] <= 2_890_053_512


def test_the_same_command_gives_the_same_bytes(in_tmp):
    for name in ("a", "b"):
        ok("convert", "test_resnet", "-o", f"{name}.safetensors", "--seed", "7")
    assert (in_tmp / "a.safetensors").read_bytes() == (in_tmp / "b.safetensors").read_bytes()


def test_overwrite_replaces_the_file(made):
    before = (made / "m.safetensors").read_bytes()
    ok("convert", "test_resnet", "-o", "m.safetensors", "--overwrite", "--seed", "1")
    assert (made / "m.safetensors").read_bytes() != before


def test_a_checkpoint_gives_its_weights_to_the_converted_model(in_tmp):
    import timm
    import torch
    from safetensors.torch import save_file

    import augment_cli

    source = timm.create_model("test_resnet").eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, "source.pth")
    save_file(source.state_dict(), "source.safetensors")
    x = torch.randn(1, 3, 160, 160)
    for name in ("source.pth", "source.safetensors"):
        ok("convert", "test_resnet", "-r", "aw", "--checkpoint", name, "-o", "m.safetensors", "--overwrite")
        out = augment_cli.load("m.safetensors").eval()(x)
        torch.testing.assert_close(out, source(x), rtol=1e-4, atol=1e-5)
    assert "checkpoint source.safetensors" in ok("report", "m.safetensors").stdout


def test_report_has_every_format_on_stdout_and_in_files(made):
    rows = list(csv.DictReader(io.StringIO(ok("report", "m.safetensors", "-f", "csv").stdout)))
    numbers = json.loads(ok("report", "m.safetensors", "-f", "json").stdout)
    assert [row["name"] for row in rows] == [site["name"] for site in numbers["sites"]]
    assert "|" in ok("report", "m.safetensors", "-f", "markdown").stdout
    assert "469,688" in ok("report", "m.safetensors").stdout
    result = ok("report", "m.safetensors", "-f", "html", "-o", "r.html")
    assert result.stdout == ""
    assert (made / "r.html").read_text().lower().startswith("<!doctype html>")
    assert "\x1b" not in ok("report", "m.safetensors", "-o", "r.txt").stdout + (made / "r.txt").read_text()


def test_report_needs_no_torch(made):
    code = (
        "import sys; from typer.testing import CliRunner; from augment_cli.cli import app\n"
        "assert CliRunner().invoke(app, ['report', 'm.safetensors']).exit_code == 0\n"
        "print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=made).stdout
    assert out == "False False\n"


def test_report_reads_a_plan_too(in_tmp):
    (in_tmp / "plan.json").write_text(ok("plan", "test_resnet", "--json").stdout)
    assert "469,688" in ok("report", "plan.json").stdout


def test_recipes_are_listed_shown_and_copied(in_tmp):
    assert [r["name"] for r in json.loads(ok("recipes", "list", "--json").stdout)] == list(builtin_recipes())
    assert ok("recipes").stdout == ok("recipes", "list").stdout
    assert tomllib.loads(ok("recipes", "show", "aa").stdout)["name"] == "aa"
    ok("recipes", "copy", "aw", "mine.toml")
    assert (in_tmp / "mine.toml").read_text() == builtin_recipes()["aw"].read_text()
    ok("convert", "test_resnet", "-r", "mine.toml", "-o", "m.safetensors")


def test_models_says_what_can_be_converted_and_why_not():
    found = {m["model"]: m for m in json.loads(ok("models", "test_[rv]*", "--json").stdout)}
    outcomes = found["test_resnet"]["outcomes"]
    assert {recipe: o["sites"] for recipe, o in outcomes.items()} == {"aa": 7, "aw": 9, "aa-aw": 7}
    assert outcomes["aa"]["least_params"] < found["test_resnet"]["params"] < outcomes["aa"]["most_params"]
    assert "no 3x3 convolution here" in found["test_vit"]["outcomes"]["aw"]["reason"]
    shown = " ".join(ok("models", "levit_128").stdout.split())
    assert "levit_128 224x224" in shown
    assert "stem" in shown


def test_no_colours_where_there_is_no_terminal(made):
    result = subprocess.run(
        [sys.executable, "-m", "augment_cli", "report", "m.safetensors"], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in result.stdout + result.stderr
