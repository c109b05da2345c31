"""The Hugging Face hub: a model's name there, its files, and what went wrong in one line.

huggingface_hub, which timm needs too, is imported only where the hub is asked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from augment_cli.errors import AugmentError, FileError, InputError, first_line

PREFIX = "hf-hub:"
"""The beginning of a name by which timm and this package take a model from the hub: hf-hub:OWNER/NAME[@REVISION]."""


def is_hub_name(text: str | Path) -> bool:
    return str(text).startswith(PREFIX)


def fetch(name: str | Path, file: str, cache_dir: str | Path | None = None) -> Path:
    """A file of a model on the hub, downloaded to the hub's own cache folder unless it is there.

    Args:
        name: hf-hub:OWNER/NAME, with or without @REVISION.
        file: its name in the repository.
        cache_dir: another folder than the hub's own.

    Raises:
        AugmentError: no such model or file, no right to read it, or no connection.
    """
    from huggingface_hub import hf_hub_download

    model, _, revision = str(name).removeprefix(PREFIX).partition("@")
    with reaching(model):
        return Path(hf_hub_download(model, file, revision=revision or None, cache_dir=cache_dir))


@contextmanager
def reaching(model: str) -> Iterator[None]:
    """Turn whatever the hub's own library raises within into one error that names the model and the way out."""
    try:
        yield
    except AugmentError:
        raise
    except Exception as error:  # of its own, of its HTTP library and of the operating system
        raise _explained(model, error) from error


def _explained(model: str, error: Exception) -> AugmentError:
    from huggingface_hub import constants, errors

    where = f"{model} on {constants.ENDPOINT}"
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{model!r} cannot be a model's name on the hub: write it as OWNER/NAME")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{where}: it has no such revision")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return FileError(f"{where}: it does not hold {Path(error.response.url.path).name}: not a converted model")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{where}: no such model, or a private one that your token (`hf auth login`) may not read")
    if isinstance(error, errors.HfHubHTTPError):
        return InputError(f"{where}: {_of_status(error.response.status_code, first_line(error))}")
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return InputError(f"{where} is not asked, since HF_HUB_OFFLINE is set: unset it")
    if isinstance(error, ValueError):  # such as a model card whose front matter the hub refuses
        return InputError(f"{where}: {' '.join(str(error).split())}")
    if isinstance(error, OSError) and error.errno:  # such as a full disk
        return FileError(f"{where}: {error.strerror}: {error.filename}")
    return InputError(f"{where} cannot be reached: {first_line(error)}. Look at the connection, and at HF_ENDPOINT")


def _of_status(status: int, line: str) -> str:
    """What the status of an answer says to the user."""
    known = {
        401: "the token is not valid: `hf auth login` stores another, or set HF_TOKEN",
        403: "the token may not write there: it needs the right to, and OWNER is you or an organization of yours",
        409: "it exists already; `overwrite=True` commits to it",
    }
    return known.get(status, line)
