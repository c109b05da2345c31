"""Write docs/story.md and its pictures from the results of benchmarks/retrofit.py, and from two of the models it left.

    python docs/story.py               # the second half of `make story`

docs/story.json holds all numbers of the page: the results that it shows, and how much of its weight one attention head
moves between a cue and what the cue asks for. That is measured where out/retrofit/ holds the models, else kept.
"""

import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from augment_cli.files import write_file
from augment_cli.reporting.style import QUIET, SERIES, picture

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results" / "retrofit.json"
MODELS = ROOT / "out" / "retrofit"
SETUP = "test_resnet-6"
TASKS = ("recall", "odd", "digits")
ROWS = ("source", "SE", "AW", "AA, uniform", "AA, carried", "AA, fitted", "AA+AW, carried", "AA+AW, fitted")
SCENES, SHOWN = 200, 5


# --- numbers ---


def tell() -> dict[str, Any]:
    """All numbers of the page."""
    results = json.loads(RESULTS.read_text())
    chains = [c for c in results["chains"] if c["setup"] == SETUP and c["task"] in TASKS and c["row"] in ROWS]
    return {
        "versions": {name: version(name) for name in ("augment-cli", "timm", "torch")},
        "sources": {task: results["sources"][f"{task} test_resnet"] for task in TASKS},
        "chains": chains,
    }


def chains_of(story: dict[str, Any], task: str) -> dict[str, list[dict[str, Any]]]:
    """A task's chains by row, in the order of ROWS, one a seed."""
    found = {row: [c for c in story["chains"] if (c["task"], c["row"]) == (task, row)] for row in ROWS}
    return {row: chains for row, chains in found.items() if chains}


# --- attention maps ---


@dataclass(frozen=True)
class Look:
    """Percent of a head's weight, from the centre of one thing on another, before and after fine-tuning."""

    site: str
    head: int
    query: str
    before: float
    after: float
    even: float


def weights_of(model: Any, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Attention weights of every site. Shapes: pictures (n, side, side, 3) to (n, heads, h, w, h, w) each."""
    import torch

    from augment_cli.layers import AAConv2d
    from augment_cli.layers.aa.relative import relative_logits

    inputs = {}

    def keep(name: str) -> Any:
        return lambda layer, args: inputs.__setitem__(name, args[0])

    layers = {name: module for name, module in model.named_modules() if isinstance(module, AAConv2d)}
    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    x = ((torch.from_numpy(pictures).float() / 255 - mean) / std).movedim(-1, 1)
    with torch.no_grad():
        model.eval()(x)
        found = {}
        for name, layer in layers.items():
            seen = layer.pool_for_attention(layer.reduce_to_output(inputs[name]))
            parts = layer.qkv(seen)[:, : 2 * layer.key_channels].chunk(2, dim=1)
            q, k = (part.unflatten(1, (layer.heads, -1)).movedim(2, -1) for part in parts)
            q = q * q.shape[-1] ** -0.5
            rows, columns = relative_logits(q, layer.rel_height, layer.rel_width)
            logits = torch.einsum("nhyxd,nhvud->nhyxvu", q, k) + rows.unsqueeze(-1) + columns.unsqueeze(-2)
            found[name] = logits.flatten(-2).softmax(-1).view(logits.shape).numpy()
    for handle in handles:
        handle.remove()
    return found


def shares(weights: np.ndarray, scenes: list[Any], query: str, side: int) -> tuple[np.ndarray, float]:
    """Mean weight from the centre of a scene's `query` ("cue" or "answer") on the other.

    Also the share that even attention would have. Shapes: weights (n, heads, h, w, h, w) to (heads,).
    """
    found, even = [], []
    for maps, scene in zip(weights, scenes, strict=True):
        size = maps.shape[-1]
        boxes = {"cue": scene.cue, "answer": scene.answer}
        top, left, length = boxes.pop(query)
        y, x = (int((start + length / 2) * size / side) for start in (top, left))
        (top, left, length), centres = boxes.popitem()[1], (np.arange(size) + 0.5) * side / size
        inside = [(centres >= start) & (centres < start + length) for start in (top, left)]
        found.append((maps[:, y, x] * np.outer(*inside)).sum((-2, -1)))
        even.append(np.outer(*inside).mean())
    return np.mean(found, axis=0), float(np.mean(even))


def look(seed: int) -> tuple[Look, list[Any], list[np.ndarray]]:
    """The head that shifts most of its weight between cue and answer in fine-tuning, on validation images.

    Also the scenes, and its weights before and after.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import tasks

    import augment_cli

    scenes = [tasks.recall_scene(tasks.generator("recall", "validation", number)) for number in range(SCENES)]
    pictures = np.stack([np.clip(scene.picture, 0, 255).astype(np.uint8) for scene in scenes])
    name = f"recall-{SETUP}-AA-fitted-{seed}"
    models = [augment_cli.load(MODELS / place) for place in (f"{name}.safetensors", f"{name}/last")]
    before, after = (weights_of(model, pictures) for model in models)
    best: tuple[Look, list[np.ndarray]] | None = None
    for site in after:
        for query in ("cue", "answer"):
            (old, even), (new, _) = (shares(w[site], scenes, query, tasks.SIDE) for w in (before, after))
            head = int(np.argmax(new - old))
            found = Look(site, head, query, *(round(100 * float(v), 2) for v in (old[head], new[head], even)))
            if best is None or found.after - found.before > best[0].after - best[0].before:
                best = found, [w[site][:, head] for w in (before, after)]
    assert best is not None
    return best[0], scenes, best[1]


def draw_attention(found: Look, scenes: list[Any], weights: list[np.ndarray], path: Path) -> None:
    """Images with the query marked, and the head's weights over them before and after fine-tuning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * SHOWN, 6), layout="constrained")
    columns = figure.subplots(3, SHOWN).T
    for axes, scene, maps in zip(columns, scenes, zip(*weights, strict=True), strict=False):
        side = len(scene.picture)
        top, left, length = scene.cue if found.query == "cue" else scene.answer
        y, x = top + length / 2, left + length / 2
        shown = np.clip(scene.picture, 0, 255).astype(np.uint8)
        size, extent = maps[0].shape[-1], (0, side, side, 0)
        for axis, weight in zip(axes, (None, *maps), strict=True):
            axis.imshow(shown if weight is None else shown.mean(-1) / 2, cmap="gray", extent=extent, vmin=0, vmax=255)
            if weight is not None:
                over = weight[int(y * size / side), int(x * size / side)]
                over = over / over.max()
                axis.imshow(over, cmap="plasma", alpha=np.clip(2 * over, 0, 0.9), extent=extent, vmin=0, vmax=1)
            axis.plot(x, y, "+", color="white", markersize=9, markeredgewidth=1.5)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(columns[0], ("image", "before", "after"), strict=True):
        axis.set_ylabel(title)
    figure.savefig(path, format="png", dpi=110)


# --- curves ---


DRAWN = ("AA, fitted", "AA, carried", "AA+AW, fitted", "AA+AW, carried")


def draw_curves(story: dict[str, Any], path: Path) -> None:
    """Validation accuracy by epoch: the source's training and how it goes on, then every chain that DRAWN names."""
    series = dict(zip(DRAWN, SERIES, strict=True)) | {"source": (QUIET, "-", "")}
    with picture(path, 10.5, 3.4) as figure:
        for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
            source = story["sources"][task]
            axes.plot(range(1, len(source) + 1), source, color=QUIET, linestyle="-", marker="", linewidth=1)
            axes.axvline(len(source), color=QUIET, linestyle=":", marker="", linewidth=1, zorder=0)
            for row, chains in chains_of(story, task).items():
                for number, chain in enumerate(chains if row in series else []):
                    start = [source[-1] if row == "source" else chain["before"]]
                    epochs = range(len(source), len(source) + len(chain["curve"]) + 1)
                    colour, dashes, marker = series[row]
                    style = {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 3, "linewidth": 1.2}
                    axes.plot(epochs, start + chain["curve"], label=row if number == 0 else None, **style)
            axes.set_title(task)
            axes.set_xlabel("epoch; fine-tuning starts at the line")
        figure.axes[0].set_ylabel("accuracy on validation images, %")
        figure.axes[0].legend(fontsize=8, loc="upper left")


# --- the page ---


def markdown(story: dict[str, Any]) -> str:
    parts = (opening(story), *(of_task(story, task) for task in TASKS), looked(story), closing())
    return "\n\n".join(paragraph for part in parts for paragraph in part) + "\n"


def filled(text: str, indent: str = "") -> str:
    """A paragraph, or with an indent of "- " an item of a list."""
    return textwrap.fill(
        " ".join(text.split()), 120, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )


def opening(story: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {number}" for name, number in story["versions"].items())
    yield "# One small model, two tasks for attention and one without"
    yield filled(f"Generated by `make story` with {versions}. The numbers are in `story.json`.")
    yield filled("""
        timm's `test_resnet` is trained on generated images of 48x48 until its accuracy no longer rises. Then it is
        converted, and each conversion, like the source itself, is fine-tuned for six epochs with the defaults of
        `augment finetune`.
        *Carried*: attention is untrained at first. *Fitted*: `--init fit`, on 512 images without labels. Seeds draw
        the conversion's random weights, the order of the images and their augmentation; the source is trained once.""")
    yield "![Accuracy by epoch, on three tasks](story.png)"


TEXTS = {
    "recall": (
        "## recall: distant parts of the image have to be compared",
        """A framed cue has one of six colours, and the class is the shape, elsewhere in the image, that has the same
        colour. Shapes may repeat: the most frequent one is the answer in 63% of the images. The source gets somewhat
        beyond that.""",
    ),
    "odd": (
        "## odd: six patches have to be compared",
        """Six patches of stripes in frames of six colours; one patch's stripes run otherwise than the others', and the
        class is the colour of its frame. The others' are horizontal in 55% of the images.""",
    ),
    "digits": (
        "## digits: nothing distant to compare",
        """scikit-learn's handwritten digits, enlarged, turned, moved, partly covered and noisy. Attention has nothing
        to gain here, and should lose nothing.""",
    ),
}


def of_task(story: dict[str, Any], task: str) -> Iterator[str]:
    title, text = TEXTS[task]
    found = chains_of(story, task)
    yield title
    yield filled(text)
    lines = ["| model | parameters | agreement before | accuracy after, by seed | mean |", "|---|--:|--:|---|--:|"]
    for row, chains in found.items():
        after = [chain["curve"][-1] for chain in chains]
        agreement = ", ".join(f"{chain['agreement']:.1f}" for chain in chains if "agreement" in chain) or "-"
        params = f"{chains[0]['params']:,}" if "params" in chains[0] else "the source's"
        by_seed = ", ".join(f"{value:.1f}" for value in after)
        lines.append(f"| {row} | {params} | {agreement} | {by_seed} | {fmean(after):.1f} |")
    yield "\n".join(lines)
    source = found.pop("source")
    yield "\n".join(filled(f"{row}: {compared(chains, source)}.", "- ") for row, chains in found.items())


def compared(chains: list[dict[str, Any]], source: list[dict[str, Any]]) -> str:
    """Chains beside the source's, as far as the seeds tell them apart."""
    ours, others = ([chain["curve"][-1] for chain in each] for each in (chains, source))
    points = fmean(ours) - fmean(others)
    beside = f"{abs(points):.1f} points {'above' if points >= 0 else 'below'} the source trained on, on average"
    seeds = "one seed" if len(ours) == 1 else "every seed"
    if min(ours) > max(others):
        return f"{beside}; {seeds} above all of the source's"
    if max(ours) < min(others):
        return f"{beside}; {seeds} below all of the source's"
    return f"{beside}; the ranges over the seeds overlap"


def looked(story: dict[str, Any]) -> Iterator[str]:
    yield "## Where attention looks"
    texts = {"cue": "the cue's centre on the shape that has its colour", "answer": "that shape's centre on the cue"}
    yield filled(f"""
        Among all heads of the fitted model, the one that fine-tuning brings to put most weight on the other of the two,
        from the cue or from the shape that has its colour; means over {SCENES} validation images:""")
    lines = ["| seed | layer, head | weight from | before | after | if even |", "|--:|---|---|--:|--:|--:|"]
    for seed, found in enumerate(story["looks"]):
        place = f"`{found['site']}`, {found['head']} | {texts[found['query']]}"
        lines.append(f"| {seed} | {place} | {found['before']:.1f}% | {found['after']:.1f}% | {found['even']:.1f}% |")
    yield "\n".join(lines)
    yield filled(
        f"The first {SHOWN} validation images, seed 0; the cross is the query, bright is where its weight goes:"
    )
    yield "![Attention of one head before and after fine-tuning](attention.png)"


def closing() -> Iterator[str]:
    yield "## What this does not say"
    yield filled("""
        One small architecture, one source a task, three seeds. When attention finds what to compare is a matter of
        chance: several of the starts and rates that were tried did so in some seeds only ([fitting](fitting.md)). No
        accuracy on photographs has been measured.""")
    yield "## The commands"
    yield filled("""
        `make story` writes the images, trains the sources and runs the following for each row and seed, unless
        `benchmarks/results/retrofit.json` has its results; without that file everything is measured anew. Each
        fine-tuning takes about 5 minutes on one core.""")
    yield """```console
$ augment convert test_resnet --recipe aa --init fit --calibrate data/recall/calibration --img-size 48 --seed 0 \\
    -a num_classes=3 --checkpoint source/last/model.safetensors -o aa.safetensors
$ augment evaluate aa.safetensors --against source/last --data data/recall --json
$ augment finetune aa.safetensors --data data/recall --epochs 6 --seed 0 --img-size 48 -o tuned
```"""


def main() -> None:
    story = tell()
    if all((MODELS / f"recall-{SETUP}-AA-fitted-{seed}" / "last").exists() for seed in range(3)):
        looks = [look(seed) for seed in range(3)]
        story["looks"] = [asdict(found[0]) for found in looks]
        clearest = max(looks, key=lambda found: found[0].after - found[0].before)
        write_file(DOCS / "attention.png", lambda temporary: draw_attention(*clearest, temporary))
    else:
        story["looks"] = json.loads((DOCS / "story.json").read_text())["looks"]
    write_file(DOCS / "story.json", lambda temporary: temporary.write_text(json.dumps(story, indent=1) + "\n"))
    write_file(DOCS / "story.png", lambda temporary: draw_curves(story, temporary))
    write_file(DOCS / "story.md", lambda temporary: temporary.write_text(markdown(story), encoding="utf-8"))
    print("wrote docs/story.md, docs/story.json, docs/story.png", file=sys.stderr)


if __name__ == "__main__":
    main()
