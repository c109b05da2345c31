"""The most important filters carried bit for bit; untrained attention takes the places of the others."""

import torch
from torch import Tensor, nn

from augment_cli.analysis.graph import ModelGraph
from augment_cli.compat import BatchNorm
from augment_cli.planning.plan import Plan, SitePlan
from augment_cli.surgery.records import Inheritance
from augment_cli.surgery.replace import apply_plan, find_conv, keep_highest


def importance(conv: nn.Conv2d, norm: nn.Module | None) -> Tensor:
    """How much each filter matters: the L2 norm of the filter with the batch normalisation that follows folded in.

    That is |gamma| / sqrt(running variance + eps) times the norm of the filter. Without a batch normalisation, or with
    one that is zero throughout, as at the start of a residual branch, it is the norm of the filter.

    Shape: (out_channels,).
    """
    size = conv.weight.detach().flatten(1).norm(dim=1)
    if isinstance(norm, BatchNorm) and norm.running_var is not None:
        gamma = 1.0 if norm.weight is None else norm.weight.detach().abs()
        folded = size * gamma * torch.rsqrt(norm.running_var + norm.eps)
        size = folded if folded.any() else size
    return size.cpu()


def carry(model: nn.Module, plan: Plan, graph: ModelGraph) -> tuple[Inheritance, ...]:
    """Apply a plan to a model with weights, in place: each augmented convolution gives up its least important filters.

    Among equals the last ones go.
    """
    norm_of = {site.name: site.norm for site in graph.sites}
    kept, records = {}, []
    for site in plan.sites:
        norm, conv = norm_of.get(site.name), find_conv(model, site)
        score = importance(conv, model.get_submodule(norm) if norm else None)
        kept[site.name] = keep_highest(score.tolist(), conv, site.out_channels - site.given_up)
        records.append(record(site, score, kept[site.name]))
    apply_plan(model, plan, lambda name, conv, count: kept[name])
    return tuple(records)


def record(site: SitePlan, score: Tensor, kept: list[int]) -> Inheritance:
    """A site's kept filters, and their share of the `score` (out_channels,) of all."""
    share = score[kept].sum() / score.sum().clamp_min(torch.finfo(score.dtype).tiny)
    return Inheritance(
        name=site.name,
        kind="exact" if not site.given_up else "carried" if kept else "new",
        kept=len(kept),
        given_up=site.given_up,
        share=round(min(float(share), 1.0), 6),
    )
