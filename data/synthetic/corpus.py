"""A spoken corpus made on the spot: eSpeak NG voices that sound and speak by emotion, and annotators who disagree.

The class proportions are the challenge's (paper, Table 1); what leaves are columns of the canonical row.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from sailer.data.labels import consensus
from sailer.data.schema import NO_AGREEMENT, SECONDARY_LABELS, CorpusError, LabelSet
from sailer.data.synthetic.emotions import CARRIERS, DEVELOPMENT_COUNTS, EMOTIONS, FILLERS, TRAIN_COUNTS
from sailer.data.synthetic.espeak import Espeak, Voice, espeak

ACCENTS = ("en-us", "en-us-nyc", "en-gb-x-rp", "en-029")
# A clip leans to a second emotion by a share that is uniform up to the first value; beyond that an annotator errs with
# the second value's chance. Together they leave a fifth of clips without agreement, as in the challenge's data.
_MOST_BLEND, _MISTAKE = 0.4, 0.4
_ALSO_HEARD = 0.35
_RATING_NOISE = 0.8
_MOST_DRAWS = 1000


@dataclass(frozen=True)
class Speaker:
    """A voice and its owner: name, age in years, and eSpeak's settings when no emotion moves them."""

    name: str
    age: int
    voice: Voice
    pitch_range: float
    rate: float
    volume: float


@dataclass(frozen=True)
class _Clip:
    """What annotators heard in a clip: the emotion, a second one, its share, and each annotator's choice."""

    emotion: str
    second: str
    blend: float
    choices: list[str]

    def votes(self, label_set: LabelSet) -> np.ndarray:
        """(labels,) counts of the choices."""
        chosen = [label_set.index(choice) for choice in self.choices]
        return np.bincount(chosen, minlength=len(label_set.labels)).astype(np.float32)


def make_corpus(
    label_set: LabelSet,
    *,
    seed: int,
    train_clips: int,
    validation_clips: int,
    test_clips_per_class: int,
    annotators: int,
    speakers: int,
    emotional_text: float,
    audio: bool = True,
) -> dict[str, dict[str, Any]]:
    """Columns of the canonical row per split. A clip depends on the options, its split's size and its own place alone.

    Args:
        label_set: its classes must be among `EMOTIONS`; only they are spoken and chosen.
        seed: the same seed gives the same bytes.
        train_clips, validation_clips: clips in the proportions of the challenge's training and development set,
            clips without agreement and Other included.
        test_clips_per_class: test clips whose annotators agree on each scored class.
        annotators: the fewest votes of a clip; it has up to two more.
        speakers: voices, half of each sex. A sixth (at least one) speaks the validation set, another the test set.
        emotional_text: the share of clips whose words carry the emotion.
        audio: False leaves the audio and durations out, and needs no eSpeak; all else is the same.

    Raises:
        CorpusError: an impossible option, or a class that the generator does not know.
        ImportError: audio is asked for and `espeakng-loader` is not installed.
    """
    _check_options(label_set, locals())
    cast = [_make_speaker(number, np.random.default_rng([seed, 0, number])) for number in range(speakers)]
    held_out = max(1, speakers // 6)
    test_outcomes = [label for label in label_set.scored for _ in range(test_clips_per_class)]
    plan = {
        "train": (_apportion(TRAIN_COUNTS, label_set, train_clips), cast[2 * held_out :]),
        "validation": (_apportion(DEVELOPMENT_COUNTS, label_set, validation_clips), cast[:held_out]),
        "test": (test_outcomes, cast[held_out : 2 * held_out]),
    }
    shares = np.array([TRAIN_COUNTS[label] for label in label_set.labels], dtype=np.float64)
    splits = {}
    for number, (split, (outcomes, voices)) in enumerate(plan.items(), start=1):
        shuffled = np.random.default_rng([seed, number]).permutation(np.array(outcomes, dtype=object))
        rows = []
        for index, outcome in enumerate(tqdm(shuffled, desc=f"Synthesizing {split}", unit="clip", disable=not audio)):
            rng = np.random.default_rng([seed, number, index])
            clip = _draw_clip(outcome, label_set, shares / shares.sum(), annotators, rng)
            speaker = voices[index % len(voices)]
            row: dict[str, Any] = {"id": f"synthetic-{seed}-{split}-{index:05d}"}
            row |= {"speaker": speaker.name, "sex": speaker.voice.sex, "age": speaker.age}
            row |= _annotations(clip, label_set, rng) | {"transcript": _draw_text(clip, emotional_text, rng)}
            settings = _prosody(clip, speaker, rng)
            rows.append(row | (_speech(espeak(), row["transcript"], speaker, settings) if audio else {}))
        splits[split] = {name: [row[name] for row in rows] for name in (rows[0] if rows else ("id",))}
    return splits


def simulate_votes(emotions: Sequence[str], label_set: LabelSet, annotators: int, seed: int) -> np.ndarray:
    """What the corpus' annotators would say of clips of these emotions: they know the emotion alone, not the sound.

    Args:
        emotions: one a clip, of `EMOTIONS` and of the label set.
        label_set: what they choose from.
        annotators: the fewest votes of a clip; it has up to two more.
        seed: the same seed gives the same votes.

    Returns:
        (clips, labels) counts, float32. About a fifth of the clips have no agreement.
    """
    clips = (
        _annotate(emotion, label_set, annotators, np.random.default_rng([seed, index]))
        for index, emotion in enumerate(emotions)
    )
    return np.stack([clip.votes(label_set) for clip in clips])


def _check_options(label_set: LabelSet, options: Mapping[str, Any]) -> None:
    lowest = {
        "seed": 0,
        "train_clips": 0,
        "validation_clips": 0,
        "test_clips_per_class": 0,
        "annotators": 2,
        "speakers": 3,
    }
    for name, minimum in lowest.items():
        if not isinstance(options[name], Integral) or options[name] < minimum:
            raise CorpusError(
                f"Synthetic corpus: {name}={options[name]!r} is not a whole number of at least {minimum}."
            )
    if not isinstance(options["emotional_text"], Real) or not 0 <= float(options["emotional_text"]) <= 1:
        raise CorpusError(f"Synthetic corpus: emotional_text={options['emotional_text']!r} is not between 0 and 1.")
    unknown = [label for label in label_set.labels if label not in EMOTIONS]
    if unknown or len(label_set.labels) < 2:
        raise CorpusError(
            f"The synthetic corpus has no voice for {unknown} of the label set {list(label_set.labels)}; "
            f"name two or more of {list(EMOTIONS)}."
        )


def _make_speaker(number: int, rng: np.random.Generator) -> Speaker:
    """Speakers of alternating sex; the older are lower and slower."""
    female = number % 2 == 0
    age = int(rng.integers(20, 70))
    pitch = (rng.uniform(135, 180) if female else rng.uniform(75, 110)) - 0.3 * (age - 20)
    formants = tuple(int(value) for value in rng.integers(*((105, 118) if female else (93, 104)), size=5))
    voice = Voice(ACCENTS[rng.integers(len(ACCENTS))], "female" if female else "male", round(pitch), formants)
    rate = 200 - 0.6 * (age - 20) + rng.normal(0, 8)
    return Speaker(f"synthetic-{number:02d}", age, voice, rng.normal(45, 6), rate, 70 * np.exp(rng.normal(0, 0.12)))


def _apportion(counts: Mapping[str | None, int], label_set: LabelSet, clips: int) -> list[str | None]:
    """`clips` wanted outcomes (a class, or None for no agreement) in proportion to `counts`, by largest remainders."""
    counts = {label: count for label, count in counts.items() if label is None or label in label_set.labels}
    exact = {label: clips * count / sum(counts.values()) for label, count in counts.items()}
    by_remainder = sorted(exact, key=lambda label: int(exact[label]) - exact[label])
    left = clips - sum(int(value) for value in exact.values())
    return [label for label in exact for _ in range(int(exact[label]) + (label in by_remainder[:left]))]


def _draw_clip(
    wanted: str | None, label_set: LabelSet, shares: np.ndarray, annotators: int, rng: np.random.Generator
) -> _Clip:
    """A clip whose annotators come to the wanted outcome: drawn anew until they do."""
    target = NO_AGREEMENT if wanted is None else label_set.index(wanted)
    for _ in range(_MOST_DRAWS):
        emotion = wanted or str(rng.choice(label_set.labels, p=shares))
        clip = _annotate(emotion, label_set, annotators, rng)
        if consensus(clip.votes(label_set)[None])[0] == target:
            return clip
    raise CorpusError(
        f"{annotators} simulated annotators did not come to {wanted or 'no agreement'} in {_MOST_DRAWS} draws; "
        "change their number."
    )


def _annotate(emotion: str, label_set: LabelSet, annotators: int, rng: np.random.Generator) -> _Clip:
    """What annotators make of a clip of an emotion."""
    labels = label_set.labels
    mistakes = np.array([EMOTIONS[emotion].mistaken_for.get(label, 0.01) for label in labels])
    mistakes[labels.index(emotion)] = 0
    mistakes /= mistakes.sum()
    second = int(rng.choice(len(labels), p=mistakes))
    blend = rng.uniform(0, _MOST_BLEND)
    heard = _MISTAKE * mistakes
    heard[labels.index(emotion)] += (1 - _MISTAKE) * (1 - blend)
    heard[second] += (1 - _MISTAKE) * blend
    choices = rng.choice(len(labels), size=rng.integers(annotators, annotators + 3), p=heard)
    return _Clip(emotion, labels[second], blend, [labels[choice] for choice in choices])


def _annotations(clip: _Clip, label_set: LabelSet, rng: np.random.Generator) -> dict[str, Any]:
    """Votes, secondary votes, mean attributes on [0, 1] and the consensus of a clip's annotators."""
    votes = clip.votes(label_set)
    secondary = np.zeros(len(SECONDARY_LABELS), dtype=np.float32)
    ratings = []
    heard = _blended(clip, "attributes")
    for choice in clip.choices:
        also = [name for name in EMOTIONS[choice].also if rng.random() < _ALSO_HEARD]
        for name in {choice, *also}:
            secondary[SECONDARY_LABELS.index(name)] += 1
        rating = (heard + np.array(EMOTIONS[choice].attributes)) / 2 + rng.normal(0, _RATING_NOISE, 3)
        ratings.append(np.clip(np.round(rating), 1, 7))
    return {
        "votes": votes,
        "secondary_votes": secondary,
        "attributes": (np.mean(ratings, axis=0) - 1) / 6,
        "label": int(consensus(votes[None])[0]),
    }


def _blended(clip: _Clip, name: str) -> np.ndarray:
    one, other = (np.array(getattr(EMOTIONS[emotion], name)) for emotion in (clip.emotion, clip.second))
    return (1 - clip.blend) * one + clip.blend * other


def _draw_text(clip: _Clip, emotional_text: float, rng: np.random.Generator) -> str:
    if rng.random() < emotional_text:
        spoken = clip.second if rng.random() < clip.blend else clip.emotion
        return _pick(EMOTIONS[spoken].sentences, rng)
    text = _pick(CARRIERS, rng).format(**{kind: _pick(words, rng) for kind, words in FILLERS.items()})
    return text[0].upper() + text[1:]


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _prosody(clip: _Clip, speaker: Speaker, rng: np.random.Generator) -> dict[str, float]:
    """eSpeak's settings: the speaker's own, moved by the emotions heard, then by chance."""
    return {
        "pitch": 50 + _blended(clip, "pitch") + rng.normal(0, 6),
        "pitch_range": speaker.pitch_range + _blended(clip, "pitch_range") + rng.normal(0, 8),
        "rate": speaker.rate * _blended(clip, "rate") * np.exp(rng.normal(0, 0.06)),
        "volume": speaker.volume * _blended(clip, "volume") * np.exp(rng.normal(0, 0.12)),
    }


def _speech(synthesizer: Espeak, text: str, speaker: Speaker, settings: Mapping[str, float]) -> dict[str, Any]:
    """The audio column (a 16-bit mono WAV) and the duration of one clip."""
    samples = synthesizer.speak(text, speaker.voice, **settings)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(synthesizer.sampling_rate)
        file.writeframes(samples.astype("<i2").tobytes())
    audio = {"path": None, "bytes": buffer.getvalue()}
    return {"audio": audio, "duration": len(samples) / synthesizer.sampling_rate}
