"""The report of `sailer evaluate`: figures with intervals, groups, the worst clips; self-contained."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from sailer.cli import main
from sailer.data.schema import PRIMARY_LABELS, CorpusError
from sailer.hub.publishing import PushError, push
from sailer.training.evaluation import evaluate_models

from .sounds import noise

SPEAKERS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips of six speakers, two annotators each, and a split without labels."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = ["audio,label,votes,speaker,sex,age,split"]
    for index in range(26):
        soundfile.write(folder / f"{index}.wav", noise(0.4 + 0.1 * index, index), 16000, subtype="FLOAT")
        label, other = PRIMARY_LABELS[index % 8], PRIMARY_LABELS[(index * 3 + 1) % 8]
        person = index % SPEAKERS
        told = f'{label},"{label},{label},{other}"' if index < 24 else ","
        split = "test" if index < 24 else "test3"
        lines.append(f"{index}.wav,{told},s{person},{'male' if person % 2 else 'female'},{20 + 10 * person},{split}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def reported(corpus: Path, tiny_sailer: Path, tiny_speech_sailer: Path, tmp_path_factory) -> Path:
    """Two systems and their ensemble, through the command line."""
    out = tmp_path_factory.mktemp("out")
    line = ["evaluate", str(tiny_sailer), str(tiny_speech_sailer), "--corpus", "manifest", "--data_dir", str(corpus)]
    assert main([*line, "--output_dir", str(out), "--bootstrap", "200"]) == 0
    return out


def test_it_holds_all_that_it_should(reported: Path, corpus: Path) -> None:
    page, text = (reported / "report.html").read_text(), (reported / "report.md").read_text()
    for title in ("Macro-F1", "Accuracy", "Min. mAP", "Differences", "By class", "Agreement against error"):
        assert title in page and title in text
    for title in ("Risk and coverage", "By entropy of the votes", "By agreement", "Gaps between groups"):
        assert title in page and title in text
    assert "Prediction sets" not in page, "these systems have no scores for them"
    for title in ("By sex", "By age", "By duration", "By speaker", "The worst clips of ensemble"):
        assert title in page and title in text
    for name in ("confusion_matrix", "reliability", "risk_coverage", "agreement", "groups", "speakers"):
        assert (reported / f"{name}.png").read_bytes().startswith(b"\x89PNG") and f"({name}.png)" in text
    # Self-contained: pictures within, recordings by their paths, nothing from elsewhere.
    sources = re.findall(r'(?:src|href)="([^"]{1,60})', page)
    assert sum(source.startswith("data:image/png") for source in sources) == 6
    links = [source for source in sources if not source.startswith("data:image/png")]
    assert links and all(link.startswith("file:///") for link in links)
    assert page.count("<audio") == 20 and (corpus / "0.wav").as_uri()[:40] in page
    assert "http" not in page and "data:audio" not in page


def test_figures_have_intervals_differences_and_groups(reported: Path) -> None:
    figures = json.loads((reported / "metrics.json").read_text())
    first, second, ensemble = figures.values()
    for system in figures.values():
        low, high = system["intervals"]["macro_f1"]
        assert low < high and low - 0.2 < system["macro_f1"] < high + 0.2
    assert len(ensemble["differences"]) == 2 and not first.get("differences")
    compared = ensemble["differences"][next(iter(figures))]["macro_f1"]
    assert compared["difference"] == pytest.approx(ensemble["macro_f1"] - first["macro_f1"])
    shared = {"macro_f1", "accuracy", "min_map", "uar", "kl", "js", "ece", "natural_kl", "natural_js", "natural_ece"}
    for system, others in ((second, 1), (ensemble, 2)):  # every figure that both have, of every pair
        assert len(system["differences"]) == others
        for found in system["differences"].values():
            assert shared <= set(found) <= set(system["intervals"])
            assert all(difference["interval"] for difference in found.values())
    assert second["scored_clips"] == 24 and "loss" in first
    groups = ensemble["groups"]
    expected = {"sex": 2, "age": 4, "duration": 2, "agreement": 1, "speaker": 6}
    assert {kind: len(rows) for kind, rows in groups.items()} == expected
    for rows in groups.values():
        assert sum(row["clips"] for row in rows) == 24
        share = sum(row["scored"] * row["accuracy"][0] for row in rows) / 24
        assert share == pytest.approx(ensemble["accuracy"])
        assert all(row["group"] != "unknown" for row in rows)


def test_the_table_has_every_system_and_clip(reported: Path) -> None:
    table = pd.read_parquet(reported / "predictions.parquet")
    assert len(table) == 3 * 24 and set(table["speaker"]) == {f"s{index}" for index in range(SPEAKERS)}
    np.testing.assert_allclose(table[list(PRIMARY_LABELS)].sum(axis=1), 1, atol=1e-5)
    figures = json.loads((reported / "metrics.json").read_text())
    for name, rows in table.groupby("system"):
        assert (rows["label"] == rows["decision"]).mean() == pytest.approx(figures[name]["accuracy"])
    assert table.loc[table["system"] == "ensemble", "arousal"].notna().all()


@pytest.mark.slow
def test_the_same_evaluation_gives_the_same_report(
    reported: Path, corpus: Path, tiny_sailer: Path, tiny_speech_sailer: Path, tmp_path: Path
) -> None:
    evaluate_models(
        [tiny_sailer, tiny_speech_sailer], "manifest", corpus, output_dir=tmp_path / "again", bootstrap=200
    )
    for name in ("report.md", "predictions.csv"):
        assert (tmp_path / "again" / name).read_text() == (reported / name).read_text()


def test_audio_is_embedded_on_request_and_then_never_pushed(
    corpus: Path, tiny_speech_sailer: Path, tmp_path: Path, hub
) -> None:
    system = tmp_path / "system"
    shutil.copytree(tiny_speech_sailer, system)
    (system / "README.md").write_text("A system.")
    evaluate_models([system], "manifest", corpus, output_dir=system, embed_audio=True, bootstrap=20)
    assert not (system / "report.html").exists()
    assert (system / "report_with_audio.html").read_text().count('src="data:audio/wav;base64,') == 20
    with pytest.raises(PushError, match=r"report_with_audio\.html: not pushed, because it holds recordings"):
        push(system, "it")
    assert not hub.files
    (system / "report_with_audio.html").rename(system / "other.html")
    with pytest.raises(PushError, match=r"other\.html: not pushed"):
        push(system, "it")


def test_a_split_without_labels_gives_a_submission_or_an_error(
    corpus: Path, tiny_sailer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(CorpusError, match=r"'test3' of manifest has no labels .*\['test'\].* add --submission"):
        evaluate_models([tiny_sailer], "manifest", corpus, "test3")
    line = ["evaluate", str(tiny_sailer), "--corpus", "manifest", "--data_dir", str(corpus), "--split", "test3"]
    assert main([*line, "--submission", "attributes"]) == 2
    assert "--output_dir" in capsys.readouterr().err
    out = tmp_path / "out"
    for kind in ("categorical", "attributes"):
        assert main([*line, "--submission", kind, "--output_dir", str(out)]) == 0
        _, *rows = (out / f"submission_{kind}.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["24.wav", "25.wav"]
    assert all(1 <= float(value) <= 7 for row in rows for value in row.split(",")[1:])
    assert not (out / "metrics.json").exists()
    files = tmp_path / "files.csv"
    files.write_text("FileName\n24.wav\n25.wav\n26.wav\n")
    assert main([*line, "--submission", "categorical", "--output_dir", str(out), "--file_list", str(files)]) == 2
    assert "lacks 1 of the 3 files of the list: 26.wav" in capsys.readouterr().err
