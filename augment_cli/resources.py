"""Files that come with the package: in it when it is installed from a wheel, beside it in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource(name: str, checkout: str | None = None) -> Path:
    """The path of a file or folder that comes with the package.

    Args:
        name: its path inside the installed package.
        checkout: its path in a checkout, if it differs.
    """
    inside = _PACKAGE / name
    return inside if inside.exists() else _PACKAGE.parent / (checkout or name)
