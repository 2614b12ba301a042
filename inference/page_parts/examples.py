"""Clips to try the page with, spoken by the synthetic corpus's voices: free of licences, the same each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile

from sailer.data.synthetic.emotions import EMOTIONS
from sailer.data.synthetic.espeak import Voice, espeak

PAUSE_S = 0.3
# File name -> the voice, and the (emotion, number of its sentence) that it goes through.
EXAMPLES: dict[str, tuple[Voice, Sequence[tuple[str, int]]]] = {
    "good news.wav": (Voice(sex="female", pitch=165), (("Neutral", 0), ("Surprise", 1), ("Happy", 5))),
    "broken promise.wav": (Voice(sex="male", pitch=95), (("Sad", 1), ("Angry", 3), ("Angry", 4))),
    "at night.wav": (Voice("en-gb-x-rp", "female", 150), (("Fear", 2), ("Fear", 3), ("Neutral", 2))),
    "lunch.wav": (Voice("en-us-nyc", "male", 105), (("Happy", 6), ("Disgust", 0), ("Contempt", 6))),
}


def make_examples(
    folder: Path, clips: Mapping[str, tuple[Voice, Sequence[tuple[str, int]]]] = EXAMPLES
) -> dict[Path, str]:
    """Write the example clips, 16-bit WAV files of some seconds; their files, and what is said in each.

    Args:
        folder: where they are written.
        clips: what is spoken, in the form of `EXAMPLES`.

    Raises:
        ImportError: there is no eSpeak NG (the message names the extra).
    """
    synthesizer = espeak()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, (voice, course) in clips.items():
        pieces, said = [], []
        for emotion_name, sentence in course:
            emotion = EMOTIONS[emotion_name]
            spoken = synthesizer.speak(
                emotion.sentences[sentence],
                voice,
                rate=175 * emotion.rate,
                volume=70 * emotion.volume,
                pitch=50 + emotion.pitch,
                pitch_range=50 + emotion.pitch_range,
            )
            pieces += [spoken, np.zeros(round(PAUSE_S * synthesizer.sampling_rate), np.int16)]
            said.append(emotion.sentences[sentence])
        soundfile.write(folder / name, np.concatenate(pieces[:-1]), synthesizer.sampling_rate)
        files[folder / name] = " ".join(said)
    return files
