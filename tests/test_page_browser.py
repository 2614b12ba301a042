"""The page in a real browser: what a visitor sees, hears, clicks and takes away."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer.cli import main
from sailer.data.colours import colour_of

from .page_server import running_page
from .sounds import RATE, noise

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api", reason="the extra browser (Playwright) is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra browser is not installed")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_MS = 60_000
MICROPHONE_RATE = 48000
LABELS = ["Angry", "Contempt", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise", "Other"]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    pieces = [noise(2.0, seed) for seed in range(3)]
    soundfile.write(folder / "six seconds.wav", np.concatenate(pieces), RATE, subtype="FLOAT")
    soundfile.write(folder / "short.wav", noise(1.3, 7), RATE)
    (folder / "broken.wav").write_bytes(b"RIFF\x00\x01not a wave file at all")
    return folder


@pytest.fixture(scope="module")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the browser's microphone hears."""
    file = tmp_path_factory.mktemp("microphone") / "voice.wav"
    soundfile.write(file, np.repeat(np.concatenate([noise(4.0, 1), noise(4.0, 2)]), 3), MICROPHONE_RATE)
    return file


@pytest.fixture(scope="module")
def browser(microphone: Path) -> Iterator["playwright.Browser"]:
    if BROWSER is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as started:
        one = started.chromium.launch(
            executable_path=BROWSER, args=[*flags, f"--use-file-for-fake-audio-capture={microphone}"]
        )
        yield one
        one.close()


@pytest.fixture(scope="module")
def system(tiny_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every head, speech and text, as if trained without its transcripts at times, and on speakers that it knew."""
    import torch

    import sailer
    from sailer import SailerForAudioClassification

    folder = tmp_path_factory.mktemp("systems") / "system"
    shutil.copytree(tiny_sailer, folder)
    model = SailerForAudioClassification.from_pretrained(tiny_sailer)
    with torch.no_grad():
        for parameter in model.heads["primary"][-1].parameters():
            parameter /= 8  # without the texts that it was made for it would be sure of one emotion
    model.config.text_dropout = 0.2
    rows = {"balanced": [1.0] * 20, "natural": [0.0] * 20}  # all emotions are possible, or none is likely enough
    none = {"class_clips": {}, "class_scores": {"balanced": {}, "natural": {}}}
    model.config.conformal = {"clips": 20, "scores": rows} | none
    model.config.label_weights = [1.0 + place / 2 for place in range(len(LABELS))]
    model.save_pretrained(folder)
    classifier = sailer.load(folder)
    classifier.learn_mean_voice([noise(0.5 + 0.1 * seed, seed) for seed in range(8)], ["a", "b", "c", "d"] * 2)
    classifier.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(system: Path, browser: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_page(system, "--max_minutes", "61", cwd=tmp_path_factory.mktemp("page")) as (address, _):
        yield address


@pytest.fixture
def visit(browser: "playwright.Browser") -> Iterator[Callable]:
    """Opens a page; at the test's end nothing must have gone wrong in its console, nor have been asked of others."""
    troubles: list[str] = []
    contexts = []

    def open_page(address: str, width: int = 1280, query: str = "") -> "playwright.Page":
        context = browser.new_context(viewport={"width": width, "height": 900}, permissions=["microphone"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda told: told.type == "error" and troubles.append(f"console: {told.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        local = (address, "data:", "blob:")
        page.on("request", lambda sent: sent.url.startswith(local) or troubles.append(f"asked: {sent.url}"))
        page.goto(address + query)
        page.get_by_role("button", name="Analyse").wait_for()
        return page

    open_page.expected = ()  # what a test brings about itself
    yield open_page
    for context in contexts:
        context.close()
    assert [trouble for trouble in troubles if not trouble.endswith(open_page.expected or "\0")] == []


def upload(page: "playwright.Page", file: Path) -> None:
    """To the page's first file input; waits for the result or the message."""
    page.locator("input[type=file]").first.set_input_files(file)
    page.locator("#sailer-results .sailer-results, #sailer-results .sailer-error").first.wait_for()


def bars(page: "playwright.Page", panel: str = "distribution") -> dict[str, float]:
    entries = page.locator(f"[data-panel={panel}] .sailer-bars li").all()
    return {
        entry.locator(".sailer-name").inner_text(): float(entry.locator(".sailer-value").inner_text())
        for entry in entries
    }


def violations(page: "playwright.Page") -> list[tuple[str, str]]:
    """Serious accessibility violations that axe-core finds, and where."""
    found = axe.Axe().run(page).response["violations"]
    return [
        (one["id"], node["html"][:200])
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def predicted(folder: Path, model: Path, file: Path, *options: str) -> list[dict[str, str]]:
    output = folder / "predictions.csv"
    assert main(["predict", str(model), str(file), "--output", str(output), *options]) == 0
    name = "predictions_timeline.csv" if "--timeline" in options else "predictions.csv"
    return list(csv.DictReader((folder / name).open(encoding="utf-8")))


def download(page: "playwright.Page", name: str, folder: Path) -> Path:
    with page.expect_download() as begun:
        page.get_by_role("button", name=name, exact=True).click()
    file = folder / begun.value.suggested_filename
    begun.value.save_as(file)
    return file


def assert_same_rows(ours: list[dict[str, str]], theirs: list[dict[str, str]]) -> None:
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for column, value in one.items():
            if column == "file":
                assert value == Path(other["file"]).name
            elif re.fullmatch(r"-?\d+\.\d+(e-\d+)?", value):
                assert float(value) == pytest.approx(float(other[column]), rel=2e-6, abs=2e-6), column
            else:
                assert value == other[column], column


def test_an_upload_is_shown_in_every_panel_of_the_systems_heads(visit, address, recordings) -> None:
    page = visit(address)
    upload(page, recordings / "six seconds.wav")
    panels = page.locator("[data-panel]").evaluate_all("all => all.map(one => one.dataset.panel)")
    assert panels == ["timeline", "distribution", "set", "plane", "secondary", "speaker"]
    scores = bars(page)
    assert sorted(scores) == sorted(LABELS) and sum(scores.values()) == pytest.approx(1, abs=0.05)
    fills = page.locator(".sailer-area").evaluate_all(
        "all => all.map(one => [one.dataset.label, one.attributes.fill.value])"
    )
    assert dict(fills) == {label: colour_of(label) for label in LABELS}
    assert len(bars(page, "secondary")) == 17 and set(bars(page, "plane")) == {"arousal", "valence", "dominance"}
    assert "not for hiring" in page.locator("#sailer-note").inner_text()
    assert violations(page) == []


def test_both_priors_and_the_downloads_are_what_predict_gives(visit, address, recordings, system, tmp_path) -> None:
    page = visit(address)
    file = recordings / "six seconds.wav"
    upload(page, file)
    shown = {}
    for prior in ("balanced", "natural"):
        page.get_by_label(prior).first.check()
        title = "How annotators would vote" if prior == "natural" else "Balanced scores"
        page.locator("[data-panel=distribution]", has_text=title).wait_for()
        shown[prior] = bars(page)
        folder = tmp_path / prior
        folder.mkdir()
        assert page.locator(".sailer-unsure").count() == (prior == "balanced")
        told = page.locator("[data-panel=set]").inner_text()
        assert ("Unsure: 8 emotions are possible" if prior == "balanced" else "No emotion is likely enough") in told
        (row,) = predicted(folder, system, file, "--prior", prior)
        assert shown[prior] == {label: round(float(row[label]), 2) for label in shown[prior]}
        ours = list(csv.DictReader(download(page, "CSV", folder / "ours").open(encoding="utf-8")))
        assert_same_rows(ours, [row])
        whole = json.loads(download(page, "JSON", folder / "ours").read_text(encoding="utf-8"))
        assert whole["prior"] == prior and whole["systems"][0]["row"]["label"] == row["label"]
        windows = [*("--chunk_length_s", "3", "--stride_length_s", "1", "--prior", prior, "--timeline")]
        theirs = predicted(folder / "windows", system, file, *windows)
        ours = list(csv.DictReader(download(page, "CSV over time", folder / "ours").open(encoding="utf-8")))
        assert_same_rows(ours, theirs)
    assert shown["balanced"] != shown["natural"]
    picture = download(page, "PNG", tmp_path)
    assert picture.name == "six seconds.png" and picture.read_bytes().startswith(b"\x89PNG")


def test_a_click_on_the_timeline_plays_that_window_and_the_cursor_follows(visit, address, recordings) -> None:
    page = visit(address)
    upload(page, recordings / "six seconds.wav")
    tracks = page.locator(".sailer-tracks")
    page.evaluate("document.querySelector('audio.sailer-player').muted = true")
    box = tracks.bounding_box()
    tracks.click(position={"x": box["width"] * 2.5 / 6, "y": 90})  # 2.5 s, in the middle of the window from 1 to 4 s
    playing = (
        "(() => { const audio = document.querySelector('audio.sailer-player'); return audio.currentTime > 1.2; })()"
    )
    page.wait_for_function(playing)
    heard = page.evaluate(
        """() => {
            const audio = document.querySelector('audio.sailer-player');
            const left = (name) => parseFloat(document.querySelector(name).style.left);
            return [audio.paused, audio.currentTime, left('.sailer-cursor'), left('.sailer-played')];
        }"""
    )
    assert heard[0] is False and 1.2 < heard[1] < 4
    assert heard[2] / 100 * 6 == pytest.approx(heard[1], abs=0.4)
    assert heard[3] == pytest.approx(100 / 6, abs=0.1)
    page.wait_for_function("document.querySelector('audio.sailer-player').paused")
    assert page.evaluate("document.querySelector('audio.sailer-player').currentTime") == pytest.approx(4, abs=0.35)
    page.get_by_text("Values over time").click()
    page.get_by_role("button", name="Play 3.0 to 6.0 seconds").click()
    page.wait_for_function("document.querySelector('audio.sailer-player').currentTime > 4.2")


def test_what_is_said_changes_the_result_and_what_it_changes_is_shown(visit, address, recordings) -> None:
    page = visit(address)
    upload(page, recordings / "short.wav")
    alone = bars(page)
    page.get_by_label("What is said").fill("leave <b>me</b> alone")
    page.get_by_role("button", name="Analyse").click()
    panel = page.locator("[data-panel=transcript]")
    panel.wait_for()
    assert bars(page) != alone
    assert "leave <b>me</b> alone" in panel.inner_text()
    rows = [row.split("\t") for row in panel.locator("tbody").inner_text().splitlines()]
    assert {label: float(without) for label, without, *_ in rows} == alone
    assert {label: float(with_text) for label, _, with_text, _ in rows} == bars(page)


def test_the_microphone_is_recorded_and_heard_live(visit, address) -> None:
    page = visit(address)
    page.get_by_role("tab", name="Live").click()
    page.locator("#sailer-live").get_by_role("button", name="Record").click()
    results = page.locator("#sailer-live-results")
    results.locator(".sailer-timeline").wait_for()
    page.wait_for_function(
        "JSON.parse(document.querySelector('#sailer-live-results .sailer-timeline').dataset.windows).length >= 3"
    )
    page.locator("#sailer-live").get_by_role("button", name="Stop").click()
    windows = json.loads(results.locator(".sailer-timeline").get_attribute("data-windows"))
    assert windows[:3] == [[0, 3], [1, 4], [2, 5]]
    assert violations(page) == []


def test_a_recording_by_microphone_is_judged_as_a_whole(visit, address) -> None:
    page = visit(address)
    page.locator("#sailer-audio").get_by_role("button", name="Record audio").click()
    page.locator("#sailer-audio").get_by_role("button", name="Record", exact=True).click()
    page.locator("#sailer-audio").get_by_role("button", name="Stop").wait_for()
    page.wait_for_timeout(2000)
    page.locator("#sailer-audio").get_by_role("button", name="Stop").click()
    page.locator("#sailer-results .sailer-results").wait_for()
    assert float(page.locator(".sailer-timeline").get_attribute("data-end")) > 1


def test_a_corrupt_file_gets_a_message_and_the_page_goes_on(visit, address, recordings) -> None:
    visit.expected = ("Waveform load error: MediaError",)  # Gradio's player cannot draw what is no audio
    page = visit(address)
    upload(page, recordings / "broken.wav")
    message = page.get_by_role("alert").inner_text()
    assert message.startswith("broken.wav") and "Traceback" not in message
    assert page.get_by_role("button", name="CSV", exact=True).is_disabled()
    page.reload()
    upload(page, recordings / "short.wav")
    assert sum(bars(page).values()) == pytest.approx(1, abs=0.05)


def test_a_folder_becomes_the_table_of_predict(visit, address, recordings, system, tmp_path) -> None:
    page = visit(address)
    page.get_by_role("tab", name="A folder").click()
    with page.expect_file_chooser() as chosen:
        page.get_by_role("button", name="Choose a folder").click()
    chosen.value.set_files(recordings)
    page.get_by_text("3 recordings among 3 files").wait_for()
    page.get_by_role("button", name="Judge the folder").click()
    table = page.locator("#sailer-folder-results table")
    table.wait_for()
    assert "1 could not be used" in table.inner_text()
    assert violations(page) == []
    ours = list(csv.DictReader(download(page, "CSV of the folder", tmp_path / "ours").open(encoding="utf-8")))
    main(["predict", str(system), str(recordings), "--output", str(tmp_path / "predictions.csv")])
    theirs = list(csv.DictReader((tmp_path / "predictions.csv").open(encoding="utf-8")))
    usable = [row for row in ours if not row["error"]]
    assert [row["file"] for row in ours if row["error"]] == ["broken.wav"]
    assert_same_rows(usable, [row for row in theirs if not row["error"]])


def test_a_speaker_is_adapted_to_and_the_clip_stands_before_and_after(visit, address, recordings, system) -> None:
    visit.expected = ("Waveform load error: MediaError",)
    page = visit(address)
    page.get_by_role("tab", name="A speaker").click()
    start, shown = page.get_by_role("button", name="Before and after"), page.locator("#sailer-speaker-results")
    start.click()
    shown.get_by_role("alert").filter(has_text="upload or record recordings of the speaker").wait_for()

    def choose(*names: str) -> None:
        with page.expect_file_chooser() as chosen:
            page.get_by_role("button", name="Choose recordings").click()
        chosen.value.set_files([recordings / name for name in names])
        page.get_by_text(f"{len(names)} chosen: {', '.join(names)}").wait_for()

    choose("broken.wav")
    page.locator("#sailer-speaker-clip input[type=file]").set_input_files(recordings / "short.wav")
    page.locator("#sailer-speaker-clip audio, #sailer-speaker-clip [data-testid*=waveform]").first.wait_for()
    start.click()
    shown.get_by_role("alert").filter(has_text="None of the recordings of the speaker can be used").wait_for()
    choose("broken.wav", "six seconds.wav")
    start.click()
    shown.locator(".sailer-results").wait_for()
    assert "Adapted to 1 recording of the speaker; 1 could not be used" in shown.inner_text()
    assert "broken.wav" in shown.get_by_role("region", name="Recordings of the speaker").inner_text()
    import sailer

    classifier = sailer.load(system)
    classifier.adapt([str(recordings / "six seconds.wav")], name="her")
    sides = [page.get_by_role("region", name=name) for name in ("Before", "After")]
    for side, options in zip(sides, ({}, {"speaker": "her"}), strict=True):
        rows = classifier(str(recordings / "short.wav"), return_all=True, **options)["primary"]
        scores = {
            entry.locator(".sailer-name").inner_text(): entry.locator(".sailer-value").inner_text()
            for entry in side.locator("[data-panel=primary] li").all()
        }
        assert scores == {row["label"]: f"{row['score']:.2f}" for row in rows}
    boxes = [side.bounding_box() for side in sides]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    assert violations(page) == []
    # One more by the microphone is one of the speaker's.
    microphone = page.locator("#sailer-speaker-microphone")
    microphone.get_by_role("button", name="Record", exact=True).click()
    microphone.get_by_role("button", name="Stop").wait_for()
    page.wait_for_timeout(1500)
    microphone.get_by_role("button", name="Stop").click()
    page.get_by_text("3 chosen: broken.wav, six seconds.wav").wait_for()
    start.click()
    shown.get_by_text("Adapted to 2 recordings of the speaker").wait_for()


def test_an_hour_is_heard_and_more_than_the_limit_is_refused(visit, address, tmp_path) -> None:
    hour, longer = tmp_path / "hour.flac", tmp_path / "longer.flac"
    second = np.round(noise(1.0) * 32767).astype(np.int16)
    for file, seconds in ((hour, 3600), (longer, 3700)):
        with soundfile.SoundFile(file, "w", RATE, 1, "PCM_16") as sound:
            for _ in range(seconds):
                sound.write(second)
    page = visit(address)
    page.locator("input[type=file]").first.set_input_files(longer)
    page.get_by_role("alert").filter(has_text="longer.flac is longer than 61 minutes").wait_for()
    page.reload()
    page.locator("input[type=file]").first.set_input_files(hour)
    timeline = page.locator(".sailer-timeline")
    timeline.wait_for(timeout=4 * PATIENCE_MS)
    assert float(timeline.get_attribute("data-end")) == pytest.approx(3600)
    assert 200 < len(json.loads(timeline.get_attribute("data-windows"))) <= 241


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_narrow_screen_scrolls_in_one_direction_in_light_and_dark(visit, address, recordings, theme) -> None:
    page = visit(address, width=360, query=f"?__theme={theme}")
    upload(page, recordings / "six seconds.wav")
    page.get_by_text("Values over time").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    red = int(re.search(r"\d+", background)[0])
    assert red < 60 if theme == "dark" else red > 200
    assert violations(page) == []


def test_two_systems_stand_side_by_side_with_what_differs(
    visit, system, tiny_speech_sailer, recordings, browser, tmp_path
) -> None:
    models = [system, tiny_speech_sailer]
    with running_page(*models, "--max_megabytes", "1", cwd=tmp_path) as (address, _):
        page = visit(address)
        soundfile.write(tmp_path / "large.wav", noise(40.0), RATE)  # 1.28 MB
        page.locator("input[type=file]").first.set_input_files(tmp_path / "large.wav")
        page.get_by_text("maximum allowed size").first.wait_for()
        page.reload()
        upload(page, recordings / "six seconds.wav")
        sections = page.locator(".sailer-system")
        assert sections.count() == 2
        boxes = [sections.nth(place).bounding_box() for place in range(2)]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
        panels = sections.nth(1).locator("[data-panel]").evaluate_all("all => all.map(one => one.dataset.panel)")
        assert panels == ["timeline", "distribution"]  # it has no other heads
        rows = page.locator("[data-panel=difference] table").first.locator("tbody tr").all()
        values = {
            cells[0]: [float(cell) for cell in cells[1:]] for cells in (row.inner_text().split("\t") for row in rows)
        }
        theirs = [
            {row["file"]: row for row in predicted(tmp_path / str(n), model, recordings / "six seconds.wav")}
            for n, model in enumerate(models)
        ]
        for n, rows_of_one in enumerate(theirs):
            (row,) = rows_of_one.values()
            assert {label: scores[n] for label, scores in values.items()} == {
                label: pytest.approx(float(row[label]), abs=0.006) for label in LABELS
            }
        ours = list(csv.DictReader(download(page, "CSV", tmp_path).open(encoding="utf-8")))
        assert [row["model"] for row in ours] == [model.name for model in models]
        assert violations(page) == []
        page.close()  # before its server ends, which would cut off what the page still listens to
