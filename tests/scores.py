"""Results of the pipeline, compared."""

import pytest


def scores(result: list[dict]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in result}


def assert_same(one: list[dict], other: list[dict], tolerance: float = 1e-5) -> None:
    assert scores(one) == pytest.approx(scores(other), abs=tolerance)


def difference(one: list[dict], other: list[dict]) -> float:
    """By how much the scores of a label differ at most."""
    one, other = scores(one), scores(other)
    return max(abs(one[label] - other[label]) for label in one)
