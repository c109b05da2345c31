"""Shell completion, asked as a shell asks for it: in a process of its own, which imports no torch."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from augment_cli.cli import completion
from augment_cli.planning.recipe import builtin_recipes, load_recipe

ASK = """
import sys
sys.argv = ["augment"]
from augment_cli.cli import app
try:
    app(prog_name="augment")
finally:
    heavy = {"torch", "timm"} & sys.modules.keys()
    assert not heavy, heavy
"""


def completed(line: str) -> list[str]:
    """Completions in fish for the last word of a line: values, each with an explanation that may go over lines."""
    environment = os.environ | {
        "_AUGMENT_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    offers = (offer.split("\t")[0] for offer in done.stdout.splitlines())
    return [offer for offer in offers if offer.startswith(line.split(" ")[-1]) and offer]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("augment plan resnet101_", ["resnet101_clip", "resnet101_clip_gap"]),
        ("augment convert resnet50 --recipe aa-resnet", ["aa-resnet", "aa-resnet34"]),
        ("augment recipes show aw-m", ["aw-mobilenet"]),
        ("augment plan resnet50 -r aa-resnet --set aa.min", ["aa.min_key_channels=20"]),
        ("augment plan resnet50 -r aw --set aw.", ["aw.reduction=16"]),
        ("augment plan resnet50 -r aw --set aa.", []),
        ("augment plan resnet50 -r no-such-recipe --set aa.", []),
        ("augment plan resnet50 --set aa.narrow=", ["aa.narrow=more-keys", "aa.narrow=fewer-heads"]),
    ],
)
def test_a_shell_is_offered_what_fits_and_no_torch_is_imported(line, offered):
    assert completed(line) == offered


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_every_offered_value_is_one_that_the_recipe_takes(name):
    context = SimpleNamespace(params={"recipe": name})
    offers = [offer for offer, _ in completion.overrides(context, "")]
    assert {offer.partition(".")[0] for offer in offers} >= {"select", "budget"}
    for offer in offers:
        if not offer.endswith("="):
            load_recipe(name, (offer,))
