"""The emotions' colours: warm and cool where they should be, and apart for colour-blind eyes too."""

import colorsys
import itertools
from pathlib import Path

import numpy as np
import pytest

from sailer.data.colours import EMOTION_COLOURS, colour_of
from sailer.data.schema import PRIMARY_LABELS, SECONDARY_LABELS
from sailer.inference.timeline import plot_timeline

# Linear RGB as eyes without one kind of cone see it: Machado, Oliveira and Fernandes (2009), severity 1.
EYES = {
    "usual": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = np.array([0.9505, 1.0, 1.089])


def channels(colour: str) -> np.ndarray:
    return np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255


def lab(colour: str, eyes: str) -> np.ndarray:
    """CIE 1976 L*a*b* of an sRGB colour."""
    values = channels(colour)
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(EYES[eyes]) @ linear, 0, 1)
    x, y, z = (np.cbrt(v) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in TO_XYZ @ seen / WHITE)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def hue(colour: str) -> float:
    return 360 * colorsys.rgb_to_hsv(*channels(colour))[0]


def test_the_conversion_knows_white_and_red() -> None:
    assert lab("#ffffff", "usual") == pytest.approx([100, 0, 0], abs=0.05)
    assert lab("#ff0000", "usual") == pytest.approx([53.24, 80.09, 67.20], abs=0.1)


@pytest.mark.parametrize("eyes", EYES)
def test_no_two_primary_emotions_look_alike(eyes: str) -> None:
    seen = {label: lab(colour_of(label), eyes) for label in PRIMARY_LABELS}
    alike = [pair for pair in itertools.combinations(seen, 2) if np.linalg.norm(seen[pair[0]] - seen[pair[1]]) < 15]
    assert alike == []


def test_anger_is_warm_and_sadness_cool() -> None:
    assert hue(colour_of("Angry")) < 30
    assert 200 < hue(colour_of("Sad")) < 260


def test_every_emotion_has_one_colour_whatever_it_is_called() -> None:
    assert len({colour_of(label) for label in {*PRIMARY_LABELS, *SECONDARY_LABELS}}) == 17
    assert colour_of("anger") == colour_of(" ANGRY") == EMOTION_COLOURS["Angry"]
    assert colour_of("Longing") == colour_of("longing") != colour_of("Pride")
    assert len(colour_of("Longing")) == 7


def test_a_timeline_is_drawn_in_them(tmp_path: Path) -> None:
    from matplotlib.image import imread

    results = [{"primary": [{"label": "Angry", "score": 1.0}, {"label": "Sad", "score": 0.0}]}]
    picture = imread(plot_timeline("a", [(0.0, 3.0)], results, tmp_path / "a.png"))
    height, width = picture.shape[:2]
    middle = picture[height // 2, width // 2, :3]
    assert middle == pytest.approx(channels(colour_of("Angry")), abs=0.02)
