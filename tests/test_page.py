"""The page's parts without a browser: results and windows, files that are refused, the sweep, and its queue."""

import csv
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sailer
from sailer.cli import main
from sailer.inference.page import PageSettings, sweep
from sailer.inference.page_parts import panels
from sailer.inference.page_parts.judging import (
    Limits,
    PageError,
    System,
    difference,
    hear_file,
    judge,
    windows_over,
)
from sailer.inference.page_parts.recording_tab import checked_upload, playable, written

from .page_server import running_page
from .sounds import RATE, noise


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clips") / "<b>five.wav"
    soundfile.write(file, noise(5.0, 3), RATE, subtype="FLOAT")
    return file


@pytest.fixture(scope="module")
def system(tiny_speech_sailer: Path) -> System:
    return System("it", sailer.load(tiny_speech_sailer))


def test_the_whole_and_the_windows_are_the_pipelines(clip: Path, system: System) -> None:
    judged = judge(clip, [system], Limits())
    (opinion,) = judged.opinions
    assert opinion.timestamps == [(0.0, 3.0), (1.0, 4.0), (2.0, 5.0)]
    for prior in ("balanced", "natural"):
        expected = system.classifier(str(clip), return_all=True, prior=prior, return_embedding=False)
        assert opinion.whole[prior] == expected
        audio = soundfile.read(clip, dtype="float32")[0]
        second = system.classifier(audio[RATE : 4 * RATE], return_all=True, prior=prior)
        scores = {row["label"]: row["score"] for row in opinion.windows[prior][1]["primary"]}
        assert scores == pytest.approx({row["label"]: row["score"] for row in second["primary"]}, abs=1e-5)


@pytest.mark.parametrize(
    ("seconds", "window", "hop"), [(5, 3, 1), (240, 3, 1), (720, 3, 3), (1200, 5, 5), (3600, 15, 15), (7200, 15, 15)]
)
def test_long_recordings_get_fewer_and_longer_windows(seconds: float, window: float, hop: float) -> None:
    assert windows_over(seconds, Limits(), longest=15) == (window, hop)


def test_what_is_shown_is_escaped_and_has_only_the_systems_heads(clip: Path, system: System) -> None:
    judged = judge(clip, [system], Limits(), name="<script>alert(1)</script>.wav")
    judged.warning = "<img src=x onerror=alert(1)>"
    shown = panels.results(judged, "balanced")
    assert "<script" not in shown and "<img" not in shown and "&lt;img" in shown
    assert 'data-panel="timeline"' in shown and 'data-panel="plane"' not in shown


def test_a_wide_set_of_a_calibrated_system_is_called_unsure(clip: Path, tiny_speech_sailer: Path) -> None:
    system = System("it", sailer.load(tiny_speech_sailer))
    plain = judge(clip, [system], Limits())
    assert 'data-panel="set"' not in panels.results(plain, "balanced")
    scores = {row["label"]: row["score"] for row in plain.opinions[0].whole["balanced"]["primary"]}
    scored = sorted((scores[label] for label in system.classifier.model.config.scored_labels), reverse=True)
    total = sum(scored)
    # Thresholds between the second and third, and the third and fourth emotion.
    two, three = (1 - (scored[place] + scored[place + 1]) / 2 / total for place in (1, 2))
    shown = {}
    for name, number, threshold in (("two", 2, two), ("three", 3, three)):
        kept = {"clips": 100, "scores": {"balanced": [threshold] * 100}}
        system.classifier.model.config.conformal = kept | {"class_clips": {}, "class_scores": {"balanced": {}}}
        shown[name] = panels.results(judge(clip, [system], Limits()), "balanced")
        names = sorted(system.classifier.model.config.scored_labels, key=scores.__getitem__, reverse=True)
        listed = shown[name].partition('data-panel="set"')[2]
        assert [label for label in names if f"</span>{label}</li>" in listed] == names[:number]
    assert "unsure" not in shown["two"].lower()
    assert '<span class="sailer-unsure">unsure</span>' in shown["three"]
    assert "Unsure: 3 emotions are possible" in shown["three"]


def test_a_system_that_was_never_trained_on_speech_alone_says_so(tiny_sailer: Path, clip: Path) -> None:
    system = System("it", sailer.load(tiny_sailer))
    alone, told = judge(clip, [system], Limits()), judge(clip, [system], Limits(), "leave me alone")
    assert alone.warning.startswith("it was only trained with transcripts") and "type what is said" in alone.warning
    assert "type what is said" in panels.results(alone, "balanced") and told.warning is None
    assert "It was never trained on speech alone" in panels.results(told, "balanced")
    assert alone.rows("balanced")[0]["warning"] == alone.warning
    assert "--transcriber MODEL" in hear_file(clip, system, Limits(), "balanced")[2]
    system.classifier.model.config.text_dropout = 0.2
    assert judge(clip, [system], Limits()).warning is None and hear_file(clip, system, Limits(), "balanced")[2] is None
    shown = panels.results(judge(clip, [system], Limits(), "leave me alone"), "balanced")
    assert "Without the transcript the decision" in shown and "never trained" not in shown


def test_the_distance_of_two_systems_by_hand(clip: Path, system: System) -> None:
    one, other = (judge(clip, [system], Limits()).opinions[0] for _ in range(2))
    one.whole["natural"]["primary"] = [{"label": "Happy", "score": 0.7}, {"label": "Sad", "score": 0.3}]
    other.whole["natural"]["primary"] = [{"label": "Sad", "score": 0.5}, {"label": "Happy", "score": 0.5}]
    distance, rows = difference(one, other, "natural")
    assert distance == pytest.approx(0.2)
    assert sorted(rows) == [("Happy", 0.7, 0.5), ("Sad", 0.3, 0.5)]


def test_a_recording_beyond_the_limit_is_refused_with_the_way_out(clip: Path, system: System) -> None:
    with pytest.raises(PageError, match=r"longer than 4 seconds.*cut it, or run `sailer predict`"):
        judge(clip, [system], Limits(max_seconds=4))
    assert judge(clip, [system], Limits(max_seconds=5)).seconds == 5


def test_downloads_hold_a_row_and_a_row_per_window(clip: Path, system: System, tmp_path: Path) -> None:
    judged = judge(clip, [system], Limits())
    (row,) = csv.DictReader(written(judged, "csv", "balanced", tmp_path).open())
    assert float(row["seconds"]) == 5 and row["file"] == clip.name
    rows = list(csv.DictReader(written(judged, "windows", "balanced", tmp_path).open()))
    assert [(float(one["start"]), float(one["end"])) for one in rows] == [(0, 3), (1, 4), (2, 5)]
    assert written(judged, "png", "balanced", tmp_path).read_bytes().startswith(b"\x89PNG")


def test_only_uploads_are_read(clip: Path, tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (uploads / "link.wav").symlink_to(clip)
    for path in (clip, uploads / "link.wav", uploads / ".." / "a.wav", "http://127.0.0.1/a.wav", "/etc/passwd"):
        with pytest.raises(PageError, match="not uploaded to this page"):
            checked_upload(path, uploads)
    with pytest.raises(PageError, match="no longer here"):
        checked_upload(uploads / "gone.wav", uploads)
    assert checked_upload(clip, uploads, [clip]) == clip.resolve()


def test_what_browsers_do_not_play_becomes_a_wav(tmp_path: Path) -> None:
    file = tmp_path / "a.aiff"
    soundfile.write(file, noise(1.0), RATE)
    address = playable(file, tmp_path)
    copy = Path(address.removeprefix("gradio_api/file="))
    assert copy.suffix == ".wav" and copy.is_relative_to(tmp_path)
    assert len(soundfile.read(copy)[0]) == RATE


def test_the_sweep_removes_what_was_not_used_for_a_while(tmp_path: Path) -> None:
    for name in ("old/a.wav", "new/b.wav"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    before = time.time() - 100
    os.utime(tmp_path / "old" / "a.wav", (before, before))
    assert sweep(tmp_path, 60) == 1
    os.utime(tmp_path / "old", (before, before))
    sweep(tmp_path, 60)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b.wav", "new"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No system to show.*make demo"),
        (["nowhere/at_all"], "nowhere/at_all: no system there.*make demo"),
        (["a", "b", "c"], "3 systems"),
        (["a", "--max_minutes", "0"], "max_minutes is 0"),
        (["a", "--hop_s", "4"], "hop_s is 4"),
    ],
)
def test_what_the_page_cannot_begin_with(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    import re

    pytest.importorskip("gradio", reason="the extra page is not installed")
    assert main(["page", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_page_is_of_this_machine_alone_unless_told_otherwise() -> None:
    assert PageSettings(["a"]).host == "127.0.0.1"


@pytest.mark.slow
def test_visitors_through_the_api(tiny_speech_sailer: Path, clip: Path, tmp_path: Path) -> None:
    """Uploads, a queue, other files refused, an upload too large, and nothing left at the end."""
    pytest.importorskip("gradio", reason="the extra page is not installed")
    import httpx
    from gradio_client import Client, handle_file

    files = []
    for seed in range(4):
        files.append(tmp_path / f"visitor {seed}.wav")
        soundfile.write(files[-1], noise(1.0 + seed, seed), RATE, subtype="FLOAT")
    classifier = sailer.load(tiny_speech_sailer)
    place = tmp_path / "page"
    place.mkdir()
    with running_page(tiny_speech_sailer, "--max_megabytes", "1", cwd=place) as (address, process):
        client = Client(address, verbose=False, httpx_kwargs={"timeout": 120})
        jobs = [client.submit(handle_file(file), "balanced", api_name="/analyse") for file in files]
        for file, job in zip(files, jobs, strict=True):
            result = job.result(timeout=120)
            shown = next(part for part in map(str, result) if "sailer-results" in part)
            seconds = soundfile.info(file).duration
            assert f'data-end="{seconds:.4f}"' in shown
            label = classifier(str(file), return_all=True)["label"]
            assert f"<strong>{label}</strong>" in shown
        # Not through the client, which would upload the file first.
        (analyse,) = [one["id"] for one in client.config["dependencies"] if one["api_name"] == "analyse"]
        secret = {"path": str(clip), "meta": {"_type": "gradio.FileData"}}
        asked = {"data": [secret, "balanced"], "fn_index": analyse, "session_hash": "stranger"}
        joined = httpx.post(f"{address}gradio_api/queue/join", json=asked, timeout=60)
        told = joined.text
        if joined.status_code == 200:
            told = httpx.get(f"{address}gradio_api/queue/data?session_hash=stranger", timeout=60).text
        assert "sailer-results" not in told and "it was not uploaded by a user" in told
        assert httpx.get(f"{address}gradio_api/file={clip}").status_code in (403, 404)
        assert httpx.get(f"{address}gradio_api/file=/etc/passwd").status_code in (403, 404)
        big = np.zeros(2 * 2**20, np.uint8).tobytes()
        refused = httpx.post(f"{address}gradio_api/upload", files={"files": ("big.wav", big)}, timeout=60)
        assert refused.status_code == 413 and "maximum allowed size" in refused.text
        assert list(place.glob("sailer-page-*/uploads/*"))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert not list(place.glob("sailer-page-*"))
