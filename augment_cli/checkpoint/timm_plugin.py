"""The entry point through which timm itself builds a converted model: the architecture `augmented`.

Importing this module registers it, so that timm.create_model("local-dir:DIR"), "hf-hub:..." and timm's own scripts
(`--device-modules augment_cli.checkpoint.timm_plugin`) load a converted model. `import augment_cli` does so as soon as
timm is there. Nothing else of ours is imported before the first converted model is built.
"""

from typing import Any

from timm.models import register_model
from torch import nn


@register_model
def augmented(pretrained: bool = False, plan: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """A converted model.

    Args:
        plan: the plan's JSON object; timm takes it from `model_args` in config.json.
        kwargs: as for any timm model; `features_only` among them.
    """
    from augment_cli.checkpoint.rebuild import create

    return create(pretrained, plan, **kwargs)
