"""A recording on its way through the pipeline: cut into windows, prepared ahead of the model, outputs as they come,
and at last the set of emotions that its scores leave possible."""

from __future__ import annotations

import math
import numbers
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

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
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(prepare, item))
            if len(pending) > workers + batch_size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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


__all__ = [
    *("COVERAGE", "ITEM_ERRORS", "Clip", "at_least", "check_conformal", "count_of", "cut_windows", "kept_scores"),
    *("prediction_set", "run_ahead", "score_threshold", "set_of", "share_of"),
]
