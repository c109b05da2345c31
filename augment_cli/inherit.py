"""The source convolution's weights into its replacement, with a number for what was carried over.

AW: everything is carried, and `expand` is zero: exactly the source's function. AA: the most important filters are
carried bit for bit, and attention takes the places of the others.
"""

import torch
from torch import Tensor, nn

from augment_cli.graph import ModelGraph
from augment_cli.header import Inheritance
from augment_cli.plan import Plan, SitePlan
from augment_cli.surgery import apply_plan, find_conv


def importance(conv: nn.Conv2d, norm: nn.Module | None) -> Tensor:
    """How much each filter matters: the L2 norm of the filter with the batch normalisation that follows folded in.

    That is |gamma| / sqrt(running variance + eps) times the norm of the filter. Without a batch normalisation, or with
    one that is zero throughout, as at the start of a residual branch, it is the norm of the filter.

    Shape: (out_channels,).
    """
    size = conv.weight.detach().flatten(1).norm(dim=1)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
        gamma = 1.0 if norm.weight is None else norm.weight.detach().abs()
        folded = size * gamma * torch.rsqrt(norm.running_var + norm.eps)
        size = folded if folded.any() else size
    return size.cpu()


def carry(model: nn.Module, plan: Plan, graph: ModelGraph) -> tuple[Inheritance, ...]:
    """Apply a plan to a model with weights, in place: each augmented convolution gives up its least important filters.

    Among equals the last ones go.
    """
    norm_of = {site.name: site.norm for site in graph.sites}
    scores = {}
    for site in plan.sites:
        norm = norm_of.get(site.name)
        scores[site.name] = importance(find_conv(model, site), model.get_submodule(norm) if norm else None)

    def keep_most_important(name: str, conv: nn.Conv2d, count: int) -> list[int]:
        return scores[name].argsort(descending=True, stable=True)[:count].sort().values.tolist()

    records = tuple(_record(site, scores[site.name]) for site in plan.sites)
    apply_plan(model, plan, keep_most_important)
    return records


def _record(site: SitePlan, score: Tensor) -> Inheritance:
    kept = site.out_channels - site.value_channels
    best = score.sort(descending=True).values[:kept].sum() / score.sum().clamp_min(torch.finfo(score.dtype).tiny)
    kind = "exact" if not site.value_channels else "carried" if kept else "new"
    return Inheritance(name=site.name, kind=kind, kept=kept, given_up=site.value_channels, share=round(float(best), 6))
