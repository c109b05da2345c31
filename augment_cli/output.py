"""What a conversion leaves on disk: the file alone, or a folder for timm with its reports and a model card."""

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


def _fill(folder: Path, model: nn.Module, header: Header) -> None:
    from timm.models._hub import save_config_for_hf

    report = Report.of(header.plan, header)
    save_weights(model, header, folder / WEIGHTS)
    save_config_for_hf(model, str(folder / "config.json"), data_config={"input_size": header.plan.input_size})
    (folder / "plan.json").write_text(header.plan.to_json() + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    for form in ("json", "html"):
        (folder / f"report.{form}").write_text(FORMATS[form](report), encoding="utf-8")
