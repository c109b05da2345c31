"""Analyses of timm's models in the user's cache folder: a model seen before is planned without importing torch.

A file is named by what it answers: the versions, this folder's code, a model's name, arguments and image size. It is
held against bounds as any file from outside, and one that is damaged in any way is as good as none.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from augment_cli.analysis.arguments import freeze_arguments
from augment_cli.analysis.facts import Analysis, Source
from augment_cli.errors import AugmentError, boundary
from augment_cli.files import read_text, write_file

VARIABLE = "AUGMENT_CACHE"
"""The environment variable that names the folder; `off` does without."""

# The analysis of the timm model of most convolutions takes 400 kB.
_LARGEST_FILE = 8 * 2**20
_MOST_FILES = 500


@dataclass(frozen=True)
class _Found:
    source: Source
    analysis: Analysis


def look(
    name: str, args: dict[str, Any] | None = None, image_size: tuple[int, int] | None = None, cached: bool = True
) -> tuple[Source, Analysis]:
    """A model's source and analysis: out of the cache, or found anew and kept there.

    Args:
        name, args, image_size: as for `source.describe`. Only timm's own models are cached, not those that others have
            registered.
        cached: False neither reads nor writes the cache.

    Raises:
        AugmentError: as `source.describe` and `graph.analyze`.
    """
    file = _file(name, args or {}, image_size) if cached and ":" not in name else None
    found = _read(file) if file and _is_timms(name) else None
    if found is None:
        found = _find(name, args, image_size)
        if file and found.source.base == "timm" and _is_timms(name):
            keep(file, json.dumps(asdict(found)))
    with boundary(f"the arguments of {name}"):
        frozen = dict(freeze_arguments(found.source.args))  # lists as tuples, from a file or not
    return replace(found.source, args=frozen), found.analysis


def folder() -> Path | None:
    """The cache's folder, which may not exist yet; None where the user does without."""
    given = os.environ.get(VARIABLE)
    if given:
        return None if given == "off" else Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "augment-cli"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "augment-cli" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "augment-cli"


def _is_timms(name: str) -> bool:
    """Whether a name is of timm's own code. As long as timm is not imported, nobody can have registered another."""
    if "timm" not in sys.modules:
        return True
    from timm.models import is_model, model_entrypoint

    architecture = name.partition(".")[0]
    return is_model(architecture) and model_entrypoint(architecture).__module__.startswith("timm.")


def _find(name: str, args: dict[str, Any] | None, image_size: tuple[int, int] | None) -> _Found:
    from augment_cli.analysis import source
    from augment_cli.analysis.graph import analyze

    described, model = source.describe(name, args, image_size)
    graph = analyze(model, described.input_size)
    return _Found(described, Analysis(graph.input_size, graph.sites, graph.params, graph.macs))


def _file(name: str, args: dict[str, Any], image_size: tuple[int, int] | None) -> Path | None:
    """Where the answer to a question is kept; None where there is no such place."""
    with suppress(RuntimeError, TypeError, ValueError):  # no home folder; arguments that are no JSON
        question = json.dumps([name, args, image_size, _versions()], sort_keys=True, allow_nan=False)
        at = folder()
        return at / "analyses" / f"{hashlib.sha256(question.encode()).hexdigest()}.json" if at else None
    return None


@cache
def _versions() -> list[str]:
    """The packages that analyse, and a digest of this folder's code."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return [*(version(package) for package in ("augment-cli", "timm", "torch")), code.hexdigest()]


def _read(file: Path) -> _Found | None:
    """The answer in a file; None where there is none, or it is not whole and valid."""
    text = kept(file)
    if text is None:
        return None
    try:
        found = TypeAdapter(_Found).validate_json(text)
        _check(found)
    except (AugmentError, ValueError, RecursionError):
        return None
    return found


def kept(file: Path) -> str | None:
    """The text that `keep` wrote there; None where there is none, or it is not whole."""
    try:
        if not file.is_file():
            return None
        digest, _, text = read_text(file, "cache", _LARGEST_FILE).partition("\n")
    except (AugmentError, OSError):
        return None
    return text if digest == _digest(text) else None


def _check(found: _Found) -> None:
    """Refuse what no analysis of a timm model says.

    Raises:
        ValueError: names what is wrong.
    """
    freeze_arguments(found.source.args)
    sites = found.analysis.sites
    if found.source.base != "timm" or ":" in found.source.name:
        raise ValueError("not a model of timm's registry")
    if found.source.input_size != found.analysis.input_size or len({site.name for site in sites}) < len(sites):
        raise ValueError("two answers in one")
    if any(site.in_channels % site.groups or site.out_channels % site.groups for site in sites):
        raise ValueError("groups that do not divide the channels")


def keep(file: Path, text: str) -> None:
    """Keep a text in a file, and in its folder only the newest few hundred. A folder that refuses is no error."""
    with suppress(AugmentError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, lambda temporary: temporary.write_text(f"{_digest(text)}\n{text}", encoding="utf-8"))
        files = sorted(file.parent.glob("*.json"), key=lambda other: other.stat().st_mtime)
        for old in files[:-_MOST_FILES]:
            old.unlink(missing_ok=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
