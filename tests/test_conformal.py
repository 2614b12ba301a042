"""Prediction sets: thresholds by hand and as MAPIE has them, what they cover, and the way from a split to a CSV."""

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

import sailer
from sailer import EmotionStream, SailerConfig, SailerForAudioClassification
from sailer.cli import main
from sailer.data.schema import PRIMARY_LABELS, LabelSet
from sailer.ensemble_sailer import load_system
from sailer.training.bootstrap import Resampling
from sailer.training.conformal import among_scored, fit_conformal, set_figures, set_members, set_report
from sailer.windows_sailer import KEPT_SCORES, check_conformal, kept_scores, prediction_set, score_threshold, set_of

from .sounds import noise

THREE = LabelSet(("a", "b", "c"), ("a",))
# Ten of a, four of b, none of c; scores 0.1, 0.2, ... of a, and 0.05, 0.15, ... of b.
BY_HAND = {
    "clips": 14,
    "scores": {"balanced": sorted([*np.arange(1, 11) / 10, *(np.arange(4) / 10 + 0.05)])},
    "class_clips": {"a": 10, "b": 4},
    "class_scores": {"balanced": {"a": [*np.arange(1, 11) / 10], "b": [*(np.arange(4) / 10 + 0.05)]}},
}


def drawn(clips: int, seed: int, label_set: LabelSet = THREE) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (clips, labels) that mean what they say, and labels."""
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.linspace(0.4, 1.2, len(label_set.labels)), size=clips)
    return probabilities, np.array([random.choice(len(row), p=row) for row in probabilities])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty clips of validation and four of test."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = ["audio,label,speaker,split"]
    for index in range(44):
        soundfile.write(folder / f"{index}.wav", noise(0.3 + 0.02 * index, index), 16000, subtype="FLOAT")
        split = "validation" if index < 40 else "test"
        lines.append(f"{index}.wav,{PRIMARY_LABELS[index % 8]},s{index % 5},{split}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def calibrated(corpus: Path, tiny_speech_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny system, calibrated through the command line."""
    folder = tmp_path_factory.mktemp("calibrated") / "system"
    shutil.copytree(tiny_speech_sailer, folder)
    assert main(["calibrate", str(folder), "--corpus", "manifest", "--data_dir", str(corpus)]) == 0
    return folder


def test_thresholds_by_hand() -> None:
    nine = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert kept_scores(nine[::-1]) == nine
    # ceil(10 * 0.5) = 5th, ceil(10 * 0.9) = 9th, ceil(10 * 0.91) = 10th of nine
    assert [score_threshold(nine, 9, share) for share in (0.5, 0.51, 0.9, 0.91)] == [0.5, 0.6, 0.9, math.inf]
    assert score_threshold(list(np.arange(99) / 99), 99, 0.07) == 6 / 99  # though 0.07 * 100 is 7.000000000000001
    assert kept_scores([1 / 3]) == [0.333334] and kept_scores([1.0]) == [1.0], "never below what they stand for"


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 700), st.floats(0.01, 0.999), st.integers(0, 9))
def test_what_is_not_kept_makes_sets_larger_by_a_hundredth_at_most(clips: int, coverage: float, seed: int) -> None:
    scores = np.sort(np.random.default_rng(seed).random(clips))
    kept = kept_scores(scores)
    assert len(kept) == min(clips, KEPT_SCORES)
    rank = math.ceil((clips + 1) * coverage - 1e-9)
    found = score_threshold(kept, clips, coverage)
    if rank > clips:
        assert found == math.inf
        return
    assert found >= scores[rank - 1]
    reached = np.searchsorted(scores, found)  # that many are below
    assert reached - rank <= clips / KEPT_SCORES and (clips > KEPT_SCORES or reached - rank <= 0)


def test_sets_by_hand() -> None:
    said = {"a": 0.6, "b": 0.3, "c": 0.1}
    # Of 14 clips at 0.5: the 8th of .05 .1 .15 .2 .25 .3 .35 .4 .5: 1 - p may be 0.4. At 0.8 the 12th: 0.8.
    assert prediction_set(said, BY_HAND, coverage=0.5) == ["a"]
    assert prediction_set(said, BY_HAND, coverage=0.8) == ["a", "b"]
    assert prediction_set(said, BY_HAND, coverage=0.2) == [], "the third score is 0.15"
    assert prediction_set(said, BY_HAND, coverage=0.99) == ["a", "b", "c"], "14 clips exclude nothing"
    # By class: a the ceil(11 * 0.8) = 9th, 0.9; b the ceil(5 * 0.8) = 4th, 0.35; of c nothing is known.
    assert prediction_set(said, BY_HAND, coverage=0.8, by_class=True) == ["a", "c"]
    assert prediction_set({"b": 7, "a": 2, "c": 1}, BY_HAND, coverage=0.8, by_class=True) == ["b", "a", "c"]


def test_scores_are_of_the_scored_classes_and_clips() -> None:
    label_set = LabelSet(("a", "b", "Other"), ("a",), ("b", "a"))
    probabilities = np.array([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4], [0.0, 0.0, 1.0]])
    found = fit_conformal({"balanced": probabilities}, np.array([0, 1, 2, -1]), label_set)
    assert found == {
        "clips": 2,
        "scores": {"balanced": [0.5, 0.6]},
        "class_clips": {"b": 1, "a": 1},
        "class_scores": {"balanced": {"b": [0.5], "a": [0.6]}},
    }
    assert fit_conformal({"balanced": probabilities}, np.full(4, 2), label_set) is None
    assert among_scored(probabilities, label_set).tolist() == [[0.6, 0.4], [0.5, 0.5], [0.5, 0.5], [0, 0]]


@pytest.mark.filterwarnings("ignore:WARNING. your conformalization dataset has less labels")
@pytest.mark.parametrize("by_class", [False, True])
def test_sets_are_mapies(by_class: bool) -> None:
    mapie = pytest.importorskip("mapie.classification", reason="MAPIE (the dev extra) is the peer here")
    sklearn = pytest.importorskip("sklearn.base")

    class Given(sklearn.ClassifierMixin, sklearn.BaseEstimator):
        """Its inputs are the probabilities."""

        classes_ = np.arange(3)

        def fit(self, x: np.ndarray, y: np.ndarray) -> "Given":
            return self

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(axis=1)

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            return x

        def __sklearn_is_fitted__(self) -> bool:
            return True

    (said, labels), (unseen, _) = drawn(97, 0), drawn(400, 1)
    conformal = fit_conformal({"balanced": said}, labels, THREE)
    for coverage in (0.5, 0.8, 0.9):
        ours = set_members(unseen, THREE, conformal, coverage=coverage, by_class=by_class)
        theirs = np.zeros_like(ours)
        for index in range(3):  # a class's threshold is that of its clips alone
            rows = labels == index if by_class else np.ones(97, bool)
            peer = mapie.SplitConformalClassifier(Given(), confidence_level=coverage, conformity_score="lac")
            _, sets = peer.conformalize(said[rows], labels[rows]).predict_set(unseen)
            theirs[:, index] = sets[:, index, 0]
        np.testing.assert_array_equal(ours, theirs)
        assert 0 < ours.mean() < 1
        scores = [dict(zip("abc", row, strict=True)) for row in unseen]
        single = [prediction_set(row, conformal, coverage=coverage, by_class=by_class) for row in scores]
        assert [sorted(found) for found in single] == [
            [label for label, inside in zip("abc", row, strict=True) if inside] for row in ours
        ]
        for found, row in zip(single, scores, strict=True):
            assert found == sorted(found, key=row.__getitem__, reverse=True)


def test_they_cover_what_they_should_on_clips_of_the_same_kind() -> None:
    covered, classes, sizes = [], [], []
    for seed in range(40):
        (said, labels), (unseen, true) = drawn(150, seed), drawn(500, 1000 + seed)
        conformal = fit_conformal({"balanced": said}, labels, THREE)
        resampling = Resampling([""] * 500, 1)
        plain, by_class = set_report(resampling, {"balanced": unseen}, true, THREE, conformal, coverages=[0.8])
        covered.append(plain["covered"][0])
        classes.append([by_class["classes"][label] for label in "abc"])
        sizes.append((plain["size"][0], by_class["size"][0]))
    assert 0.8 - 0.01 < np.mean(covered) < 0.8 + 1 / 151 + 0.01  # at least 0.8, at most 1 / (clips + 1) more
    assert (np.mean(classes, axis=0) > 0.8 - 0.015).all()
    assert np.mean(sizes, axis=0)[0] < np.mean(sizes, axis=0)[1], "what is meant for each class asks for larger sets"


def test_a_report_by_hand() -> None:
    said = np.array([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8], [0.4, 0.3, 0.3]])
    labels = np.array([0, 0, 2, -1])
    speakers = ["x", "x", "y", "y"]
    report = set_report(Resampling(speakers, 50), {"balanced": said}, labels, THREE, BY_HAND, speakers, [0.5])
    plain = report[0]  # 1 - p up to 0.4: {a}, {b}, {c}, and of the clip without a consensus {}
    assert (plain["prior"], plain["by_class"], plain["asked"]) == ("balanced", False, 0.5)
    assert plain["covered"][0] == pytest.approx(2 / 3) and plain["size"][0] == 1 == plain["single"][0]
    assert plain["empty"][0] == 0 and plain["classes"] == {"a": 0.5, "c": 1.0}
    assert plain["speakers"] == {"x": 0.5, "y": 1.0}
    assert plain["covered"][1] == pytest.approx([0.5, 1.0]), "one speaker or the other"
    assert set_figures(said, labels, THREE, BY_HAND)["set90_coverage"] == pytest.approx(1)
    assert set_report(Resampling(["x"], 1), {"balanced": said[:1]}, np.array([-1]), THREE, BY_HAND) == []


def test_a_configuration_keeps_them_until_its_labels_change(tmp_path: Path) -> None:
    config = SailerConfig({"model_type": "whisper"}, labels=["a", "b", "c"], conformal=BY_HAND)
    config.save_pretrained(tmp_path)
    assert SailerConfig.from_pretrained(tmp_path).conformal == json.loads(json.dumps(BY_HAND))
    assert SailerConfig.from_pretrained(tmp_path, labels=["a", "b", "d"]).conformal is None
    assert SailerConfig({"model_type": "whisper"}).conformal is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clips": 3}, r"the balanced scores of clips are not ascending"),
        ({"clips": 0}, r"clips is 0; it must be at least 1"),
        ({"scores": {"balanced": [0.5, 0.2]}}, "not ascending numbers from 0 to 1"),
        ({"scores": {"balanced": [0.5, 1.2]}}, "not ascending numbers from 0 to 1"),
        ({"scores": {"balanced": []}}, "not ascending"),
        ({"scores": {}}, "no balanced scores"),
        ({"scores": {"balanced": ["x"]}}, "not ascending"),
        ({"class_clips": {"a": 10, "b": 4, "z": 1}}, r"it speaks of \['z'\], and the labels are"),
        ({"class_scores": {}}, "KeyError: 'balanced'"),
        ({"class_scores": None}, "TypeError"),
    ],
)
def test_calibration_scores_that_are_none(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"conformal is not what calibration gives .*{message}.*sailer calibrate"):
        check_conformal(BY_HAND | change, ["a", "b", "c"])
    with pytest.raises(ValueError, match="conformal is not what calibration gives"):
        SailerConfig({"model_type": "whisper"}, labels=["a", "b", "c"], conformal=[1, 2])


def test_the_command_writes_them_and_nothing_else(calibrated: Path, tiny_speech_sailer: Path, capsys) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tiny_speech_sailer, calibrated))
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed <= {"conformal", "calibration_temperature"} and after["conformal"]["clips"] == 40
    assert after["conformal"]["class_clips"] == dict.fromkeys(PRIMARY_LABELS[:8], 5)
    assert set(after["conformal"]["scores"]) == {"balanced", "natural"}
    assert [path.name for path in calibrated.glob(".*")] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["SYSTEM", "--split", "dev"], "has no split 'dev'"),
        (["SYSTEM", "--corpus", "ravdes"], "did you mean 'ravdess'"),
    ],
)
def test_what_cannot_be_calibrated(line: list[str], message: str, calibrated: Path, corpus: Path, capsys) -> None:
    words = ["calibrate", *(str(calibrated) if word == "SYSTEM" else word for word in line)]
    given = [] if "--corpus" in line else ["--corpus", "manifest"]
    assert main([*words, *given, "--data_dir", str(corpus)]) == 2
    assert message in capsys.readouterr().err


def test_the_pipeline_gives_the_set_beside_the_scores(calibrated: Path, tiny_speech_sailer: Path) -> None:
    classifier = sailer.load(calibrated)
    conformal = classifier.model.config.conformal
    clips = [noise(0.3 + 0.1 * seed, seed) for seed in range(6)]
    sizes = {}
    for prior in ("balanced", "natural"):
        for coverage in (0.3, 0.9):
            results = classifier(clips, return_all=True, prior=prior, coverage=coverage)
            for result in results:
                scores = {row["label"]: row["score"] for row in result["primary"] if row["label"] != "Other"}
                assert result["set"] == prediction_set(scores, conformal, prior, coverage)
                assert not result["set"] or result["set"][0] == result["label"]
            sizes[prior, coverage] = sum(len(result["set"]) for result in results)
        assert sizes[prior, 0.3] < sizes[prior, 0.9]
    plain = classifier(clips, return_all=True)
    assert [row["set"] for row in plain] == [row["set"] for row in classifier(clips, return_all=True, coverage=0.9)]
    logits = classifier(clips, return_all=True, function_to_apply="none")
    assert [row["set"] for row in logits] == [row["set"] for row in plain]
    assert classifier(clips[0]) == plain[0]["primary"], "a list of scores as before"
    by_class = classifier(clips, return_all=True, coverage=0.99, coverage_by_class=True)
    assert all(len(row["set"]) == 8 for row in by_class), "five clips of a class exclude nothing at 0.99"
    assert json.loads(json.dumps({"set": plain[0]["set"]}))["set"] == plain[0]["set"]
    windows = classifier(noise(2.0, 3), chunk_length_s=1, return_timestamps=True, return_all=True, coverage=0.3)
    assert len(windows) > 1 and all("set" in window for window in windows)
    assert "set" not in sailer.load(tiny_speech_sailer)(clips[0], return_all=True)


@pytest.mark.parametrize("coverage", [0, 1, -0.1, 1.5, float("nan"), True, "0.9"])
def test_a_coverage_outside_0_to_1(coverage: object, calibrated: Path) -> None:
    with pytest.raises(ValueError, match=r"coverage is .*; it must lie between 0 and 1"):
        sailer.load(calibrated)(noise(0.5), return_all=True, coverage=coverage)
    with pytest.raises(ValueError, match=r"coverage is .*; it must lie between 0 and 1"):
        sailer.load(calibrated, coverage=coverage)


def test_a_coverage_of_a_system_that_cannot_have_it(tiny_speech_sailer: Path, calibrated: Path, capsys) -> None:
    way = r"no calibration scores for any prediction sets: fit them .* sailer calibrate MODEL"
    for options in ({"coverage": 0.9}, {"coverage_by_class": True}):
        with pytest.raises(ValueError, match=way):
            sailer.load(tiny_speech_sailer)(noise(0.5), **options)
    with pytest.raises(ValueError, match=way):
        EmotionStream(sailer.load(tiny_speech_sailer), 1, 1, coverage=0.9)
    config = SailerForAudioClassification.from_pretrained(calibrated).config
    del config.conformal["scores"]["natural"]
    assert set_of(config, dict.fromkeys(PRIMARY_LABELS, 1.0), "natural") is None
    with pytest.raises(ValueError, match="no calibration scores for the natural prior's prediction sets"):
        set_of(config, dict.fromkeys(PRIMARY_LABELS, 1.0), "natural", coverage=0.9)
    classifier = sailer.load(calibrated, coverage=0.9)
    del classifier.model.config.conformal["scores"]["natural"]
    with pytest.raises(ValueError, match="the natural prior's"):
        classifier(noise(0.5), prior="natural")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_predict_writes_a_column_of_them(form: str, calibrated: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out.{form}"
    line = ["predict", str(calibrated), str(corpus / "4?.wav"), "--output", str(out)]
    assert main([*line, "--coverage", "0.6", "--timeline"]) == 0
    classifier = sailer.load(calibrated)
    for path in (out, tmp_path / f"out_timeline.{form}"):
        if form == "csv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        else:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 4
        for row in rows:
            expected = classifier(row["file"], return_all=True, coverage=0.6)["set"]
            assert (row["set"].split(";") if row["set"] else []) == expected
    assert main([*line[:-1], str(tmp_path / "by.csv"), "--coverage_by_class"]) == 0
    assert main([*line[:-1], str(tmp_path / "plain.csv")]) == 0
    columns = [(tmp_path / name).read_text().split("\n")[0].split(",") for name in ("by.csv", "plain.csv")]
    assert [name for name in columns[0] if name not in columns[1]] == ["set"]


@pytest.mark.parametrize(
    ("options", "message"), [(["--coverage", "1"], "between 0 and 1"), (["--coverage", "nan"], "between 0 and 1")]
)
def test_predict_refuses(options: list[str], message: str, calibrated: Path, corpus: Path, tmp_path, capsys) -> None:
    line = ["predict", str(calibrated), str(corpus), "--output", str(tmp_path / "out.csv")]
    assert main([*line, *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out.csv").exists()


def test_predict_refuses_a_system_without(tiny_speech_sailer: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    line = ["predict", str(tiny_speech_sailer), str(corpus), "--output", str(tmp_path / "out.csv")]
    assert main([*line, "--coverage", "0.9"]) == 2
    assert re.search("no calibration scores .* sailer calibrate", capsys.readouterr().err)
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("options", [{}, {"prior": "natural"}, {"function_to_apply": "none"}])
def test_a_stream_gives_the_set_of_its_smoothed_scores(options: dict, calibrated: Path) -> None:
    classifier, given = sailer.load(calibrated), {"return_all": True, "coverage": 0.4, **options}
    audio = np.concatenate([noise(0.6, seed) for seed in range(5)])
    plain = list(EmotionStream(classifier, 1, 0.5, **given).run([audio]))
    expected = classifier(audio, chunk_length_s=1, stride_length_s=(0, 0.5), return_timestamps=True, **given)
    assert [row["set"] for row in plain] == [row["set"] for row in expected]
    smooth = list(EmotionStream(classifier, 1, 0.5, smooth_s=1.0, **given).run([audio]))
    for result in smooth:
        scores = {row["label"]: row["score"] for row in result["primary"]}
        assert result["set"] == set_of(classifier.model.config, scores, coverage=0.4, **options)
    assert [row["set"] for row in smooth[1:]] != [row["set"] for row in plain[1:]]


def test_an_ensemble_has_its_own_or_says_how(calibrated: Path, corpus: Path, tmp_path: Path, capsys) -> None:
    line = ["ensemble", str(calibrated), str(calibrated)]
    fit = ["--corpus", "manifest", "--data_dir", str(corpus)]
    assert main([*line, str(tmp_path / "plain")]) == 0
    with pytest.raises(ValueError, match="no calibration scores for any prediction sets"):
        sailer.load(tmp_path / "plain", coverage=0.9)
    assert main([*line, str(tmp_path / "fitted"), "--weights", "fit", *fit]) == 0
    assert load_system(tmp_path / "fitted")[0].config.conformal is None, "its shares were fitted on these clips"
    for name, command in (("own", [*line, str(tmp_path / "own")]), ("plain", ["calibrate", str(tmp_path / "plain")])):
        assert main([*command, *fit]) == 0
        classifier = sailer.load(tmp_path / name)
        single = sailer.load(calibrated)
        ours, theirs = (one.model.config.conformal for one in (classifier, single))
        np.testing.assert_allclose(ours["scores"]["balanced"], theirs["scores"]["balanced"], atol=1e-5)
        clip = noise(0.7, 5)
        assert classifier(clip, return_all=True)["set"] == single(clip, return_all=True)["set"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_exported_systems_give_them_too(backend: str, calibrated: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extras onnx and openvino")
    pytest.importorskip("onnxruntime" if backend == "onnx" else "openvino", reason=f"needs the extra {backend}")
    system = shutil.copytree(calibrated, tmp_path / "system")
    other = sailer.load(system, backend=backend, precision="float32")
    clips = [noise(0.3 + 0.1 * seed, seed) for seed in range(4)]
    for options in ({"coverage": 0.5}, {"coverage": 0.7, "coverage_by_class": True, "prior": "natural"}):
        ours, theirs = (one(clips, return_all=True, **options) for one in (other, sailer.load(system)))
        assert [row["set"] for row in ours] == [row["set"] for row in theirs]
        assert any(0 < len(row["set"]) < 8 for row in ours)
