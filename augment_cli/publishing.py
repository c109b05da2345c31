"""A converted folder, sent to the Hugging Face hub as it is: timm and this package load it from there by its name.

Only files that augment wrote are sent. Imports no torch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from augment_cli import hub
from augment_cli.checkpoint.metadata import WEIGHTS, read_metadata
from augment_cli.errors import FileError, InputError, boundary
from augment_cli.files import read_text
from augment_cli.planning.plan import Plan
from augment_cli.planning.reading import validate_plan
from augment_cli.reporting.output import FOLDER_FILES

_LARGEST_CONFIG = 2**25


@dataclass(frozen=True)
class Parcel:
    """A checked folder and where it goes.

    name: OWNER/NAME, or NAME for the token's owner. files: names of the files that are sent. size: bytes of them all.
    others: files of the folder that stay here.
    """

    folder: Path
    name: str
    files: tuple[str, ...]
    size: int
    others: tuple[str, ...]


def pack(folder: Path, name: str) -> Parcel:
    """Check what can be checked without the hub: the folder, the name, and that there is a token.

    Raises:
        AugmentError: not a converted model's folder, one that timm would refuse, a name that cannot be, or no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.utils import validate_repo_id

    if folder.is_file():
        raise FileError(f"{folder} is a file: the hub takes a folder, which has a model card. Convert or save to one")
    if not folder.is_dir():
        raise FileError(f"{folder}: no such folder")
    _check_config(folder, read_metadata(folder).plan)
    name = name.removeprefix(hub.PREFIX)
    with hub.reaching(name):
        validate_repo_id(name)
    if get_token() is None:
        raise InputError("no token for the hub: `hf auth login` stores one that may write, or set HF_TOKEN")
    found = {file.name: file for file in sorted(folder.iterdir())}
    files = tuple(file for file in found if file in FOLDER_FILES)
    size = sum(found[file].stat().st_size for file in files)
    return Parcel(folder, name, files, size, tuple(file for file in found if file not in files))


def _check_config(folder: Path, plan: Plan) -> None:
    """Refuse a folder out of which timm could not make the model."""
    if plan.base != "timm":
        return
    path = folder / "config.json"
    if not path.is_file():
        raise FileError(f"{folder} has no config.json, from which timm makes the model: convert or save to a folder")
    with boundary(f"{path} is not one that augment wrote"):
        own = json.loads(read_text(path, "config", _LARGEST_CONFIG))["model_args"]["plan"]
    if validate_plan(own, str(path)) != plan:
        raise FileError(f"{folder}: config.json and {WEIGHTS} hold two plans: one was changed or replaced")


def send(parcel: Parcel, *, public: bool = False, overwrite: bool = False) -> str:
    """Create the repository and commit the folder's files to it, all at once. Returns its address.

    Args:
        public: let everyone see it; a repository that exists keeps its visibility.
        overwrite: commit to a repository that exists; what an earlier push left there and this one lacks is removed.

    Raises:
        AugmentError: the repository exists, the token may not write there, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="augment-cli")
    with hub.reaching(parcel.name):
        address = api.create_repo(parcel.name, private=not public, exist_ok=overwrite)
    try:
        with hub.reaching(address.repo_id):
            api.upload_folder(
                repo_id=address.repo_id,
                folder_path=parcel.folder,
                allow_patterns=list(parcel.files),
                delete_patterns=list(FOLDER_FILES) if overwrite else None,
                commit_message="Upload a converted model",
            )
    except InputError as error:
        raise InputError(f"{error}. The repository is there: push again with `overwrite=True`") from error
    return str(address)
