"""What the layers and models are to reach on a GPU, and results as Markdown."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_rows import Rows


@dataclass(frozen=True)
class Target:
    """A figure of one row, and the least or the most that it is to be."""

    name: str
    bound: float
    part: str
    key: str
    figure: Callable[[dict], float]
    at_most: bool = False

    def held(self, rows: Rows) -> dict[str, Any]:
        """The target beside the figure, None where it was not measured."""
        try:
            measured = self.figure(rows.part(self.part)[self.key])
        except KeyError:
            measured = None
        text = f"{'<=' if self.at_most else '>='} {self.bound:g}"
        held = None if measured is None else measured <= self.bound if self.at_most else measured >= self.bound
        return {"name": self.name, "target": text, "measured": measured, "held": held, "from": [self.part, self.key]}


def of(name: str, ratio: str) -> Callable[[dict], float]:
    """The median of a ratio of what is called so in a row."""
    return lambda row: row["by"][name][ratio]["median"]


def key_of(what: str, mode: str, amp: str | None, compiled: bool = False) -> str:
    """The key of a comparison."""
    return ", ".join(filter(None, [what, mode, amp or "float32", "compiled" * compiled]))


MODELS = key_of("224 px, batch 256", "training", "bfloat16", compiled=True)
TARGETS = (
    Target("AA-ResNet-50, speed of ResNet-50's", 0.92, "models", MODELS, of("AA-ResNet-50", "speed_against_source")),
    Target("AW-ResNet-50, speed of ResNet-50's", 0.85, "models", MODELS, of("AW-ResNet-50", "speed_against_source")),
    *(
        Target(
            f"AA at {size}x{size}, times timm's attention",
            bound,
            "layers",
            key_of(f"AA {size}", "training", "bfloat16"),
            of("triton", "times_timm"),
        )
        for size, bound in ((14, 3), (28, 8), (56, 15))
    ),
    Target(
        "AA, memory at 56x56 over 28x28 (4: linear, 16: squared)",
        6,
        "layers",
        "AA, memory",
        lambda row: row["by"]["triton"]["growth"],
        at_most=True,
    ),
    Target(
        "AA at 50x84, time of the convolution's layer",
        3,
        "detection",
        key_of("AA 50x84", "training", "bfloat16"),
        of("triton", "cost_of_conv"),
        at_most=True,
    ),
)
"""Training in bfloat16. Models are compiled, at a batch of 256 and 224 px; layers are not compiled."""


def targets(rows: Rows) -> list[dict[str, Any]]:
    return [target.held(rows) for target in TARGETS]


def markdown(rows: Rows) -> str:
    """All results, by their medians."""
    return "\n".join(_lines(rows)) + "\n"


def _lines(rows: Rows) -> Iterator[str]:
    about = rows.content.get("about", {})
    yield f"## {about.get('card', {}).get('name', 'results')}"
    yield ""
    for name, values in about.items():
        yield f"- {name}: {', '.join(f'{k} {v}' for k, v in values.items()) if isinstance(values, dict) else values}"
    for part, found in rows.content["rows"].items():
        yield from ["", f"### {part}", ""]
        yield from _tuned(list(found.values())) if part == "tune" else _part(found)
        if left_out := rows.left_out(part):
            yield from ["", f"Left out for want of time: {'; '.join(left_out[:40])}"]
    yield from ["", "| target | | measured | held |", "|---|--:|--:|---|"]
    for row in targets(rows):
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        yield f"| {row['name']} | {row['target']} | {measured} | {_HELD[row['held']]} |"
    if failures := rows.failures():
        yield from ["", "Failed:", ""]
        yield from (f"- {part}: {key}: {e['class']}: {_one_line(e['message'])}" for part, key, e in failures)


def _part(found: dict[str, dict]) -> Iterator[str]:
    """Figures of one part: a line each, and a line for each of those that were measured side by side."""
    for key, row in found.items():
        yield f"- {', '.join([key, *_figures(row)])}"
        yield from (f"  - {name}: {', '.join(_figures(figures))}" for name, figures in row.get("by", {}).items())


def _figures(row: dict) -> list[str]:
    texts = [f"{_WORDS.get(name, name)} {_value(value)}" for name, value in row.items() if name not in _HIDDEN]
    return [*texts, f"failed: {row['error']['class']}"] if "error" in row else texts


def _value(value: Any) -> str:
    value = value["median"] if isinstance(value, dict) and "median" in value else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tuned(rows: list[dict]) -> Iterator[str]:
    """The best configuration of each case beside the chosen one."""
    rows = [row for row in rows if "milliseconds" in row]
    yield from ["| kernel | chosen | ms | best | ms | tried |", "|---|---|--:|---|--:|--:|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = sorted((row for row in rows if row["case"] == case), key=lambda row: row["milliseconds"]["median"])
        chosen = next((row for row in of_case if row["chosen"]), None)
        cells = [
            f"{row['config']} | {row['milliseconds']['median']:.4g}" if row else " | " for row in (chosen, of_case[0])
        ]
        yield f"| {case} | {' | '.join(cells)} | {len(of_case)} |"


_HELD = {None: "", True: "yes", False: "no"}
_HIDDEN = ("by", "call", "commit", "error", "failures")
_WORDS = {
    "milliseconds": "ms",
    "peak_mib": "MiB",
    "times_timm": "x timm",
    "cost_of_conv": "conv x",
    "images_per_second": "images/s",
    "speed_against_source": "of the source's speed",
}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
