"""One colour per emotion, for every picture of the package: warm for anger, cool for sadness, apart for all eyes."""

from __future__ import annotations

import colorsys
import zlib

# The nine primary ones differ by at least 15 in CIE 1976 L*a*b*, also as eyes without red, green or blue cones see
# them (tests/test_colours.py). The other secondary ones are shades of the nearest, and always stand with their name.
EMOTION_COLOURS = {
    "Angry": "#e2350f",
    "Contempt": "#661048",
    "Disgust": "#0f6b33",
    "Fear": "#cd55e0",
    "Happy": "#f6c31a",
    "Neutral": "#d3dbe1",
    "Sad": "#1a2f9c",
    "Surprise": "#1fa2b3",
    "Other": "#8a7768",
    "Amused": "#ffe08a",
    "Excited": "#f28c1c",
    "Frustrated": "#a8200d",
    "Annoyed": "#f08a70",
    "Depressed": "#0b1659",
    "Disappointed": "#5a6fd6",
    "Concerned": "#9a3fb0",
    "Confused": "#7fd0d8",
    "Calm": "#a9c4d6",
}
# What other corpora and systems call them.
OTHER_NAMES = {
    **{"anger": "angry", "sadness": "sad", "happiness": "happy", "joy": "happy", "disgusted": "disgust"},
    **{"fearful": "fear", "afraid": "fear", "surprised": "surprise", "contemptuous": "contempt", "boredom": "calm"},
}
ATTRIBUTE_COLOURS = {"arousal": "#c2510c", "valence": "#2a7f3f", "dominance": "#3b5fc0"}
_BY_KEY = {name.casefold(): colour for name, colour in EMOTION_COLOURS.items()}


def colour_of(emotion: str) -> str:
    """An emotion's colour, "#rrggbb", whatever its case; an unknown emotion has one too, always the same."""
    key = emotion.strip().casefold()
    key = OTHER_NAMES.get(key, key)
    if key in _BY_KEY:
        return _BY_KEY[key]
    code = zlib.crc32(key.encode())
    red, green, blue = colorsys.hls_to_rgb(code % 360 / 360, 0.4 + code // 360 % 3 / 10, 0.45)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
