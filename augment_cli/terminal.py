"""Print on stdout and stderr, with control characters of text from outside shown as escapes.

A name out of a file can hold terminal sequences, rich markup, line ends and letters that reverse the direction of
writing. Everything that the program prints passes through `echo`, `say` or a `Terminal` (console.py).
"""

import re
import shlex
import sys

# A setting in an error of the library: `name`, `name=value` or, of a recipe, `table.key=value`, all in backticks.
_SETTING = re.compile(r"((?:the )?argument )?`([a-z]\w*(?:\.\w+)*)(?:=([^`]*))?`")

# Settings whose option has another name: the option takes one of several, or the API means more by it.
_OPTIONS = {"model_args": "model-arg", "input_size": "img-size"}


def plain(text: str, keep: str = "") -> str:
    """Text with control characters as escapes, except those in `keep`.

    >>> plain("conv\\x1b[2J")
    'conv\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def respell(message: str) -> str:
    """A message of the library, its settings in backticks turned from Python's spelling into the command line's.

    >>> respell("o exists; `overwrite=True` replaces it")
    'o exists; --overwrite replaces it'
    >>> respell("give `val_data`, or `hold_out=0.1`, or `augmentation=False`, or `precision='bf16'`")
    'give --val-data, or --hold-out 0.1, or --no-augmentation, or --precision bf16'

    A model's arguments and a recipe's values are written as --model-arg and --set take them. Other text in backticks
    stays.

    >>> respell("the argument `num_classes=0` makes a model without one")
    '--model-arg num_classes=0 makes a model without one'
    >>> respell("try `budget.params=free`; `make sweep` makes it; use `augment_cli.load`")
    'try --set budget.params=free; `make sweep` makes it; use `augment_cli.load`'
    """
    return _SETTING.sub(_option, message)


def _option(setting: re.Match[str]) -> str:
    argument, name, value = setting.groups()
    if argument or "." in name:
        option = "--model-arg" if argument else "--set"
        return setting[0] if value is None else f"{option} {name}={value}"
    option = _OPTIONS.get(name, name).replace("_", "-")
    if value in (None, "True"):
        return f"--{option}"
    return f"--no-{option}" if value == "False" else f"--{option} {_word(value)}"


def _word(value: str) -> str:
    """A value as a word of the shell: a string without Python's quotes, unless the shell needs some."""
    inner = value[1:-1] if value[:1] in ("'", '"') and value[:1] == value[-1:] else value
    return shlex.quote(inner)


def echo(text: str) -> None:
    """Print data of several lines on stdout, with one line end after it."""
    sys.stdout.write(plain(text, keep="\n\t").removesuffix("\n") + "\n")
    sys.stdout.flush()


def say(message: str) -> None:
    """Print a message of one line on stderr."""
    print(plain(message), file=sys.stderr, flush=True)
