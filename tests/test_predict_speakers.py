"""`sailer predict --speaker_from`: each recording is adapted by its speaker's others, never by itself."""

import csv
from pathlib import Path

import pytest
import soundfile

from sailer.cli import main
from sailer.inference.outputs import PredictionError
from sailer.inference.predict import PredictionSettings, load_classifier
from sailer.inference.speakers import speakers_of, voices_of
from sailer.layers_sailer import reference_of

from .sounds import noise

SPEAKERS = {"anna": 3, "bert": 2, "carl": 2, "dora": 1}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of four speakers, with their recordings."""
    folder = tmp_path_factory.mktemp("speakers")
    for place, (speaker, number) in enumerate(SPEAKERS.items()):
        (folder / speaker).mkdir()
        for index in range(number):
            soundfile.write(folder / speaker / f"{speaker}{index}.wav", noise(0.5, 10 * place + index), 16000)
    return folder


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as file:
        return {Path(row["file"]).stem: row for row in csv.DictReader(file)}


def test_each_is_adapted_by_its_speakers_others(clips, tiny_speech_sailer, tmp_path, caplog):
    model, output = str(tiny_speech_sailer), tmp_path / "out.csv"
    assert main(["predict", model, str(clips), "--output", str(output), "--speaker_from", "folder"]) == 0
    rows = rows_of(output)
    assert {name: row["speaker_recordings"] for name, row in rows.items()} == {
        **dict.fromkeys(("anna0", "anna1", "anna2"), "2"),
        **dict.fromkeys(("bert0", "bert1", "carl0", "carl1"), "1"),
        "dora0": "0",
    }
    assert rows["bert1"]["speaker"] == str(clips / "bert")
    assert "mean voice" in caplog.text and "1 speakers have one recording" in caplog.text

    classifier = load_classifier(PredictionSettings(model))
    files = sorted(map(str, clips.rglob("*.wav")))
    classifier.learn_mean_voice(files, [Path(file).parent.name for file in files])
    classifier.adapt([clips / "anna" / "anna0.wav", clips / "anna" / "anna2.wav"], name="anna but 1")
    for name, speaker in (("anna1", "anna but 1"), ("dora0", None)):
        expected = classifier(clips / name[:4] / f"{name}.wav", speaker=speaker)
        for score in expected:
            assert float(rows[name][score["label"]]) == pytest.approx(score["score"], abs=1e-5)
    plain = classifier(clips / "anna" / "anna1.wav", top_k=1)[0]
    assert abs(float(rows["anna1"][plain["label"]]) - plain["score"]) > 1e-4, "adapting changes something"

    # Stopped and started again it goes on with the same voices.
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(lines[:3]))
    assert main(["predict", model, str(clips), "--output", str(output), "--speaker_from", "folder"]) == 0
    assert rows_of(output) == rows
    assert main(["predict", model, str(clips), "--output", str(output)]) == 2, "begun with other settings"
    archive = str(tmp_path / "out.parquet")
    assert main(["predict", model, str(clips), "--output", archive, "--speaker_from", "folder"]) == 2


def test_a_column_names_the_speakers(clips, tiny_speech_sailer, tmp_path):
    table, output = tmp_path / "list.csv", tmp_path / "out.csv"
    names = [f"{speaker}{index}.wav" for speaker, number in SPEAKERS.items() for index in range(number)]
    table.write_text("FileName,SpkrID\n" + "".join(f"{name},{name[:4]}\n" for name in names))
    arguments = ["predict", str(tiny_speech_sailer), str(clips), "--output", str(output), "--file_list", str(table)]
    assert main([*arguments, "--speaker_from", "SpkrID"]) == 0
    assert {row["speaker"] for row in rows_of(output).values()} == set(SPEAKERS)
    assert rows_of(output)["anna0"]["speaker_recordings"] == "2"


def test_speakers_that_cannot_be_told_are_refused(clips, tmp_path):
    files, table = [str(clips / "anna" / "anna0.wav")], tmp_path / "list.csv"
    assert speakers_of(files, "folder") == [str(clips / "anna")]
    for content, message in (
        ("FileName,Who\nanna0.wav,a\n", "not FileName and 'SpkrID'"),
        ("FileName,SpkrID\nbert0.wav,b\n", r"does not name 1 of the recordings, such as .*anna0\.wav"),
        ("FileName,SpkrID\nanna0.wav,a\nanna0.wav,b\n", "names anna0.wav for two speakers, 'a' and 'b'"),
        ("", "has the columns"),
    ):
        table.write_text(content)
        with pytest.raises(PredictionError, match=message):
            speakers_of(files, "SpkrID", table)
    table.write_text("filename,SpkrID\nanna0.wav,\n")
    assert speakers_of(files, "SpkrID", table) == [""]
    with pytest.raises(PredictionError, match="column of --file_list, which was not given"):
        speakers_of(files, "SpkrID")
    with pytest.raises(PredictionError, match="cannot be read"):
        speakers_of(files, "SpkrID", tmp_path / "nowhere.csv")
    with pytest.raises(PredictionError, match="in no folder"):
        speakers_of(["https://example.org/a.wav"], "folder")


def test_what_cannot_be_used_says_nothing_of_anybody(clips, tiny_speech_sailer, tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    classifier = load_classifier(PredictionSettings(str(tiny_speech_sailer)))
    with pytest.raises(PredictionError, match="None of the 1 recordings of known speakers"):
        voices_of(classifier, [str(broken)], ["anna"])
    with pytest.raises(ValueError, match="learned from 1 speakers"):
        voices_of(classifier, [str(clips / "anna" / "anna0.wav")], ["anna"])
    files = [*sorted(map(str, clips.rglob("*.wav"))), str(broken)]
    speakers = [*(Path(file).parent.name for file in files[:-1]), "anna"]
    with pytest.raises(ValueError, match="learned from 3 speakers"):
        voices_of(classifier, files, ["" if speaker == "bert" else speaker for speaker in speakers])
    voices = voices_of(classifier, files, speakers)
    assert str(broken) not in voices and voices[files[0]].count == 2
    assert reference_of(classifier.model).shift(voices[files[0]]).isfinite().all()
