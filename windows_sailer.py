"""A recording on its way through the pipeline: cut into windows, prepared ahead of the model, outputs as they come,
and at last the set of emotions that its scores leave possible; and what the pipeline knows of speakers."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .layers_sailer import SpeakerStatistics, check_adaptable, fingerprint, reference_of, set_reference

logger = logging.get_logger(__name__)

Number = TypeVar("Number", int, float)

SHORTEST_LAST_WINDOW = 1.0
# Errors whose text is meant for whoever passed the recording; of others the kind is told too.
ITEM_ERRORS = (ValueError, TypeError, OSError, ImportError)
COVERAGE = 0.9  # of a prediction set, where none is asked for
KEPT_SCORES = 100  # of a calibration split: more of its order statistics would only lengthen the configuration


@dataclass
class Clip:
    """One input on its way through the pipeline: its windows, and their outputs as they arrive."""

    windows: list[np.ndarray] = field(default_factory=list)
    timestamps: list[tuple[float, float]] = field(default_factory=list)
    text: str | None = None
    warning: str | None = None
    error: Exception | None = None
    texts: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    speaker_shift: torch.Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or len(self.outputs) == len(self.timestamps)

    @property
    def message(self) -> str:
        """What the error says; never empty."""
        told = isinstance(self.error, ITEM_ERRORS) and str(self.error)
        return str(self.error) if told else f"{type(self.error).__name__}: {self.error}"


def cut_windows(
    samples: int, rate: int, chunk_length_s: float, stride_length_s: float | tuple[float, float] | None
) -> list[tuple[int, int]]:
    """First and last sample of each window: all but the last are a chunk long and start a chunk less strides apart.

    Raises:
        ValueError: a length that is no number or negative, or strides that leave nothing of a window at this rate.
    """
    chunk = round(at_least("chunk_length_s", chunk_length_s, 0) * rate)
    strides = chunk_length_s / 6 if stride_length_s is None else stride_length_s
    if not isinstance(strides, (list, tuple)):
        strides = (strides, strides)
    if len(strides) != 2:
        raise ValueError(f"stride_length_s is {stride_length_s}; give one number of seconds, or two: left and right.")
    left, right = strides
    step = (
        chunk
        - round(at_least("stride_length_s", left, 0) * rate)
        - round(at_least("stride_length_s", right, 0) * rate)
    )
    if chunk > 0 and step <= 0:
        raise ValueError(
            f"stride_length_s ({left} and {right} s) leaves nothing of a window of {chunk_length_s} s; choose less."
        )
    if chunk == 0 or samples <= chunk:
        return [(0, samples)]
    windows = [(start, min(start + chunk, samples)) for start in range(0, samples - chunk + step, step)]
    start, end = windows[-1]
    shortest = min(chunk, round(SHORTEST_LAST_WINDOW * rate))
    return [*windows[:-1], (min(start, end - shortest), end)]


def run_ahead(prepare: Callable[[Any], Clip], items: Iterable[Any], workers: int, batch_size: int) -> Iterator[Clip]:
    """`prepare` of each item, in order; with workers in threads, some items ahead."""
    if workers == 0:
        yield from map(prepare, items)
        return
    pending: deque[Future[Clip]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(pool.submit(prepare, item))
            if len(pending) > workers + batch_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Without waiting: after an error this may run while the garbage is collected, in the midst of starting another
        # thread, which then could never start.
        pool.shutdown(wait=False, cancel_futures=True)


def at_least(option: str, value: Number, least: float) -> Number:
    """`value`; raises ValueError by the option's name where it is no finite number, or less than `least`."""
    if not isinstance(value, numbers.Real) or not least <= value < math.inf:
        raise ValueError(f"{option} is {value!r}; it must be at least {least}.")
    return value


def count_of(option: str, value: int, least: int) -> int:
    """`value`; raises ValueError by the option's name where it is no whole number, or less than `least`."""
    if not isinstance(value, numbers.Integral):
        raise ValueError(f"{option} is {value!r}; it must be a whole number.")
    return at_least(option, value, least)


def share_of(option: str, value: float) -> float:
    """`value`; raises ValueError by the option's name where it does not lie between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
        raise ValueError(f"{option} is {value!r}; it must lie between 0 and 1, such as 0.9.")
    return float(value)


def kept_scores(scores: Sequence[float] | np.ndarray) -> list[float]:
    """What a configuration keeps of calibration scores: all of up to `KEPT_SCORES`, of more as many order statistics.

    Returns:
        The scores of ranks ceil(j * clips / m), j = 1, ..., m, rounded up to six decimals.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    number = min(len(ordered), KEPT_SCORES)
    ranks = [-(-place * len(ordered) // number) for place in range(1, number + 1)]
    return [min(1.0, math.ceil(1e6 * ordered[rank - 1] - 1e-6) / 1e6) for rank in ranks]


def score_threshold(kept: Sequence[float], clips: int, coverage: float) -> float:
    """The greatest score that a class in a prediction set may have; infinity where clips are too few to exclude any.

    The ceil((clips + 1) * coverage)-th smallest score of the calibration clips covers a further clip with at least
    that probability, if it is exchangeable with them (Vovk et al. 2005; Angelopoulos and Bates 2021,
    https://arxiv.org/abs/2107.07511, section 1). Where that one was not kept, the next greater one that was is taken,
    which covers at most 1 % more.

    Args:
        kept: what `kept_scores` gave, ascending.
        clips: how many there were.
        coverage: between 0 and 1.
    """
    rank = math.ceil((clips + 1) * coverage - 1e-9)  # 0.07 * 100 is 7.000000000000001
    return math.inf if rank > clips else kept[(rank - 1) * len(kept) // clips]


def prediction_set(
    scores: Mapping[str, float],
    conformal: Mapping[str, Any],
    prior: str = "balanced",
    coverage: float = COVERAGE,
    by_class: bool = False,
) -> list[str]:
    """The emotions that a clip may have at a coverage, by split conformal prediction with the least ambiguous sets.

    A class y is in the set if its score 1 - p(y) is at most the threshold (LAC; Sadinle, Lei and Wasserman 2019,
    https://arxiv.org/abs/1609.00451). p is scaled to sum to 1 over the scored classes. Where all classes are
    unlikelier than so many of the calibration clips' own were, the set is empty.

    Args:
        scores: probability of each scored class, in any scale.
        conformal: of a configuration.
        prior: which probabilities they are, "balanced" or "natural".
        coverage: the share of clips whose set is to have their consensus.
        by_class: each class has a threshold of its own, from its own calibration clips (Mondrian), so that the
            coverage is meant for each class and not only for all of them together. A class with too few clips for
            the coverage is in every set.

    Returns:
        Labels by falling probability.
    """
    total = sum(scores.values()) or 1.0
    threshold = score_threshold(conformal["scores"][prior], conformal["clips"], coverage)
    found = []
    for label in sorted(scores, key=scores.__getitem__, reverse=True):
        if by_class:
            own = conformal["class_clips"].get(label, 0)
            kept = conformal["class_scores"][prior].get(label, ())
            threshold = score_threshold(kept, own, coverage)
        # As the thresholds are rounded up to six decimals, a score that is one of them is within.
        if 1 - scores[label] / total <= threshold:
            found.append(label)
    return found


def set_of(
    config: Any,
    scores: Mapping[str, float],
    prior: str = "balanced",
    function_to_apply: str = "softmax",
    coverage: float | None = None,
    coverage_by_class: bool = False,
) -> list[str] | None:
    """`prediction_set` of a system's scores; None where none was asked for and the system cannot have any.

    Args:
        config: the system's configuration.
        scores: of all its labels, or of none, to see whether the options can be had.
        prior, function_to_apply, coverage, coverage_by_class: as the pipeline takes them. Logits ("none") are taken
            for those of the balanced prior.

    Raises:
        ValueError: a coverage outside (0, 1), or one asked of a system without calibration scores for it.
    """
    if coverage is not None:
        share_of("coverage", coverage)
    if function_to_apply == "none":
        prior, greatest = "balanced", max(scores.values(), default=0.0)
        scores = {label: math.exp(score - greatest) for label, score in scores.items()}
    conformal = getattr(config, "conformal", None)
    if conformal is None or prior not in conformal["scores"]:
        if coverage is None and not coverage_by_class:
            return None
        what = "any" if conformal is None else f"the {prior} prior's"
        raise ValueError(
            f"A coverage was asked for, and this system has no calibration scores for {what} prediction sets: fit "
            "them on clips that it was not trained on, with sailer calibrate MODEL --corpus NAME --data_dir DIR."
        )
    scored = {label: scores[label] for label in config.scored_labels if scores}
    return prediction_set(scored, conformal, prior, COVERAGE if coverage is None else coverage, coverage_by_class)


def check_conformal(conformal: Any, labels: Sequence[str]) -> dict[str, Any] | None:
    """A configuration's calibration scores as they are.

    Raises:
        ValueError: they are not of the form that `sailer.training.conformal.fit_conformal` gives, or of other labels.
    """
    if conformal is None:
        return None
    try:
        wanted = {"clips": conformal["clips"], **conformal["class_clips"]}
        unknown = set(conformal["class_clips"]) - set(labels)
        if unknown:
            raise ValueError(f"it speaks of {sorted(unknown)}, and the labels are {list(labels)}")
        for prior, scores in conformal["scores"].items():
            for name, kept in {"clips": scores, **conformal["class_scores"][prior]}.items():
                whole = all(isinstance(score, int | float) and 0 <= score <= 1 for score in kept)
                if not whole or list(kept) != sorted(kept) or not 0 < len(kept) <= count_of("clips", wanted[name], 1):
                    raise ValueError(f"the {prior} scores of {name} are not ascending numbers from 0 to 1")
        if "balanced" not in conformal["scores"]:
            raise ValueError("it has no balanced scores")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"conformal is not what calibration gives ({reason}): fit it with sailer calibrate, or set it to null."
        ) from error
    return dict(conformal)


class Speakers(Mapping[str, SpeakerStatistics]):
    """The speakers that a system knows, by name; they hold for that system and its choice of layers alone.

    Args:
        model: a `SailerForAudioClassification` with a `SpeakerReference`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._known: dict[str, SpeakerStatistics] = {}

    def __getitem__(self, name: str) -> SpeakerStatistics:
        return self._known[name]

    def __setitem__(self, name: str, statistics: SpeakerStatistics) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"A speaker's name is {name!r}; give some text.")
        self._known[name] = statistics

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def forget(self) -> None:
        """All of them: their deviations are from a mean voice that holds no longer."""
        self._known.clear()

    def save(self, path: str | os.PathLike) -> None:
        """Write them as safetensors: the sums (speakers, width) and (speakers, labels), the counts (speakers,), and
        the names in its header."""
        names, (labels, width) = list(self._known), reference_of(self._model).offsets.shape
        tensors = {
            "total": torch.stack([torch.zeros(width), *(self._known[name].total for name in names)])[1:],
            "emotions": torch.stack([torch.zeros(labels), *(self._known[name].emotions for name in names)])[1:],
            "count": torch.tensor([self._known[name].count for name in names], dtype=torch.long),
        }
        beside = f"{os.fspath(path)}.{os.getpid()}.partial"
        try:
            save_file(tensors, beside, metadata={"names": json.dumps(names), "system": fingerprint(self._model)})
            os.replace(beside, path)
        finally:
            if os.path.exists(beside):
                os.remove(beside)

    def load(self, path: str | os.PathLike) -> None:
        """Read what `save` wrote, beside the speakers that are known; of one name the read one holds.

        Raises:
            ValueError: no such file of statistics, or one of another system, layer choice or mean voice.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                facts = stored.metadata() or {}
                names, system = json.loads(facts["names"]), facts["system"]
                total, emotions = stored.get_tensor("total"), stored.get_tensor("emotions")
                count = stored.get_tensor("count").tolist()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as statistics of speakers ({error}).") from error
        if system != fingerprint(self._model):
            raise ValueError(
                f"{path} holds speakers of another system, layer choice or mean voice: they mean nothing to this one. "
                "Adapt to their recordings again."
            )
        for name, *known in zip(names, total, emotions, count, strict=True):
            self[name] = SpeakerStatistics(*known)


def recording_means(clips: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Means of recordings' speech (recordings, width) and their emotions' probabilities (recordings, labels), None
    without such a head: over their windows, by duration.

    Args:
        clips: of `SpeechEmotionPipeline.encode`, none of which has an error.
    """
    means, probabilities = [], []
    for clip in clips:
        shares = torch.tensor([end - start for start, end in clip.timestamps])
        shares = shares / shares.sum()
        rows = [clip.outputs[index] for index in range(len(clip.timestamps))]
        means.append(shares @ torch.stack([row["speech_means"].float() for row in rows]))
        if "logits" in rows[0]:
            probabilities.append(shares @ torch.stack([row["logits"].float().softmax(-1) for row in rows]))
    return torch.stack(means), torch.stack(probabilities) if probabilities else None


def with_speakers(items: Iterable[Any], speaker: Any) -> Iterator[tuple[Any, Any]]:
    """Each item with its speaker: the one of all, or its own of a list; raises ValueError where those differ in
    number."""
    if not isinstance(speaker, (list, tuple)):
        yield from ((item, speaker) for item in items)
        return
    count = 0
    for count, item in enumerate(items, 1):
        if count > len(speaker):
            break
        yield item, speaker[count - 1]
    if count != len(speaker):
        raise ValueError(f"speaker names {len(speaker)} speakers, and there are {count} inputs or more.")


def shifts_of(clips: Iterable[Any]) -> dict[str, torch.Tensor]:
    """The model's `speaker_shift` of a batch: zeros for clips of no known speaker; none where all are such."""
    shifts = [clip.speaker_shift for clip in clips]
    known = next((shift for shift in shifts if shift is not None), None)
    if known is None:
        return {}
    nothing = torch.zeros_like(known)
    return {"speaker_shift": torch.stack([nothing if shift is None else shift for shift in shifts])}


class KnowsSpeakers:
    """Of the pipeline: what it knows of speakers, and how it learns that."""

    model: Any
    encode: Callable[..., Iterator[Any]]

    @property
    def speakers(self) -> Speakers:
        """The speakers that were adapted to; `save` and `load` keep them in a file."""
        if not hasattr(self, "_speakers"):
            self._speakers = Speakers(self.model)
        return self._speakers

    def adapt(self, recordings: Iterable[Any], name: str, **options: Any) -> SpeakerStatistics:
        """Learn a speaker's voice; `speaker=name` in a call then uses it.

        Args:
            recordings: of that speaker, in any form that the pipeline takes; three help, twenty help more. They need
                no labels, and are best of several emotions. One that cannot be used is left out, with a warning.
            name: what the speaker is called; who had it before is forgotten.
            options: `batch_size`, `num_workers`, and those of `encode`.

        Returns:
            What is known of the speaker now: `count` recordings.

        Raises:
            ValueError: none of the recordings can be used, or the system has no mean voice to compare with.
        """
        reference = reference_of(self.model)
        means, probabilities, _ = self._heard(recordings, f"speaker {name!r}", options)
        self.speakers[name] = reference.statistics(means, probabilities)
        return self.speakers[name]

    def learn_mean_voice(self, recordings: Iterable[Any], speakers: Iterable[str], **options: Any) -> None:
        """Learn what speakers are compared with, from recordings of several; systems that sailer trained know it.

        It becomes part of the model, and is saved with it; speakers who were adapted to before are forgotten.

        Args:
            recordings: of at least four speakers, several of each and best of all emotions; without labels.
            speakers: of each recording.
            options: `batch_size`, `num_workers`, and those of `encode`.

        Raises:
            ValueError: fewer speakers, or a system that cannot be adapted (the message says why).
        """
        recordings, speakers = list(recordings), list(speakers)
        if len(recordings) != len(speakers):
            raise ValueError(f"{len(recordings)} recordings have {len(speakers)} speakers: name one for each.")
        check_adaptable(self.model)
        means, probabilities, usable = self._heard(recordings, "the mean voice", options)
        set_reference(self.model, means, probabilities, [speakers[row] for row in usable])
        self.speakers.forget()

    def speaker_of(self, speaker: Any, item: Any, key: str | None) -> torch.Tensor | None:
        """What is taken off one recording's frames (width,).

        Args:
            speaker: the name of a speaker, statistics, or None.
            item: the recording, which names its speaker itself under `key`, if that is not None.

        Raises:
            ValueError: a speaker who is not known, or an input without the key.
        """
        if key is not None:
            if not isinstance(item, Mapping) or key not in item:
                raise ValueError(f"speaker_key is {key!r}: pass {{'audio': ..., {key!r}: the speaker's name}}.")
            speaker = item[key]
        if speaker is None or speaker == "":
            return None
        if isinstance(speaker, SpeakerStatistics):
            return reference_of(self.model).shift(speaker)
        reference = reference_of(self.model)
        if speaker not in self.speakers:
            known = ", ".join(sorted(self.speakers)[:10]) or "nobody yet"
            raise ValueError(
                f"The speaker {speaker!r} is not known: adapt to their recordings first (known: {known})."
            )
        return reference.shift(self.speakers[speaker])

    def _heard(
        self, recordings: Iterable[Any], whose: str, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
        """`recording_means` of those that can be used, and their places."""
        usable, clips, reason = [], [], "there is none"
        # As they are, without the speaker that this pipeline may have been made for.
        for place, clip in enumerate(self.encode(recordings, **{**options, "speaker": None, "speaker_key": None})):
            if clip.error is None:
                usable.append(place)
                clips.append(clip)
            else:
                reason = clip.message
                logger.warning("Recording %d of %s is left out: %s", place, whose, reason)
        if not clips:
            raise ValueError(f"No recording of {whose} can be used ({reason}).")
        return *recording_means(clips), usable


__all__ = [
    *("COVERAGE", "ITEM_ERRORS", "Clip", "at_least", "check_conformal", "count_of", "cut_windows", "kept_scores"),
    *("prediction_set", "run_ahead", "score_threshold", "set_of", "share_of"),
    *("KnowsSpeakers", "Speakers", "recording_means", "shifts_of", "with_speakers"),
]
