"""The EmoBox benchmark: its folds on what is at hand, a file of folds, one encoding for all, and its table."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError, LabelSet

from .sounds import RATE, noise

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "emobox.py"
TINY = {
    "audio_backbone": "tiny-whisper",
    "audio_layers": "weighted_norm",
    "frame_pooling": 64,
    "hidden_size": 8,
    "heads": ["primary"],
    "cache_features": "memory",
    "max_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "macro_f1",
    "use_cpu": True,
}


@pytest.fixture
def emobox(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("emobox", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ravdess(tmp_path: Path) -> Path:
    """Two clips of each of four emotions by actors of EmoBox's first fold (1, 11) and all of its second."""
    folder = tmp_path / "ravdess"
    for actor in (1, 11, 4, 10, 12, 14):
        for emotion, statement in itertools.product((1, 2, 3, 5), (1, 2)):
            path = folder / f"Actor_{actor:02d}" / f"03-01-0{emotion}-01-0{statement}-01-{actor:02d}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise(0.4, 100 * actor + 10 * statement + emotion), RATE)
    return folder


@pytest.fixture
def arguments(emobox: ModuleType, ravdess: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(json.dumps(TINY), encoding="utf-8")
    monkeypatch.setattr(emobox, "BEST", str(recipe))
    places = ["--data_dir", str(ravdess), "--output_dir", str(tmp_path / "out"), "--json", str(tmp_path / "out.json")]
    return [*places, "--recipes", str(recipe), "--audio_backbone", "tiny-whisper"]


def test_each_actor_of_ravdess_is_tested_by_one_fold(emobox):
    assert sorted(actor for fold in emobox.RAVDESS_FOLDS.values() for actor in fold) == list(range(1, 25))


@pytest.mark.slow
def test_absent_actors_are_said_and_every_system_has_a_row(emobox, arguments, tmp_path, capsys):
    emobox.main(arguments)
    printed = capsys.readouterr().out
    assert "Fold 1 lacks the clips of actors [20, 21]: it tests 2." in printed
    assert "No clips of actors [2, 3, 5, 6, 7, 8, 9, 13" in printed
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert list(results) == ["baseline of seconds", "tiny"]
    assert all(list(folds) == ["1", "2"] for folds in results.values())
    figures = [fold[name] for folds in results.values() for fold in folds.values() for name in emobox.METRICS]
    assert all(0 <= figure <= 1 for figure in figures)
    assert "| EmoBox: Whisper large-v3 (635 M) | 6 |  | 75.9 | 75.2 |" in printed
    # The first fold trains on four speakers, and knows the mean voice; the second on two.
    assert {"balanced, 20", "one emotion, 3"} <= set(results["tiny"]["1"]) and "balanced, 1" not in results["tiny"][
        "2"
    ]

    run = json.loads(next((tmp_path / "out" / "runs").glob("*.json")).read_text())
    assert run["recipe"]["load_best_model_at_end"] is False, "no epoch is chosen on the fold that tests"
    assert run["recipe"]["labels"] == list(emobox.RAVDESS_LABELS)


@pytest.mark.slow
def test_every_fold_shares_one_encoding_and_a_finished_run_is_read(emobox, arguments, tmp_path, monkeypatch, capsys):
    emobox.main([*arguments, "--no-baseline"])
    kept = sorted((tmp_path / "out" / "features").rglob("*"))
    first = capsys.readouterr().out

    import sailer.training.features as features

    def refuse(*_: object) -> None:
        raise AssertionError("a clip is encoded that was encoded before")

    monkeypatch.setattr(features, "pool_states", refuse)
    emobox.main([*arguments, "--seeds", "1", "0", "--no-baseline"])
    printed = capsys.readouterr().out
    assert all(
        f"| tiny, {runs} | " in printed for runs in ("seed 1", "seed 0", "mean of 2 seeds", "ensemble of 2 seeds")
    )
    assert sorted((tmp_path / "out" / "features").rglob("*")) == kept
    monkeypatch.setattr(emobox, "fit", None)
    capsys.readouterr()
    emobox.main([*arguments, "--no-baseline"])
    assert capsys.readouterr().out == first


def test_a_file_of_folds(emobox, arguments, tmp_path, capsys):
    names = [f"03-01-0{emotion}-01-0{statement}-01" for emotion in (1, 2, 3, 5) for statement in (1, 2)]
    ids = {actor: [f"{name}-{actor}" for name in names] for actor in ("01", "11", "04", "10")}
    folds = tmp_path / "folds.json"
    folds.write_text(json.dumps({"a": [*ids["01"], "elsewhere"], "b": ids["11"], "c": ids["04"] + ids["10"]}))
    with pytest.raises(CorpusError, match=r"lacks, elsewhere \(the first in fold 'a'\)"):
        emobox.main([*arguments, "--folds", str(folds)])
    emobox.main([*arguments, "--recipes", "--folds", str(folds), "--allow_missing"])
    printed = capsys.readouterr().out
    assert "left out 1: the folds name it and the corpus lacks it (elsewhere)" in printed
    assert "| baseline of seconds | 3 |" in printed and "EmoBox" not in printed
    folds.write_text(json.dumps({"a": ids["01"][:2], "b": [*ids["01"][2:], *ids["04"]]}))
    with pytest.raises(CorpusError, match="same speakers on both sides, ravdess-01"):
        emobox.main([*arguments, "--folds", str(folds)])


def test_another_corpus_needs_its_folds_and_classes(emobox, arguments):
    with pytest.raises(SystemExit, match="--labels"):
        emobox.main([*arguments, "--corpus", "emo_db"])
    options = emobox.make_parser().parse_args([*arguments, "--corpus", "emo_db", "--labels", "Angry"])
    with pytest.raises(SystemExit, match="--folds"):
        emobox.read_fold_rows(options, {"id": [], "speaker": []}, None)


def test_the_table_has_means_spreads_and_each_folds_figure(emobox):
    folds = {
        "1": {"uar": 0.5, "accuracy": 0.6, "macro_f1": 0.4, "seconds": 1.0},
        "2": {"uar": 0.7, "accuracy": 0.8, "macro_f1": 0.6, "seconds": 2.0},
    }
    row = emobox.table({"mine": folds}, with_published=False).splitlines()[-1]
    assert row == "| mine | 2 | 60.0 | 70.0 | 50.0 ± 14.1 | 40.0, 60.0 | 3 |"
    head, _, row = emobox.fold_table({"mine": folds}).splitlines()
    assert head == "| UA, WA, macro-F1 | fold 1 | fold 2 |"
    assert row == "| mine | 50.0, 60.0, 40.0 | 70.0, 80.0, 60.0 |"


def test_an_ensemble_of_seeds_decides_by_the_mean_of_their_probabilities(emobox):
    """Of three clips each seed has two right and the two together all."""
    label_set = LabelSet(["A", "B", "C"], ())
    said = ([[0.9, 0.1, 0], [0.6, 0.4, 0], [0, 0, 1]], [[0.6, 0.4, 0], [0, 1, 0], [0.1, 0.5, 0.4]])
    runs = [{"1": {"labels": [0, 1, 2], "probabilities": own, "metrics": {"seconds": 2.0}}} for own in said]
    assert emobox.ensemble_of(runs, label_set) == {"1": {"uar": 1, "accuracy": 1, "macro_f1": 1, "seconds": 4.0}}
    assert emobox.ensemble_of(runs[:1], label_set)["1"]["accuracy"] == pytest.approx(2 / 3)


def test_seeds_are_averaged_fold_by_fold(emobox):
    runs = [
        {"1": {"uar": 0.5, "seconds": 1.0}, "2": {"uar": 0.6}},
        {"1": {"uar": 0.7, "seconds": 4.0}, "2": {"uar": 1}},
    ]
    assert emobox.mean_of(runs) == {"1": {"uar": pytest.approx(0.6), "seconds": 2.5}, "2": {"uar": pytest.approx(0.8)}}


def test_those_who_adapt_are_others_of_the_speaker_of_all_emotions_or_of_one(emobox):
    labels = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    speakers = np.array(["a"] * 6 + ["b"] * 2)
    for seed in range(5):
        generator = np.random.default_rng(seed)
        three = emobox.choose(0, labels, speakers, 3, True, generator)
        assert 0 not in three and sorted(labels[three]) == [0, 1, 2]
        assert sorted(emobox.choose(0, labels, speakers, 9, True, generator)) == [1, 2, 3, 4, 5]
        one = emobox.choose(4, labels, speakers, 2, False, generator)
        assert len(set(labels[one])) == 1 and set(one) <= {0, 1, 2, 3, 5}
    assert emobox.choose(0, labels[:1], speakers[:1], 3, False, generator) == []


def test_the_table_of_adaptation_holds_systems_that_can_be_adapted(emobox):
    cases = [f"balanced, {count}" for count in emobox.BALANCED] + [
        f"one emotion, {count}" for count in emobox.ONE_EMOTION
    ]
    folds = {name: {"macro_f1": 0.5, **dict.fromkeys(cases, f1)} for name, f1 in (("1", 0.6), ("2", 0.7))}
    text = emobox.adaptation_table({"mine": folds, "baseline": {"1": {"macro_f1": 0.9}}}).splitlines()
    assert len(text) == 3 and text[2] == "| mine | 50.0 |" + " 65.0 |" * len(cases)
