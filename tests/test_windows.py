"""Windows by hand, their properties over many lengths, and what is prepared ahead of the model."""

import itertools
import math
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sailer.windows_sailer import Clip, at_least, count_of, cut_windows, run_ahead


@pytest.mark.parametrize(
    ("samples", "chunk", "stride", "expected"),
    [
        (150, 15, None, [(0, 150)]),
        (151, 15, None, [(0, 150), (100, 151)]),
        (250, 15, None, [(0, 150), (100, 250)]),
        (320, 15, None, [(0, 150), (100, 250), (200, 320)]),
        (40, 2, 0, [(0, 20), (20, 40)]),
        (50, 2, 0, [(0, 20), (20, 40), (40, 50)]),
        (41, 2, 0, [(0, 20), (20, 40), (31, 41)]),  # the last one is made a second long
        (49, 2, 0, [(0, 20), (20, 40), (39, 49)]),
        (50, 3, (0.5, 1), [(0, 30), (15, 45), (30, 50)]),
        (50, 3, [1, 0.5], [(0, 30), (15, 45), (30, 50)]),
        (30, 2, 0.44, [(0, 20), (12, 30)]),  # 4.4 samples on each side are 4
        (30, 2, 0.46, [(0, 20), (10, 30)]),
        (11, 0.5, 0, [(0, 5), (5, 10), (6, 11)]),  # a chunk below a second: the last one is a chunk
        (7, 0.26, 0, [(0, 3), (3, 6), (4, 7)]),
        (5, 0, None, [(0, 5)]),
        (5, 0, 1, [(0, 5)]),
        (0, 15, None, [(0, 0)]),
    ],
)
def test_windows_by_hand(
    samples: int, chunk: float, stride: float | tuple | None, expected: list[tuple[int, int]]
) -> None:
    assert cut_windows(samples, 10, chunk, stride) == expected


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 60), st.integers(0, 20), st.integers(0, 20))
def test_windows_cover_every_sample_and_none_is_longer_than_a_chunk(
    samples: int, chunk: int, left: int, right: int
) -> None:
    if left + right >= chunk:
        with pytest.raises(ValueError, match=r"stride_length_s \(.* s\) leaves nothing of a window"):
            cut_windows(samples, 1, chunk, (left, right))
        return
    windows = cut_windows(samples, 1, chunk, (left, right))
    assert windows[0][0] == 0 and windows[-1][1] == samples
    for (start, end), (next_start, next_end) in itertools.pairwise(windows):
        assert end - start == chunk and end < next_end
        assert next_start <= end - left - right, "both strides are shared"
    assert 1 <= windows[-1][1] - windows[-1][0] <= chunk


def test_lengths_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="chunk_length_s is -1; it must be at least 0"):
        cut_windows(10, 10, -1, None)
    for stride in (-0.1, (-0.1, 0), (0, -0.1)):
        with pytest.raises(ValueError, match=r"stride_length_s is -0\.1; it must be at least 0"):
            cut_windows(10, 10, 2, stride)
    for strides in ((), (1,), (0.1, 0.1, 0.1)):
        with pytest.raises(ValueError, match=r"stride_length_s is \(.*give one number of seconds, or two"):
            cut_windows(10, 10, 2, strides)
    with pytest.raises(ValueError, match=r"stride_length_s \(1 and 1 s\) leaves nothing of a window of 2 s"):
        cut_windows(10, 10, 2, 1)


def test_at_least() -> None:
    assert at_least("top_k", 1, 1) == 1 and at_least("stride_length_s", 2.5, 1) == 2.5
    for value in (0.99, math.nan, math.inf, "2", None):
        with pytest.raises(ValueError, match=f"stride_length_s is {value!r}; it must be at least 1"):
            at_least("stride_length_s", value, 1)


def test_count_of() -> None:
    assert count_of("top_k", 1, 1) == 1 and count_of("top_k", np.int64(2), 1) == 2
    for value in (2.0, math.nan, "2", None):
        with pytest.raises(ValueError, match=f"top_k is {value!r}; it must be a whole number"):
            count_of("top_k", value, 1)
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        count_of("top_k", 0, 1)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("The audio is empty."), "The audio is empty."),
        (FileNotFoundError("No such audio file: a.wav"), "No such audio file: a.wav"),
        (ValueError(), "ValueError: "),
        (MemoryError("too much"), "MemoryError: too much"),
    ],
)
def test_a_clips_message_says_what_was_wrong(error: Exception, message: str) -> None:
    assert Clip(error=error).message == message


def test_a_clip_is_done_when_every_window_has_its_output() -> None:
    clip = Clip(timestamps=[(0, 1), (1, 2)])
    assert not clip.is_done
    clip.outputs[1] = {"logits": torch.zeros(9)}
    assert not clip.is_done
    clip.outputs[0] = {"logits": torch.zeros(9)}
    assert clip.is_done
    assert Clip(timestamps=[(0, 1)], error=ValueError("no audio")).is_done, "there is nothing to wait for"
    assert Clip().outputs is not Clip().outputs


@pytest.mark.parametrize(("workers", "batch_size", "ahead"), [(0, 4, 1), (1, 1, 3), (2, 4, 7)])
def test_items_are_prepared_in_order_and_only_so_far_ahead(workers: int, batch_size: int, ahead: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for index in range(12):
            taken.append(index)
            yield index

    prepared = run_ahead(lambda index: Clip(text=str(index)), items(), workers, batch_size)
    assert taken == []
    assert next(prepared).text == "0"
    assert len(taken) == ahead
    assert [clip.text for clip in prepared] == [str(index) for index in range(1, 12)]


def test_workers_prepare_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=30)

    def prepare(index: int) -> Clip:
        together.wait()  # passes only once three wait here
        return Clip(text=str(index))

    assert [clip.text for clip in run_ahead(prepare, range(6), workers=3, batch_size=1)] == list("012345")
    with pytest.raises(threading.BrokenBarrierError):
        together.abort()
        next(run_ahead(prepare, range(3), workers=0, batch_size=1))


def test_one_that_is_given_up_waits_for_nobody() -> None:
    # Python's garbage collector gives it up after an error, at any moment: a wait could then stop everything.
    done, begun = threading.Event(), time.monotonic()

    def prepare(index: int) -> Clip:
        assert index == 0 or done.wait(10)
        return Clip(text=str(index))

    prepared = run_ahead(prepare, itertools.count(), workers=2, batch_size=1)
    assert next(prepared).text == "0"
    prepared.close()
    elapsed = time.monotonic() - begun
    done.set()
    assert elapsed < 5
