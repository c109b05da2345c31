"""The origin of a plan's recipe: built-in, built-in with changes, or the user's own."""

from dataclasses import dataclass

from augment_cli.planning.plan import Plan
from augment_cli.planning.recipe import Paper, builtin_recipes, load_recipe
from augment_cli.reporting.units import share
from augment_cli.surgery.records import Fidelity

TRUST_TERMS = (
    "paper: read in the paper itself; arith: not read there, but our arithmetic reproduces published numbers with it; "
    "notes: from secondary notes; ours: our reading, where the paper's text could not be had"
)


@dataclass(frozen=True, slots=True)
class RecipeOrigin:
    """A recipe's name and hash, how it differs from the built-in recipe of that name, and the paper of that one."""

    name: str
    sha256: str
    status: str  # built-in, built-in with another budget, built-in with changes, not built-in
    description: str = ""
    paper: Paper | None = None

    @classmethod
    def of(cls, plan: Plan) -> "RecipeOrigin":
        """Compare a plan's recipe, by hash, with the built-in one of its name."""
        if plan.recipe not in builtin_recipes():
            return cls(plan.recipe, plan.recipe_sha256, "not built-in")
        builtin = load_recipe(plan.recipe)
        with_budget = builtin.model_copy(update={"budget": plan.budget})
        if builtin.digest() == plan.recipe_sha256:
            status = "built-in"
        elif with_budget.digest() == plan.recipe_sha256:
            status = "built-in with another budget"
        else:
            status = "built-in with changes"
        return cls(plan.recipe, plan.recipe_sha256, status, builtin.description, builtin.paper)

    @property
    def departure(self) -> str:
        """The difference from the built-in recipe as the end of a sentence; empty where there is none."""
        end = self.status.removeprefix("built-in").strip()
        return f", {end}" if end else ""

    @property
    def sentence(self) -> str:
        """The built-in recipe's description, and how this recipe differs from it."""
        return f"{self.description[:1].upper()}{self.description[1:]}{self.departure}."


def fidelity(found: Fidelity) -> str:
    """A sentence on how far a converted model agrees with its source."""
    return (
        f"As converted, {share(found.agreement)} of {found.images:,} held-out calibration images get the source's "
        f"first class; KL of the probabilities is {found.divergence:.4f} nats ({found.fitted_on:,} images fitted)."
    )
