import math

import pytest

from augment_cli.checkpoint.metadata import Metadata
from augment_cli.operators.aa import AASplit
from augment_cli.operators.aw import AWSplit
from augment_cli.planning.plan import Plan, SitePlan, Skipped
from augment_cli.planning.recipe import Budget, load_recipe
from augment_cli.reporting import Report
from augment_cli.surgery.records import Inheritance

HOSTILE = "<script>alert(1)</script>|`[red]x[/red]`\x1b[31m"


def site(name: str, **changed) -> SitePlan:
    """A 3x3 convolution of 128 channels, attention-augmented."""
    split = {"heads": 8, "key_channels": 160, "value_channels": 8, "attention_pool": 2}
    split |= {key: changed.pop(key) for key in split if key in changed}
    shape = {"in_channels": 128, "out_channels": 128, "kernel_size": (3, 3), "stride": (1, 1), "resolution": (28, 28)}
    shape |= changed
    weights = 9 * shape["in_channels"] * shape["out_channels"]
    counts = {"params_before": weights, "macs_before": weights * math.prod(shape["resolution"])}
    return SitePlan(**{"name": name, "operator": "aa", "split": AASplit(**split)} | counts | shape)


def attended(name: str, **changed) -> SitePlan:
    """The same under AW alone."""
    return site(name, **{"operator": "aw", "split": AWSplit(16)} | changed)


def plan(*sites: SitePlan, skipped: tuple[tuple[str, str], ...] = (), **changed) -> Plan:
    """A plan whose model has 50,000 parameters and 3,000,000,000 multiply-adds besides its sites."""
    totals = {
        f"{count}_before": rest + sum(getattr(entry, f"{count}_before") for entry in sites)
        for count, rest in (("params", 50_000), ("macs", 3_000_000_000))
    }
    recipe = load_recipe("aa")
    values = {"model": "resnet50.a1_in1k", "input_size": (3, 224, 224), "recipe": "aa"} | totals
    values |= {"recipe_sha256": recipe.digest(), "budget": recipe.budget, "sites": sites}
    values["skipped"] = [Skipped(name=name, reason=reason) for name, reason in skipped]
    return Plan(**values | changed)


def metadata(made: Plan, weights: str = "pretrained") -> Metadata:
    kinds = {True: "carried", False: "exact"}
    records = tuple(
        Inheritance(
            name=entry.name,
            kind=kinds[entry.given_up > 0],
            kept=entry.out_channels - entry.given_up,
            given_up=entry.given_up,
            share=0.9 if entry.given_up else 1,
        )
        for entry in made.sites
    )
    versions = {"python": "3.11.0", "torch": "2.9.0"}
    return Metadata(plan=made, weights=weights, source_sha256="ab" * 32, inheritance=records, versions=versions)


@pytest.fixture
def small() -> Plan:
    """Two stages, one site that is unlike the others, three reasons to be skipped."""
    return plan(
        *(site(f"layer3.{i}.conv2") for i in range(6)),
        site("layer4.0.conv2", stride=(2, 2), resolution=(14, 14), attention_pool=1, key_channels=80),
        skipped=(
            ("conv1", "stem: reads the image"),
            *((f"layer3.{i}.conv1", "1x1 kernel, the recipe takes 3x3") for i in range(6)),
            ("layer1.0.conv2", "map too large: 112x112"),
        ),
    )


@pytest.fixture
def report(small: Plan) -> Report:
    return Report.of(small, metadata(small))


@pytest.fixture
def hostile() -> Report:
    made = plan(
        site(f"{HOSTILE}.0"),
        site(f"{HOSTILE}.1"),
        skipped=((f"skip.{HOSTILE}", HOSTILE),),
        model=HOSTILE,
        recipe=HOSTILE,
        model_args={HOSTILE: HOSTILE},
        budget=Budget(params="keep", macs="-10%"),
    )
    made_metadata = metadata(made, weights=HOSTILE)
    return Report.of(made, made_metadata.model_copy(update={"versions": {HOSTILE: HOSTILE}}))


@pytest.fixture
def many() -> Report:
    """As many sites as hrnet_w18 has, no two alike."""
    splits = [{"key_channels": 8 * (i % 30 + 1), "value_channels": 8 * (i // 30 + 1)} for i in range(270)]
    made = plan(*(site(f"stage{i % 4}.{i // 40}.block.{i}.conv", **split) for i, split in enumerate(splits)))
    return Report.of(made, metadata(made))
