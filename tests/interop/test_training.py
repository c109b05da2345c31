"""Converted models in training: initialisers, parameter groups, checkpointing, averages, processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

from augment_cli.layers import AAConv2d, AWConv2d
from tests.interop.models import RECIPES, assert_gradients_near, converted, gradients, images, replaced


@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18", "hrnet_w18_small", "nest_tiny"])
@pytest.mark.parametrize("recipe", ["aw", "aa-aw"])
def test_initialisers_of_timm_leave_attention_at_its_start(name, recipe):
    model = converted(name, recipe)
    for module in model.modules():
        if isinstance(module, AWConv2d):
            module.reset_attention_parameters()
    kernels = {name: site.weight.detach().clone() for name, site in replaced(model).items()}
    model.init_weights()
    for name, site in replaced(model).items():
        assert not torch.equal(site.weight, kernels[name])
        if isinstance(site, AAConv2d):
            for table in (site.rel_height, site.rel_width):
                assert 0.5 < table.std() * table.shape[1] ** 0.5 < 2
    assert not any(m.expand.weight.any() for m in model.modules() if isinstance(m, AWConv2d))


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "densenet121", "test_nfnet", "test_mambaout"])
@pytest.mark.parametrize("recipe", ["aw", "aa-aw"])
def test_layer_decay_takes_a_site_for_what_its_source_was(name, recipe):
    source, model = timm.create_model(name), converted(name, recipe)
    rates, own_rates = _rates(source), _rates(model)
    for site in replaced(model):
        found = {rate for key, rate in own_rates.items() if key.startswith(f"{site}.")}
        assert found == {rates[f"{site}.weight"]}
    assert all(own_rates[key] == rates[key] for key in rates.keys() & own_rates)


def _rates(model: nn.Module) -> dict[str, float]:
    groups = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.7).param_groups
    rate_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {name: rate_of[id(p)] for name, p in model.named_parameters()}


def test_weight_decay_is_for_what_multiplies_and_can_be_kept_from_the_tables():
    model = converted("test_resnet", "aa-aw")
    name_of = {id(p): name for name, p in model.named_parameters()}

    def undecayed(*keep: str) -> set[str]:
        groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=keep)
        return {name_of[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}

    tables = {name for name in name_of.values() if name.endswith(("rel_height", "rel_width"))}
    assert tables
    assert undecayed("*.rel_*") == undecayed() | tables
    assert not undecayed() & tables
    assert "channel_order" not in " ".join(name_of.values())


@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_efficientnet"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpointing_gives_the_same_gradients(name, recipe):
    model, x = converted(name, recipe), images(2, 3, 64, 64)
    expected = gradients(model, x)
    model.set_grad_checkpointing(True)
    assert_gradients_near(gradients(model, x), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_average_of_weights_follows(recipe):
    model = converted("test_resnet", recipe)
    average = ModelEmaV3(model, decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    average.update(model)
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, before[name] * 1.05)
    assert average(images(1, 3, 64, 64)).isfinite().all()


PROCESS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.interop.models import converted, images

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for recipe in ("aa", "aw", "aa-aw"):
    torch.manual_seed(0)
    model = converted("test_resnet", recipe)
    model = DistributedDataParallel(model)
    for _ in range(2):  # the second finds what the first left unfinished
        model.zero_grad()
        model(images(4, 3, 64, 64)[2 * rank : 2 * rank + 2]).square().mean().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.module.named_parameters()}, f"{folder}/{recipe}.pt")
dist.barrier()  # neither leaves while the other still talks to it
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    command = [sys.executable, "-c", PROCESS]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    for recipe in RECIPES:
        torch.manual_seed(0)
        model = converted("test_resnet", recipe)
        model(images(4, 3, 64, 64)).square().mean().backward()
        joined = torch.load(tmp_path / f"{recipe}.pt")
        assert_gradients_near(joined, {name: p.grad for name, p in model.named_parameters()})
