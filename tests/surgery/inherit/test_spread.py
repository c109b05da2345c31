import pytest
import torch
from torch import nn

from augment_cli.layers import AAConv2d
from augment_cli.surgery.inherit.spread import deviations, spread, whitening


def layer_of(heads: int = 4) -> tuple[nn.Module, AAConv2d]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()).eval()
    model.append(nn.Conv2d(16, 32, 3, padding=1))
    layer = AAConv2d(16, 32, 3, padding=1, heads=heads, key_channels=32, value_channels=8, resolution=12)
    return model, layer.eval()


def test_logits_of_content_and_of_position_have_the_deviations_asked_for():
    model, layer = layer_of()
    images = torch.randn(8, 3, 12, 12)
    spread(model, {"2": layer}, images, content=3.0, position=0.5)
    content, position = (found.detach() for found in deviations(layer, model[:2](images)))
    torch.testing.assert_close(content, torch.full((4,), 3.0), atol=1e-3, rtol=0)
    assert float(position.mean()) == pytest.approx(0.5, abs=1e-3)


def test_queries_and_keys_are_of_one_size():
    model, layer = layer_of()
    spread(model, {"2": layer}, torch.randn(8, 3, 12, 12))
    queries, keys = (part.flatten(1) for part in layer.qkv.weight.detach()[:64].unflatten(0, (2, 4, -1)))
    torch.testing.assert_close(keys.norm(dim=1), queries.norm(dim=1), rtol=0.2, atol=0)


def test_whitening_takes_out_the_mean_and_evens_out_variances():
    sizes = torch.tensor([20.0, 5, 2, 2, 1, 1]).view(-1, 1, 1)
    seen = torch.randn(50, 6, 4, 4) * sizes + sizes
    found = torch.einsum("nchw,dc->ndhw", seen, whitening(seen))
    assert found.mean((0, 2, 3)).abs().max() < 1e-3 * found.std()
    before, after = (torch.linalg.eigvalsh(x.movedim(1, -1).flatten(0, 2).T.cov()) for x in (seen, found))
    assert after[-1] / after[1] < 0.1 * before[-1] / before[1]


def test_keys_that_are_not_like_queries_attend_to_rare_contents():
    """One position differs from all others: a query that is not average looks at it or away from it."""
    model, layer = layer_of(heads=1)
    images = 0.1 * torch.randn(32, 3, 12, 12) + 1
    images[:, :, 5, 5] += torch.tensor([3.0, -2.0, 1.0])
    own = layer.qkv.weight.detach().clone()
    share = []
    for spreading in (False, True):
        with torch.no_grad():
            layer.qkv.weight.copy_(own)
        if spreading:
            spread(model, {"2": layer}, images, similarity=0)
        query, key, _ = layer.qkv(model[:2](images)).flatten(2).split([32, 32, 8], dim=1)
        logits = (query.transpose(1, 2) @ key).detach() * 32**-0.5
        distance = (logits - logits.mean(2, keepdim=True)).square().mean((0, 1))
        near = torch.zeros(12, 12, dtype=torch.bool)
        near[4:7, 4:7] = True
        share.append(float(distance[near.flatten()].sum() / distance.sum()))
    assert share[1] > 0.5


def test_a_constant_input_leaves_finite_weights():
    model, layer = layer_of()
    nn.init.zeros_(model[0].weight)
    spread(model, {"2": layer}, torch.randn(2, 3, 12, 12))
    assert all(p.isfinite().all() for p in layer.parameters())


def test_positions_attend_to_positions_of_their_own_content():
    """Four contents at random positions: logits towards a query's own content are higher, other keys stay in reach."""
    model, layer = layer_of()
    contents = torch.randn(4, 3)
    which = torch.randint(4, (16, 12, 12))
    images = contents[which].movedim(-1, 1) + 0.05 * torch.randn(16, 3, 12, 12)
    model[0] = nn.Conv2d(3, 16, 1)
    spread(model, {"2": layer}, images)
    query, key, _ = layer.qkv(model[:2](images)).detach().flatten(2).split([32, 32, 8], dim=1)
    query, key = (part.unflatten(1, (4, 8)) for part in (query, key))
    logits = torch.einsum("nhdq,nhdk->nhqk", query, key) * 8**-0.5
    alike = (which.flatten(1).unsqueeze(2) == which.flatten(1).unsqueeze(1)).unsqueeze(1).expand_as(logits)
    assert logits[alike].mean() - logits[~alike].mean() > 3
    assert (logits.softmax(-1) * ~alike).sum(-1).mean() > 0.02
