"""The page's speaker tab without a browser: what it learns of recordings, what it shows, and that no voice stays."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import soundfile
import torch

import sailer
from sailer.inference.page import PageSettings
from sailer.inference.page_parts import panels
from sailer.inference.page_parts.judging import PageError, System, hear_file
from sailer.inference.page_parts.speaker_tab import MOST_RECORDINGS, some_of, voice_of, why_not

from .page_server import running_page
from .scores import assert_same, difference
from .sounds import RATE, noise

FOUR = ["anna", "bert", "carl", "dora"]


@pytest.fixture(scope="module")
def voiced(tiny_speech_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system that knows the mean voice."""
    folder = tmp_path_factory.mktemp("systems") / "voiced"
    shutil.copytree(tiny_speech_sailer, folder)
    classifier = sailer.load(tiny_speech_sailer)
    classifier.learn_mean_voice([noise(0.5 + 0.1 * seed, seed) for seed in range(8)], FOUR * 2)
    classifier.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def system(voiced: Path) -> System:
    return System("it", sailer.load(voiced))


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uploads")
    for seed in range(4):
        soundfile.write(folder / f"{seed}.wav", noise(1.0 + seed / 4, 20 + seed), RATE, subtype="FLOAT")
    soundfile.write(folder / "long.wav", noise(5.0, 3), RATE)
    soundfile.write(folder / "blink.wav", noise(0.05, 3), RATE)
    (folder / "<b>broken.wav").write_bytes(b"RIFF\x00\x01not a wave file at all")
    return folder


@pytest.fixture(scope="module")
def settings() -> PageSettings:
    return PageSettings(["it"], max_minutes=4 / 60)


def test_the_voice_is_what_adapt_learns_and_stays_with_nobody(voiced, system, settings, uploads) -> None:
    files = [uploads / f"{seed}.wav" for seed in (1, 2, 3)]
    voice, rows = voice_of(files, system, settings, uploads)
    assert not system.classifier.speakers
    assert [(row["file"], row["seconds"], row["left out"]) for row in rows] == [
        *(("1.wav", 1.25, ""), ("2.wav", 1.5, ""), ("3.wav", 1.75, ""))
    ]
    other = sailer.load(voiced)
    expected = other.adapt(map(str, files), name="her")
    assert voice.count == expected.count == 3 and torch.allclose(voice.total, expected.total, atol=1e-6)
    heard, _, _ = hear_file(uploads / "0.wav", system, settings.limits, "balanced", speaker=voice)
    plain, _, _ = hear_file(uploads / "0.wav", system, settings.limits, "balanced")
    theirs = other(str(uploads / "0.wav"), speaker="her", return_all=True)
    assert_same(heard["primary"], theirs["primary"])
    assert difference(heard["primary"], plain["primary"]) > 1e-3


def test_recordings_that_cannot_be_used_are_named_with_the_reason(system, settings, uploads, tmp_path) -> None:
    secret = tmp_path / "secret.wav"
    shutil.copy(uploads / "0.wav", secret)
    names = ["1.wav", "<b>broken.wav", "long.wav", "blink.wav", "gone.wav"]
    voice, rows = voice_of([*(uploads / name for name in names), secret], system, settings, uploads)
    alone, _ = voice_of([uploads / "1.wav"], system, settings, uploads)
    assert voice.count == 1 and torch.equal(voice.total, alone.total)
    reasons = {row["file"]: row["left out"] for row in rows}
    assert list(reasons) == [*names, "secret.wav"] and reasons["1.wav"] == ""
    assert "longer than 4 seconds" in reasons["long.wav"] and "50 ms" in reasons["blink.wav"]
    assert "no longer here" in reasons["gone.wav"] and "not uploaded to this page" in reasons["secret.wav"]
    assert reasons["<b>broken.wav"].startswith("<b>broken.wav")
    with pytest.raises(PageError, match=r"None of the recordings of the speaker can be used: <b>broken.wav"):
        voice_of([uploads / "<b>broken.wav"], system, settings, uploads)
    with pytest.raises(PageError, match="21 recordings of the speaker; this page takes 20"):
        some_of(["a.wav"] * (MOST_RECORDINGS + 1))


def test_before_and_after_stand_beside_each_other_with_what_changes() -> None:
    def result(happy: float, arousal: float) -> dict:
        rows = sorted([("Happy", happy), ("<i>", 1 - happy)], key=lambda row: -row[1])
        attributes = {"arousal": arousal, "valence": 0.5, "dominance": 0.5}
        primary = [{"label": label, "score": score} for label, score in rows]
        return {"label": primary[0]["label"], "primary": primary, "attributes": attributes}

    recordings = [
        {"file": "a.wav", "seconds": 1.5, "left out": ""},
        {"file": "<b>.wav", "seconds": None, "left out": "it is no audio"},
    ]
    shown = panels.adapted(result(0.3, 0.25), result(0.75, 0.5), "natural", recordings)
    assert "Adapted to 1 recording of the speaker; 1 could not be used" in shown
    assert "<i>" not in shown and "<b>" not in shown and "it is no audio" in shown
    before, after = shown.index('aria-label="Before"'), shown.index('aria-label="After"')
    for place, side in ((before, shown[before:after]), (after, shown[after:])):
        # Both in the order of the scores before.
        assert side.index("&lt;i&gt;</span>") < side.index("Happy</span>"), place
    assert "<td>Happy</td><td>0.30</td><td>0.75</td><td>+0.45</td>" in shown
    assert "<td>arousal</td><td>0.25</td><td>0.50</td><td>+0.25</td>" in shown
    assert "The decision becomes Happy." in shown and "How annotators would vote" in shown


def test_a_system_that_cannot_be_adapted_is_told_with_the_way_out(tiny_speech_sailer: Path, system: System) -> None:
    assert why_not(system) == ""
    told = why_not(System("tiny", sailer.load(tiny_speech_sailer)))
    assert told.startswith("tiny cannot be adapted") and "learn_mean_voice(recordings, speakers)" in told
    assert "save_pretrained" in told


@pytest.mark.slow
def test_visitors_at_once_hear_their_own_speaker(voiced: Path, uploads: Path, system, settings, tmp_path) -> None:
    pytest.importorskip("gradio", reason="the extra page is not installed")
    from gradio_client import Client, handle_file

    courses = [([1, 2], 0), ([3], 0), ([0], 3), ([2, 0], 1)]

    def visit(address: str, course: tuple[list[int], int]) -> str:
        others, clip = (
            [handle_file(uploads / f"{n}.wav") for n in course[0]],
            handle_file(uploads / f"{course[1]}.wav"),
        )
        return Client(address, verbose=False, httpx_kwargs={"timeout": 120}).predict(
            others, clip, "balanced", api_name="/adapt"
        )

    with running_page(voiced, cwd=tmp_path) as (address, _), ThreadPoolExecutor(4) as visitors:
        shown = list(visitors.map(lambda course: visit(address, course), courses))
    for (others, clip), one in zip(courses, shown, strict=True):
        voice, rows = voice_of([uploads / f"{n}.wav" for n in others], system, settings, uploads)
        heard = [
            hear_file(uploads / f"{clip}.wav", system, settings.limits, "balanced", **options)[0]
            for options in ({}, {"speaker": voice})
        ]
        assert one == panels.adapted(*heard, "balanced", rows)
    assert len(set(shown)) == 4
