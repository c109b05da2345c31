"""What a conversion leaves on disk: the file alone, or a folder for timm with its reports and a model card."""

import json
from pathlib import Path

from torch import nn

from augment_cli.checkpoint import save_weights
from augment_cli.files import write_file, write_folder
from augment_cli.header import WEIGHTS, Header
from augment_cli.report import FORMATS, Report
from augment_cli.report.card import model_card


def write_model(model: nn.Module, header: Header, target: Path) -> None:
    """Write a converted model whole: to a file where the name ends in .safetensors, else to a folder.

    Raises:
        AugmentError: the disk is full or refuses.
    """
    if target.suffix == ".safetensors" and not target.is_dir():
        write_file(target, lambda temporary: save_weights(model, header, temporary))
    else:
        write_folder(target, lambda temporary: _fill(temporary, model, header))


def write_config(model: nn.Module, input_size: tuple[int, int, int], folder: Path) -> None:
    """Write timm's config.json, from which timm and transformers create the model again."""
    from timm.models._hub import save_config_for_hf

    path = folder / "config.json"
    save_config_for_hf(model, str(path), data_config={"input_size": input_size})
    config = json.loads(path.read_text(encoding="utf-8"))
    # It is beside model_args already; transformers gives timm both, and Python refuses an argument given twice.
    config["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _fill(folder: Path, model: nn.Module, header: Header) -> None:
    report = Report.of(header.plan, header)
    save_weights(model, header, folder / WEIGHTS)
    write_config(model, header.plan.input_size, folder)
    (folder / "plan.json").write_text(header.plan.to_json() + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    for form in ("json", "html"):
        (folder / f"report.{form}").write_text(FORMATS[form](report), encoding="utf-8")
