"""`make paper-smoke`: a failing step is told and fails the whole, the others run; the paper's systems on few clips."""

import csv
from pathlib import Path

import pytest

from sailer.data import load_corpus
from sailer.data.challenge import read_file_list
from sailer.settings import bundled_recipes

from . import paper_smoke


def test_it_has_every_recipe_of_the_paper() -> None:
    papers = {name for name in bundled_recipes() if name.startswith("paper_")}
    assert papers < {*paper_smoke.make_parser().parse_args([]).recipes}
    assert {*paper_smoke.SYSTEMS} <= papers


def test_the_corpus_is_in_the_form_of_the_release_and_the_list_is_its_test_set(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    file_list = paper_smoke.write_corpus(tmp_path / "corpus", train_clips=12, development_clips=12)
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == {"Audios", "Labels", "Transcripts"}
    rows = load_corpus("msp_podcast", tmp_path / "corpus", audio=False)
    assert {name: len(split) for name, split in rows.items()} == {"train": 12, "validation": 12, "test1": 16}
    assert [Path(name).stem for name in read_file_list(file_list)] == rows["test1"]["id"]


def test_a_step_that_fails_is_told_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = paper_smoke.run("row", ["train", "nowhere"], tmp_path)
    assert line.fault == f"exit status 2, see {tmp_path / 'row.log'}"
    assert "Recipe nowhere does not exist" in (tmp_path / "row.log").read_text()

    def broken(words: list[str]) -> int:
        raise RuntimeError(words[0])

    monkeypatch.setattr(paper_smoke, "sailer", broken)
    assert paper_smoke.run("row", ["train"], tmp_path).fault.startswith("exit status 1, see")
    assert "RuntimeError: train" in (tmp_path / "row.log").read_text()
    monkeypatch.undo()
    assert paper_smoke.run("row", ["nothing"], tmp_path).fault.startswith("exit status 2, see")
    assert "invalid choice: 'nothing'" in (tmp_path / "row.log").read_text()
    assert paper_smoke.run("row", ["recipes"], tmp_path).fault == ""
    assert "paper_table3_both" in (tmp_path / "row.log").read_text()


def test_the_papers_figure_is_that_of_the_recipe_and_a_bad_submission_is_told(tmp_path: Path) -> None:
    assert paper_smoke.figures(tmp_path, "paper_table3_both") == (None, "0.406")
    (tmp_path / "list.csv").write_text("FileName\na.wav\nb.wav\n")
    (tmp_path / "submission_categorical.csv").write_text("FileName,EmoClass\na.wav,A\n")
    assert "lacks 1 of the 2" in paper_smoke.wrong_submission("categorical", tmp_path, tmp_path / "list.csv")
    assert "submission_attributes.csv" in paper_smoke.wrong_submission("attributes", tmp_path, tmp_path / "list.csv")


@pytest.mark.slow
def test_the_papers_ensembles_on_few_clips(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("espeakng_loader")
    folder = tmp_path / "smoke"
    options = ["--output_dir", str(folder), "--train_clips", "40", "--development_clips", "24"]
    assert paper_smoke.main([*options, "--recipes", *paper_smoke.SYSTEMS]) == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    steps = [*paper_smoke.SYSTEMS, *paper_smoke.ENSEMBLES, "table5_report", "challenge_categorical"]
    assert [row[1].strip() for row in rows[1:]] == [*steps, "challenge_attributes"]
    assert {row[5].strip() for row in rows[1:]} == {"ok"} and rows[3][4].strip() == "0.411"
    report = (folder / "table5_report" / "report.md").read_text()
    assert all(name in report for name in ("paper_system3_whisper_attributes", *paper_smoke.ENSEMBLES))
    for kind, columns in (("categorical", 2), ("attributes", 4)):
        with open(folder / f"challenge_{kind}" / f"submission_{kind}.csv", newline="") as file:
            lines = list(csv.reader(file))
        assert [line[0] for line in lines[1:]] == read_file_list(folder / "test_files.csv")
        assert {len(line) for line in lines} == {columns}

    # Without the system that the ensembles need there are none, and what is wrong fails the whole.
    (folder / "file").write_text("")
    assert paper_smoke.main([*options, "--recipes", "paper_table2_whisper", "--train_clips", "0"]) == 1
    assert "0 of 1 steps ran" in capsys.readouterr().out
