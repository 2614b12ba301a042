"""`sailer evaluate --corpora`: small folders as RAVDESS, EMO-DB and CREMA-D are released, and the table over them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer import SailerForAudioClassification
from sailer.cli import main
from sailer.data import CorpusError, LabelSet
from sailer.training.cross_corpus import Cell, Place, evaluate_across, parse_place

from .sounds import noise

RAVDESS = {"01": "Neutral", "03": "Happy", "04": "Sad", "05": "Angry", "07": "Disgust"}
EMO_DB = {"N": "Neutral", "F": "Happy", "T": "Sad", "W": "Angry", "L": "Bored"}
CREMA_D = {"NEU": "N", "HAP": "H", "SAD": "S", "ANG": "A"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Test speakers of the three corpora, two each; of RAVDESS some to train on, too."""
    root = tmp_path_factory.mktemp("corpora")
    for actor in (1, 19, 20):
        for code in RAVDESS:
            write(root / "ravdess" / f"Actor_{actor:02d}" / f"03-01-{code}-01-01-01-{actor:02d}.wav", actor)
    for actor in ("15", "16"):
        for letter in EMO_DB:
            write(root / "emo_db" / "wav" / f"{actor}a01{letter}a.wav", int(actor))
    header = '"","A","D","F","H","N","S","fileName","numResponses","agreement","emoVote","meanEmoResp"'
    lines = [header]
    for actor in ("1018", "1019"):
        for number, (code, letter) in enumerate(CREMA_D.items()):
            name = f"{actor}_TAI_{code}_XX"
            votes = ",".join("9" if column == letter else "0" for column in "ADFHNS")
            lines.append(f'"1{actor}{number}",{votes},"{name}",9,1,"{letter}",50')
            write(root / "crema_d" / "AudioWAV" / f"{name}.wav", int(actor) + number)
    (root / "crema_d" / "processedResults").mkdir()
    (root / "crema_d" / "processedResults" / "tabulatedVotes.csv").write_text("\n".join(lines) + "\n")
    return {name: root / name for name in ("ravdess", "emo_db", "crema_d")}


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(0.4, seed), 16000, subtype="FLOAT")


@pytest.fixture(scope="module")
def systems(tiny_speech_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of nine labels that its recipe trained on RAVDESS, and one of four, which has no Other."""
    root = tmp_path_factory.mktemp("systems")
    nine, four = (Path(shutil.copytree(tiny_speech_sailer, root / name)) for name in ("nine", "four"))
    (nine / "recipe.yaml").write_text("corpus: ravdess\ncorpus_options: {train_actors: '1'}\naudio_backbone: x\n")
    labels = ["Sad", "Happy", "Neutral", "Angry"]
    SailerForAudioClassification.from_pretrained(four, labels=labels, ignore_mismatched_sizes=True).save_pretrained(
        four
    )
    return [nine, four]


def test_places() -> None:
    assert parse_place("emo_db=/a=b:c") == Place("emo_db", "test", "/a=b:c")
    assert parse_place("emo_db:all=DIR", "validation") == Place("emo_db", "all", "DIR")
    assert parse_place("synthetic", "validation") == Place("synthetic", "validation", None)
    with pytest.raises(CorpusError, match=r"'=DIR' names no corpus; give NAME=DIR, or NAME:SPLIT=DIR"):
        parse_place("=DIR")


def test_figures_are_of_decisions_among_the_classes() -> None:
    label_set = LabelSet(("a", "b", "c", "Other"), ("a",))
    logits = np.array([[1.0, 0, 5, 9], [0, 1, 5, 9], [2, 1, 5, 9], [0, 0, 1, 0], [0, 0, 0, 9.0]])
    cell = Cell("m", Place("x"), label_set, logits, np.array([0, 1, 1, 2, 3]), ["s", "s", "t", "t", "t"])
    assert cell.classes == ["a", "b", "c"]
    both = cell.figures(["b", "a"], 50)
    # a right; of b's two one: recalls 1 and 1/2. Among all three classes, c has the most of all of them.
    assert both["uar"][0] == 0.75 and both["accuracy"][0] == pytest.approx(2 / 3) and both["clips"] == 3
    assert both["chance"] == 0.5 and both["uar"][1] is not None
    everything = cell.figures(cell.classes, 50)
    assert everything["accuracy"][0] == 0.25 and everything["clips"] == 4


@pytest.mark.slow
def test_the_table_over_three_corpora(folders: dict[str, Path], systems: list[Path], tmp_path: Path, capsys) -> None:
    places = [f"{name}={folder}" for name, folder in folders.items()]
    out = tmp_path / "across"
    line = ["evaluate", *map(str, systems), "--corpora", *places, "--output_dir", str(out), "--bootstrap", "50"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "cross_corpus.json").read_text())
    # Disgust is not in CREMA-D's clips here, Bored is Other; the rest is everywhere, in the first system's order.
    assert found["classes"] == ["Angry", "Happy", "Neutral", "Sad"]
    cells = {(Path(cell["model"]).name, cell["corpus"]): cell for cell in found["cells"]}
    assert len(cells) == 6
    for (model, corpus), cell in cells.items():
        assert cell["common"]["clips"] == 8 and cell["speakers"] == 2 and cell["common"]["chance"] == 0.25
        assert cell["trained_on_corpus"] == ((model, corpus) == ("nine", "ravdess")) and not cell["speakers_heard"]
        extra = ["Disgust"] if (model, corpus) == ("nine", "ravdess") else []
        assert set(cell["own"]["classes"]) == {*found["classes"], *extra}
        assert cell["own"]["clips"] == 8 + 2 * len(extra)
        value, (low, high) = cell["common"]["uar"]
        assert 0 <= low <= value <= high <= 1
    table = (out / "cross_corpus.md").read_text()
    assert "Classes in common: Angry, Happy, Neutral, Sad; chance 0.250" in table and "(5 classes)" in table
    (row,) = [line for line in table.splitlines() if line.startswith("| nine") and "*, 8 clips" in line][:1]
    assert row.count("*") == 1 and f"{cells['nine', 'ravdess']['common']['uar'][0]:.3f}" in row
    assert table.splitlines()[-1] in printed and "| four |" in printed
    assert (out / "cross_corpus.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_those_of_the_plain_evaluation(
    folders: dict[str, Path], systems: list[Path], tmp_path: Path, capsys
) -> None:
    """Where the classes of the pair are all that the system scores and the corpus has."""
    out = evaluate_across([systems[0]], [f"ravdess={folders['ravdess']}"], tmp_path / "across", bootstrap=20)
    (cell,) = json.loads((out / "cross_corpus.json").read_text())["cells"]
    line = ["evaluate", str(systems[0]), "--corpus", "ravdess", "--data_dir", str(folders["ravdess"])]
    assert main([*line, "--output_dir", str(tmp_path / "plain"), "--bootstrap", "20"]) == 0
    (plain,) = json.loads((tmp_path / "plain" / "metrics.json").read_text()).values()
    assert cell["own"]["clips"] == plain["scored_clips"] == 10
    # There decisions are among all eight scored classes, of which three have no clip: never better for that.
    assert cell["own"]["uar"][0] >= plain["uar"]


def test_all_splits_and_speakers_that_were_heard(
    folders: dict[str, Path], systems: list[Path], tmp_path: Path
) -> None:
    nine, emo_db = systems[0], f"emo_db:all={folders['emo_db']}"
    options = {"emo_db": {"validation_actors": "15", "test_actors": "16"}}
    out = evaluate_across([nine], [emo_db], tmp_path / "all", corpus_options=options, bootstrap=10)
    (cell,) = json.loads((out / "cross_corpus.json").read_text())["cells"]
    assert (cell["split"], cell["common"]["clips"], cell["speakers"]) == ("all", 8, 2)
    # Actor 1, on whom it was trained, with another clip.
    more = Path(shutil.copytree(folders["ravdess"], tmp_path / "more"))
    write(more / "Actor_01" / "03-01-05-01-01-02-01.wav", 5)
    system = Path(shutil.copytree(nine, tmp_path / "system"))
    recipe = "corpus: ravdess\ncorpus_options: {train_actors: '1', validation_actors: '19', test_actors: '20'}\n"
    (system / "recipe.yaml").write_text(recipe)
    with pytest.raises(CorpusError, match=r"6 clips of ravdess \(all\) are among those that .* was trained on"):
        evaluate_across([system], [f"ravdess:all={more}"])
    (system / "recipe.yaml").write_text("- not\n- a recipe\n")
    assert evaluate_across([system], [f"ravdess={more}"], bootstrap=10) is None, "what it was trained on is not known"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpora", "ravdess=RAVDESS", "--data_dir", "x"], "--data_dir is of one corpus"),
        (["--corpora", "ravdess=RAVDESS", "--submission", "attributes"], "--submission is of one corpus"),
        (["--corpora", "ravdess=RAVDESS", "ravdess=RAVDESS"], "names a corpus and split twice"),
        (["--corpora", "ravdes=RAVDESS"], "did you mean 'ravdess'"),
        (["--corpora", "ravdess:dev=RAVDESS"], "has no split 'dev'"),
        (["--corpora", "ravdess=nowhere"], "does not exist"),
        (["--corpora", "ravdess=RAVDESS", "--corpus_options", "{train_actors: 1}"], "give the options of each"),
        (["--corpora", "ravdess=RAVDESS", "--corpus_options", "{emo_db: {}}"], "give the options of each"),
        (["--corpora", "ravdess:train=RAVDESS"], "5 clips of ravdess (train) are among those that"),
    ],
)
def test_what_cannot_be_compared(
    options: list[str], message: str, folders: dict[str, Path], systems: list[Path], capsys
) -> None:
    words = [word.replace("RAVDESS", str(folders["ravdess"])) for word in options]
    assert main(["evaluate", str(systems[0]), *words]) == 2
    assert message in capsys.readouterr().err


def test_no_classes_in_common(folders: dict[str, Path], systems: list[Path], tmp_path: Path) -> None:
    only = tmp_path / "emo_db" / "wav"
    write(only / "15a01La.wav", 1)
    with pytest.raises(CorpusError, match=r"No clip of emo_db \(test\) has a consensus that .* scores"):
        evaluate_across([systems[0]], [f"emo_db={only.parent}"])
    write(only / "16a01Wa.wav", 2)
    places = [f"emo_db={only.parent}", f"ravdess={folders['ravdess']}"]
    with pytest.raises(ValueError, match=r"Fewer than two classes are common .* emo_db \(test\): \['Angry'\]; .*"):
        evaluate_across([systems[0]], places)
