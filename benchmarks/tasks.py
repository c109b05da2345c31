"""Small image tasks that tell what attention is worth: made by generators, since no data can be downloaded.

recall: a framed cue has one of six colours; the class is the shape elsewhere that has the same colour. Shapes may
    repeat, so that a model which does not bind shape to colour still learns the shapes: the most frequent shape is the
    answer in 63% of the images.
odd: six patches of stripes in frames of six colours; the class is the colour of the frame whose stripes run otherwise
    than the others'. Theirs are horizontal in 55% of the images, so that directions are worth learning alone.
digits: scikit-learn's digits, enlarged, turned, moved, partly covered, noisy: a local task, on which there is nothing
    to be gained and nothing may be lost.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48
COUNTS = {"train": 12_000, "validation": 2_000, "calibration": 512}

_COLOURS = np.array(
    [(220, 50, 47), (38, 139, 210), (133, 153, 0), (211, 54, 130), (240, 200, 40), (40, 200, 190)], dtype=np.float64
)

Box = tuple[int, int, int]
"""Top, left, side."""


@dataclass(frozen=True)
class Scene:
    """A picture of `recall` (SIDE, SIDE, 3), 0 to 255; its class; its cue, and the shape that has the cue's colour."""

    picture: np.ndarray
    label: str
    cue: Box
    answer: Box


def recall(drawn: np.random.Generator) -> tuple[np.ndarray, str]:
    """An image (SIDE, SIDE, 3) of 0 to 255, and its class."""
    scene = recall_scene(drawn)
    return scene.picture, scene.label


def recall_scene(drawn: np.random.Generator) -> Scene:
    picture = np.full((SIDE, SIDE, 3), drawn.uniform(40, 90))
    colours, shapes = drawn.permutation(len(_COLOURS))[:3], drawn.integers(0, len(_SHAPES), 3)
    cue, *boxes = _place([10, *drawn.integers(10, 14, 3)], drawn)
    (top, left, side), asked = cue, drawn.integers(3)
    picture[top : top + side, left : left + side] = 255
    picture[top + 2 : top + side - 2, left + 2 : left + side - 2] = _COLOURS[colours[asked]]
    names = list(_SHAPES)
    for (top, left, side), shape, colour in zip(boxes, shapes, colours, strict=True):
        y, x = np.mgrid[0:side, 0:side]
        picture[top : top + side, left : left + side][_SHAPES[names[shape]](y, x, side)] = _COLOURS[colour]
    return Scene(picture + drawn.normal(0, 15, picture.shape), names[shapes[asked]], cue, boxes[asked])


def _disc(y: np.ndarray, x: np.ndarray, side: int) -> np.ndarray:
    return (y - (side - 1) / 2) ** 2 + (x - (side - 1) / 2) ** 2 <= (side / 2) ** 2


def _cross(y: np.ndarray, x: np.ndarray, side: int) -> np.ndarray:
    return (abs(x - (side - 1) / 2) <= side / 6) | (abs(y - (side - 1) / 2) <= side / 6)


def _triangle(y: np.ndarray, x: np.ndarray, side: int) -> np.ndarray:
    return abs(x - (side - 1) / 2) <= (y + 0.5) / 2


_SHAPES = {"disc": _disc, "cross": _cross, "triangle": _triangle}


def odd(drawn: np.random.Generator) -> tuple[np.ndarray, str]:
    """An image (SIDE, SIDE, 3) of 0 to 255, and its class."""
    picture = np.full((SIDE, SIDE, 3), drawn.uniform(60, 110))
    common = 0 if drawn.random() < 0.55 else int(drawn.integers(1, 4))
    other = int(drawn.choice([turn for turn in range(4) if turn != common]))
    label = int(drawn.integers(len(_COLOURS)))
    y, x = np.mgrid[0:8, 0:8] - 3.5
    for number, (top, left, side) in enumerate(_place([11] * len(_COLOURS), drawn)):
        angle = np.pi / 4 * (other if number == label else common) + drawn.normal(0, 0.05)
        waves = np.sin(2 * np.pi / 4.5 * (x * np.cos(angle) + y * np.sin(angle)) + drawn.uniform(0, 2 * np.pi))
        picture[top : top + side, left : left + side] = _COLOURS[number]
        picture[top + 2 : top + 10, left + 2 : left + 10] = (128 + 90 * np.sign(waves))[..., None]
    return picture + drawn.normal(0, 12, picture.shape), str(label)


def digits() -> Callable[[np.random.Generator, str], tuple[np.ndarray, str]]:
    """Draws a digit of a split: no original is in two of them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    originals = dict(zip(COUNTS, np.split(order, [600, 1400]), strict=True))

    def draw(drawn: np.random.Generator, split: str) -> tuple[np.ndarray, str]:
        original = drawn.choice(originals[split])
        side = int(drawn.integers(26, 43))
        small = Image.fromarray((data.images[original] * 255 / 16).astype(np.uint8))
        small = small.resize((side, side), Image.Resampling.BILINEAR)
        small = small.rotate(drawn.uniform(-20, 20), Image.Resampling.BILINEAR)
        canvas = Image.new("L", (SIDE, SIDE))
        canvas.paste(small, tuple(drawn.integers(0, SIDE - side + 1, 2).tolist()))
        picture = np.asarray(canvas, dtype=np.float64) * drawn.uniform(0.4, 1)
        top, left = drawn.integers(0, SIDE - 12, 2)
        picture[top : top + 12, left : left + 12] = drawn.uniform(0, 255)
        return picture[..., None] + drawn.normal(0, 35, (SIDE, SIDE, 3)), str(data.target[original])

    return draw


def _place(sides: list[int], drawn: np.random.Generator) -> list[Box]:
    """Squares that do not touch, at random places."""
    while True:
        boxes: list[Box] = []
        for side in sides:
            for _ in range(50):
                top, left = (int(place) for place in drawn.integers(0, SIDE - side + 1, 2))
                if all(_apart((top, left, side), box) for box in boxes):
                    boxes.append((top, left, side))
                    break
        if len(boxes) == len(sides):
            return boxes


def _apart(a: Box, b: Box) -> bool:
    return any(a[i] + a[2] < b[i] or b[i] + b[2] < a[i] for i in (0, 1))


TASKS = ("recall", "odd", "digits")


def images(task: str, split: str) -> Iterator[tuple[np.ndarray, str]]:
    """Images (SIDE, SIDE, 3) of bytes, and classes."""
    draw = {"recall": recall, "odd": odd}.get(task)
    draw_digit = digits() if draw is None else None
    for number in range(COUNTS[split]):
        drawn = generator(task, split, number)
        picture, label = draw(drawn) if draw else draw_digit(drawn, split)
        yield np.clip(picture, 0, 255).astype(np.uint8), label


def generator(task: str, split: str, number: int) -> np.random.Generator:
    """Draws the image of a number."""
    return np.random.default_rng((TASKS.index(task), list(COUNTS).index(split), number))


def write(task: str, folder: Path) -> None:
    """Write a task as class folders of PNGs for training and validation, and calibration images without classes."""
    for split in COUNTS:
        if (folder / split / "written").exists():
            continue
        for number, (picture, label) in enumerate(images(task, split)):
            place = folder / split / ("" if split == "calibration" else label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(place / f"{number:05}.png")
        (folder / split / "written").touch()
