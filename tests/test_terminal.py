"""Printed text shows control characters as escapes, and errors spell settings as options."""

import ast
import re
from pathlib import Path

import pytest

import augment_cli
from augment_cli.terminal import echo, plain, respell, say

PACKAGE = Path(augment_cli.__file__).parent


@pytest.mark.parametrize(
    ("message", "spelled"),
    [
        ("`overwrite=True` replaces it", "--overwrite replaces it"),
        ("`augmentation=False`", "--no-augmentation"),
        ("give `val_data`, or `hold_out=0.1`", "give --val-data, or --hold-out 0.1"),
        ("`on_corrupt='skip'` or `precision=\"bf16\"`", "--on-corrupt skip or --precision bf16"),
        ("`checkpoint_every='every day'`: no", "--checkpoint-every 'every day': no"),
        ("`checkpoint_every=''`: no", "--checkpoint-every '': no"),
        ("`lr=-1.0` is not from 0", "--lr -1.0 is not from 0"),
        ("leave out `model_args`", "leave out --model-arg"),
        ("give its size, `input_size=224`", "give its size, --img-size 224"),
        ("add the argument `num_classes=10`", "add --model-arg num_classes=10"),
        ("an argument `depth` is unknown", "an argument `depth` is unknown"),
        ("`select.include_stem=true` takes those", "--set select.include_stem=true takes those"),
        ("`make sweep` makes it", "`make sweep` makes it"),
        ("`augment_cli.load` reads it", "`augment_cli.load` reads it"),
        ("`NAME=1` and `a-b` and ``", "`NAME=1` and `a-b` and ``"),
        ("a lone ` stays, x=1 too", "a lone ` stays, x=1 too"),
    ],
)
def test_settings_are_spelled_as_options(message, spelled):
    assert respell(message) == spelled


def texts(source: str) -> list[str]:
    """The string constants of a file, docstrings left out."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if node.body and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in constants if id(node) not in docstrings]


@pytest.mark.parametrize("folder", ["training", "reporting"])
def test_errors_of_the_library_name_no_options(folder):
    files = sorted((PACKAGE / folder).glob("*.py"))
    option = re.compile(r"(^|\s)--[a-z][a-z-]*(?![a-z-]|:)")  # and no property of a style sheet
    assert files
    for path in files:
        said = [text for text in texts(path.read_text()) if not text.startswith("augment ")]  # a whole command
        assert [text for text in said if option.search(text)] == [], path.name


def test_control_characters_are_shown(capsys):
    echo("a\x1b[2J\tb\nc\n")
    say("d\ne")
    assert capsys.readouterr() == ("a\\x1b[2J\tb\nc\n", "d\\ne\n")
    assert plain("\u202e") == "\\u202e"
