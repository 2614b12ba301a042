"""Mixes of toy waveforms, sample by sample, and clips that cannot be rendered."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from sailer.data.rendering import mix, play_at, render, rendering_key, transcript_of
from sailer.data.schema import CorpusError


def ramp(start, length):
    return np.arange(start, start + length, dtype=np.float32) / 100


def wav(samples, rate=16000):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return {"path": None, "bytes": file.getvalue()}


def clip(name, samples, transcript="", rate=16000):
    return {"id": name, "audio": wav(samples, rate), "transcript": transcript}


def planned(first, second, gap):
    return {"clips": [first, second], "gap": gap}


def test_silence_between():
    first, second = ramp(1, 3), ramp(10, 2)
    np.testing.assert_array_equal(mix(first, second, 4), [*first, 0, 0, 0, 0, *second])


def test_no_gap():
    np.testing.assert_array_equal(mix(ramp(1, 3), ramp(10, 2), 0), [*ramp(1, 3), *ramp(10, 2)])


def test_overlap_is_summed_where_they_meet():
    mixed = mix(ramp(1, 4), ramp(10, 3), -2)
    np.testing.assert_allclose(mixed, [0.01, 0.02, 0.03 + 0.10, 0.04 + 0.11, 0.12], rtol=1e-6)


def test_overlap_longer_than_the_first_clip():
    mixed = mix(ramp(1, 2), ramp(10, 5), -30)
    np.testing.assert_allclose(mixed, [0.11, 0.13, 0.12, 0.13, 0.14], rtol=1e-6)


def test_overlap_longer_than_the_second_clip_ends_with_the_first():
    mixed = mix(ramp(10, 5), ramp(1, 2), -30)
    np.testing.assert_allclose(mixed, [0.10, 0.11, 0.12, 0.14, 0.16], rtol=1e-6)


def test_over_the_limit_both_clips_are_cropped_to_half_of_the_speech():
    first, second = ramp(1, 10), ramp(20, 10)
    np.testing.assert_array_equal(mix(first, second, 2, limit=8), [*first[:3], 0, 0, *second[:3]])
    np.testing.assert_array_equal(mix(first, second, 2, limit=9), [*first[:4], 0, 0, *second[:3]])


def test_a_short_clip_leaves_its_share_to_the_other():
    first, second = ramp(1, 10), ramp(20, 2)
    np.testing.assert_array_equal(mix(first, second, 1, limit=8), [*first[:5], 0, *second])
    np.testing.assert_array_equal(mix(second, first, 1, limit=8), [*second, 0, *first[:5]])


def test_an_overlap_counts_twice_in_the_shares():
    first, second = ramp(1, 10), ramp(20, 10)
    mixed = mix(first, second, -2, limit=8)
    np.testing.assert_allclose(
        mixed, [*first[:3], first[3] + second[0], first[4] + second[1], *second[2:5]], rtol=1e-6
    )


def test_an_overlap_longer_than_the_limit():
    first, second = ramp(1, 10), ramp(20, 10)
    np.testing.assert_allclose(mix(first, second, -9, limit=4), first[:4] + second[:4], rtol=1e-6)


lengths, gaps = st.integers(1, 40), st.integers(-30, 30)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(lengths, lengths, gaps, st.integers(32, 60) | st.none())
def test_length_and_shares(n1, n2, gap, limit):
    mixed = mix(np.full(n1, 0.25, np.float32), np.full(n2, 0.5, np.float32), gap, limit)
    whole = n1 + n2 + max(gap, -n1, -n2)
    assert len(mixed) == (whole if limit is None else min(whole, limit))
    speech = len(mixed) - max(gap, -n1, -n2)
    heard_first = np.isin(mixed, [0.25, 0.75]).sum()
    heard_second = np.isin(mixed, [0.5, 0.75]).sum()
    assert heard_first >= min(n1, speech // 2) and heard_second >= min(n2, speech // 2)


def test_peaks_over_full_scale_scale_the_whole_mix_down():
    first, second = np.array([0.5, 0.9], np.float32), np.array([0.9, -0.3], np.float32)
    mixed = mix(first, second, -1)
    np.testing.assert_allclose(mixed, np.array([0.5, 1.8, -0.3]) / 1.8, rtol=1e-6)
    assert mixed.dtype == np.float32
    np.testing.assert_array_equal(mix(first, second, 1), [0.5, np.float32(0.9), 0, np.float32(0.9), np.float32(-0.3)])


def test_a_limit_without_room():
    with pytest.raises(ValueError, match="no room for two clips around 5 samples of silence"):
        mix(ramp(1, 3), ramp(1, 3), 5, limit=6)
    np.testing.assert_array_equal(mix(ramp(1, 3), ramp(2, 3), 5, limit=7), [ramp(1, 1)[0], *[0] * 5, ramp(2, 1)[0]])
    with pytest.raises(ValueError, match="at most 1 samples has no room for two clips around -5 samples"):
        mix(ramp(1, 3), ramp(1, 3), -5, limit=1)


def test_render_one_clip_and_a_mix():
    quiet, loud = np.full(3200, 0.1, np.float32), np.full(4800, 0.5, np.float32)
    a, b = clip("a", quiet), clip("b", loud)
    np.testing.assert_array_equal(render(a, 16000, 15), quiet)
    assert len(render(b, 16000, 0.25)) == 4000
    silence = render(planned(a, b, 0.1), 16000, 15)
    np.testing.assert_array_equal(silence, [*quiet, *np.zeros(1600), *loud])
    overlap = render(planned(b, a, -0.1), 16000, 15)
    assert len(overlap) == 3200 + 4800 - 1600
    np.testing.assert_allclose(overlap[3200:4800], 0.6, rtol=1e-6)
    assert len(render(planned(a, b, 0.1), 16000, 0.3)) == 4800


def test_clips_of_other_rates_are_resampled_before_mixing():
    mixed = render(planned(clip("a", np.zeros(1600), rate=8000), clip("b", np.zeros(1600)), 0.1), 16000, 15)
    assert len(mixed) == 3200 + 1600 + 1600


def test_transcripts_join_in_playing_order():
    a, b, silent = (clip(name, np.zeros(1), text) for name, text in (("a", "Hello."), ("b", "Go away!"), ("c", " ")))
    assert transcript_of(a) == "Hello."
    assert transcript_of(planned(b, a, 0.5)) == "Go away! Hello."
    assert transcript_of(planned(silent, a, 0.5)) == "Hello."
    assert transcript_of({**planned(b, a, 0.5), "drop_text": True}) == ""


def test_key_tells_apart_what_sounds_different():
    a, b = clip("a", np.zeros(1)), clip("b", np.zeros(1))
    items = [a, b, planned(a, b, 0.5), planned(b, a, 0.5), planned(a, b, -0.5)]
    assert len({rendering_key(item) for item in items}) == len(items)
    assert rendering_key({"clips": [a], "gap": 0.0}) == rendering_key(a) == ("a",)
    assert rendering_key(planned(b, a, -0.5)) == ("b", "a", -0.5)


def test_a_clip_of_just_the_shortest_length_is_rendered():
    assert len(render(clip("short", np.zeros(1600)), 16000, 15)) == 1600


def test_clips_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(CorpusError, match=r"'tiny' is 0\.010 s long; the minimum is 0\.1 s"):
        render(planned(clip("fine", np.zeros(3200)), clip("tiny", np.zeros(160)), 0.5), 16000, 15)
    missing = {"id": "gone", "audio": {"path": str(tmp_path / "gone.wav"), "bytes": None}, "transcript": ""}
    with pytest.raises(CorpusError, match=r"Clip 'gone' cannot be read: .*gone\.wav"):
        render(missing, 16000, 15)
    damaged = {"id": "noise", "audio": {"path": None, "bytes": b"RIFFxxxx"}, "transcript": ""}
    with pytest.raises(CorpusError, match="Clip 'noise' cannot be read"):
        render(damaged, 16000, 15)


@pytest.mark.parametrize("speed", [0.8, 0.95, 1.25])
def test_a_speed_changes_length_and_pitch_together(speed):
    tone = np.sin(2 * np.pi * 400 * np.arange(16000) / 16000).astype(np.float32)
    played = play_at(tone, speed, 16000)
    assert played.dtype == np.float32 and abs(len(played) - 16000 / speed) <= 1
    spectrum = np.abs(np.fft.rfft(played * np.hanning(len(played))))
    assert spectrum.argmax() * 16000 / len(played) == pytest.approx(400 * speed, abs=2)
    middle = played[4000:8000]
    assert np.abs(middle).max() == pytest.approx(1, abs=0.01), "and not its loudness"


def test_a_clip_is_played_no_faster_than_it_can_be_heard():
    tone = np.sin(np.arange(1700)).astype(np.float32)
    assert len(play_at(tone, 1.25, 16000)) == 1600
    assert len(play_at(tone[:1600], 1.25, 16000)) == 1600
    assert play_at(tone, 1.0, 16000) is tone


def test_an_item_is_played_at_its_speed():
    noise = np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32)
    one, other = clip("a", noise[:16000]), clip("b", noise[16000:24000])
    item = planned(one, other, 0.5)
    whole = render(item, 16000, 15.0)
    faster = render({**item, "speed": 1.2}, 16000, 15.0)
    np.testing.assert_array_equal(faster, play_at(whole, 1.2, 16000))
    slower = render({**item, "speed": 0.8}, 16000, 2.2)
    assert len(slower) == 35200, "what is longer than the longest is cut"
    np.testing.assert_allclose(slower[:30000], play_at(whole, 0.8, 16000)[:30000], atol=1e-4)


def test_another_speed_is_heard_as_another_clip():
    one, other = clip("a", ramp(0, 2000)), clip("b", ramp(0, 2000))
    items = [one, {"clips": [one], "gap": 0.0, "speed": 1.1}, planned(one, other, 0.5)]
    items += [{**planned(one, other, 0.5), "speed": speed} for speed in (1.1, 0.9)]
    assert len({rendering_key(item) for item in items}) == 5
    assert rendering_key({"clips": [one], "gap": 0.0, "speed": 1.0}) == rendering_key(one)
