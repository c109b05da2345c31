"""Colours of pictures stay apart in grey, for the colour-blind, and from their ground."""

import itertools

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from augment_cli.reporting import style
from augment_cli.reporting.network import _STYLE

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency" (2009),
# severity 1.0, on linear RGB.
SIGHT = {
    "all": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.41246, 0.35758, 0.18044], [0.21267, 0.71515, 0.07217], [0.01933, 0.11919, 0.95030]])
WHITE = TO_XYZ.sum(1)


def linear(colours) -> np.ndarray:
    """sRGB from 0 to 1, (..., 3), as linear light."""
    values = np.asarray(colours)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear light, (..., 3)."""
    xyz = np.clip(light, 0, 1) @ TO_XYZ.T / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def distances(colours: list[str], sight: str) -> list[float]:
    seen = lab(linear([to_rgb(colour) for colour in colours]) @ np.array(SIGHT[sight]).T)
    return [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2)]


def contrast(a: str, b: str) -> float:
    """The ratio of luminances as WCAG 2 defines it."""
    dark, light = sorted(float(linear(to_rgb(colour)) @ TO_XYZ[1]) + 0.05 for colour in (a, b))
    return light / dark


SERIES = [colour for colour, _, _ in style.SERIES]


@pytest.mark.parametrize("sight", SIGHT)
def test_no_two_colours_look_alike(sight: str):
    assert min(distances(SERIES, sight)) > 25
    assert min(distances(list(style.OPERATORS), sight)) > 15


def test_series_differ_in_grey_and_in_more_than_colour():
    lightness = lab(linear([to_rgb(colour) for colour in SERIES]))[:, 0]
    assert min(abs(a - b) for a, b in itertools.combinations(lightness, 2)) > 10
    for i in range(3):
        assert len({series[i] for series in style.SERIES}) == len(style.SERIES)


def test_strokes_stand_out_from_their_ground():
    assert min(contrast(colour, "#ffffff") for colour in (*SERIES, style.QUIET)) >= 3
    grounds = [line.split("--band: ")[1][:7] for line in _STYLE.splitlines() if "--band: " in line]
    assert len(grounds) == 2  # light and dark
    for ground in grounds:
        assert min(contrast(colour, ground) for colour in style.OPERATORS[:3]) >= 3


@pytest.mark.parametrize("name", [style.COUNTS, style.WEIGHTS, style.SIGNED])
def test_maps_of_colours_only_grow_lighter_or_only_darker(name: str):
    lightness = lab(linear(colormaps[name](np.linspace(0, 1, 64))[:, :3]))[:, 0]
    steps = np.diff(lightness)
    assert (steps > 0).all() or (steps < 0).all()


def test_a_picture_leaves_matplotlibs_settings_alone(tmp_path):
    from matplotlib import rcParams

    before = dict(rcParams)
    with style.picture(tmp_path / "p.svg", 2, 2, "svg") as figure:
        lines = [figure.subplots().plot([0, 1])[0]] + [figure.axes[0].plot([i, 1])[0] for i in range(1, 4)]
    assert [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines] == list(style.SERIES)
    assert dict(rcParams) == before
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
