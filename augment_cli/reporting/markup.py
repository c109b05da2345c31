"""HTML and SVG from Python: every string is escaped unless it is a Markup."""

from collections.abc import Iterable
from html import escape
from typing import Any

from augment_cli.terminal import plain

DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"

_VOID = ("meta", "br", "img", "input")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. In attributes' names a trailing underscore is dropped and other underscores become hyphens.

    >>> tag("p", "a < b", tag("b", "!"), class_="x", aria_label=None)
    '<p class="x">a &lt; b<b>!</b></p>'
    """
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    start = name + "".join(f' {key}="{escape(plain(str(value)))}"' for key, value in given)
    return Markup(f"<{start}>" if name in _VOID else f"<{start}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Markup:
    """Join children. None adds nothing; an iterable adds its items."""
    return Markup("".join(map(_text, children)))


def _text(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, (str, int)):
        return escape(plain(str(child)), quote=False)
    return join(child)


def minus(number: str) -> str:
    """A printed number's hyphen as a minus sign."""
    return number.replace("-", "\N{MINUS SIGN}")
