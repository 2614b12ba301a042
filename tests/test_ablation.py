"""The ablation benchmark: speaker-disjoint folds, simulated votes, equal runs shared, intervals, resuming, a table."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import DatasetDict

from sailer.data.labels import consensus
from sailer.data.schema import NO_AGREEMENT, LabelSet, build_dataset

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "ablation.py"
TINY = {"train_clips": 24, "validation_clips": 12, "test_clips_per_class": 1, "speakers": 6}


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # where Python looks for its parts when it runs the script
    spec = importlib.util.spec_from_file_location("ablation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(ablation: ModuleType) -> argparse.Namespace:
    options = ablation.make_parser().parse_args(["--audio_backbone", "tiny-whisper", "--seeds", "0", "1"])
    options.ravdess = Path("ravdess")
    return options


def test_folds_are_disjoint_and_each_actor_is_tested_once(ablation):
    folds = [ablation.fold_actors(fold) for fold in range(1, 6)]
    assert sorted(actor for fold in folds for actor in fold["test_actors"]) == list(range(1, 21))
    for fold in folds:
        assert sorted(actor for actors in fold.values() for actor in actors) == list(range(1, 21))
        assert [len(fold[name]) for name in ("test_actors", "validation_actors", "train_actors")] == [4, 2, 14]
        # Odd actors are male, even ones female: as many of each in every split.
        assert all(sum(actor % 2 for actor in actors) * 2 == len(actors) for actors in fold.values())


def test_every_row_resolves_and_equal_runs_are_one(ablation, options):
    groups = ablation.rows_to_run(options)
    keys: dict[str, set[str]] = {}
    for corpus, parts in groups.items():
        for part, rows in parts.items():
            for row in rows:
                runs = ablation.runs_of(corpus, row, options)
                assert len(runs) == {"synthetic": 2, "ravdess": 5, "ravdess_votes": 10}[corpus]
                for recipe in runs.values():
                    ablation.resolve(ablation.options_of(recipe))
                keys.setdefault(f"{corpus} {part} {row.setting}", set()).update(runs)
    both = keys["synthetic augmentation (Table 3) both"]
    assert keys["synthetic auxiliary targets (Table 4) none"] == both
    assert keys["synthetic layers last layer"] == keys["synthetic objective kl to the votes"]
    assert keys["synthetic layers last layer"].isdisjoint(both)


def test_a_recipe_keeps_its_settings_but_not_its_splits(ablation, options, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "corpus: ravdess\naudio_backbone: other\nlearning_rate: 0.25\ncorpus_options: {test_actors: 1}\n"
    )
    options.recipes = [str(recipe)]
    row, fine_tuned = ablation.rows_to_run(options)["ravdess"]["recipe"]
    runs = list(ablation.runs_of("ravdess", row, options).values())
    assert row.setting == "mine" and "fine-tuned" in fine_tuned.setting
    assert [run["learning_rate"] for run in runs] == [0.25] * 5
    assert {run["audio_backbone"] for run in runs} == {"tiny-whisper"}
    assert runs[1]["corpus_options"]["test_actors"] == [5, 6, 7, 8]


def test_without_ravdess_its_rows_are_left_out_and_said_so(ablation, options, capsys):
    options.ravdess = None
    assert list(ablation.rows_to_run(options)) == ["synthetic"]
    assert "--ravdess" in capsys.readouterr().err


def test_a_seed_draws_actors_clips_and_votes_and_its_rows_share_them(ablation, options):
    rows = ablation.GROUPS["ravdess_votes"]["augmentation (Table 3)"]
    by_row = [list(ablation.runs_of("ravdess_votes", row, options).values()) for row in rows]
    for runs in zip(*by_row, strict=True):
        assert len({json.dumps([run["corpus_options"], run["votes"], run["seed"]]) for run in runs}) == 1
        actors = runs[0]["corpus_options"]
        assert [len(actors[name]) for name in ("test_actors", "validation_actors", "train_actors")] == [6, 2, 12]
        assert sorted(actor for split in actors.values() for actor in split) == list(range(1, 21))
        assert all(sum(actor % 2 for actor in split) * 2 == len(split) for split in actors.values())
    assert len({str(run["corpus_options"]) for run in by_row[0]}) == 10
    assert by_row[0][0]["frame_pooling"] == 64 and "annotation_dropout" not in by_row[0][0]


def test_training_clips_are_as_rare_as_in_the_challenge_and_have_votes(ablation):
    names = ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Other"]
    label_set = LabelSet(names, ["Angry", "Happy", "Neutral"])
    labels = np.repeat(np.arange(5), 100)
    rows = build_dataset(
        {"id": [str(row) for row in range(500)], "votes": np.eye(6)[labels], "label": labels}, label_set
    )
    corpus = DatasetDict({"train": rows, "test": rows})
    options = {"seed": 3, "annotators": 5, "fewest": 7}
    found = ablation.with_votes(corpus, label_set, **options)
    assert found["test"] is rows and found["train"].features == rows.features
    acted = labels[[int(clip) for clip in found["train"]["id"]]]
    # Of 100 Neutral clips 29,243 in the challenge; Angry 6,731, Happy 16,717; Disgust and Fear would be 5 and 4.
    assert np.bincount(acted).tolist() == [23, 7, 7, 57, 100]
    votes, label = np.array(found["train"]["votes"]), np.array(found["train"]["label"])
    assert set(votes.sum(axis=1)) == {5, 6, 7}
    np.testing.assert_array_equal(label, consensus(votes))
    assert 0.1 < (label == NO_AGREEMENT).mean() < 0.35 and 0.45 < (label == acted).mean() < 0.8
    again = ablation.with_votes(corpus, label_set, **options)["train"]
    assert again["votes"] == found["train"]["votes"]
    other = ablation.with_votes(corpus, label_set, **options | {"seed": 4})["train"]
    assert other["id"] != found["train"]["id"]


def test_means_spreads_and_paired_gains(ablation, options):
    first, second = ablation.Row("first", paper=(0.401, 0.301)), ablation.Row("second", {"audio_layers": "weighted"})
    groups = {"synthetic": {"layers": (first, second)}}

    def figures(macro_f1: float) -> dict:
        return {"metrics": {"macro_f1": macro_f1, "accuracy": 0.5, "min_map": 0.25}}

    keys = [list(ablation.runs_of("synthetic", row, options)) for row in (first, second)]
    records = {keys[0][0]: figures(0.2), keys[0][1]: figures(0.4), keys[1][0]: figures(0.3), keys[1][1]: figures(0.52)}
    lines = ablation.table(groups, records, options)
    assert lines[0]["macro_f1"] == pytest.approx((0.3, 0.02**0.5))
    assert lines[0]["macro_f1_gain"] is None
    # The differences are 0.1 and 0.12: standard error 0.01, and with one degree of freedom t is 12.706.
    assert lines[1]["macro_f1_gain"] == pytest.approx((0.11, 0.11 - 0.12706, 0.11 + 0.12706), abs=1e-4)
    assert lines[1]["min_map_gain"] == (0, 0, 0)
    text = ablation.markdown(lines).splitlines()
    assert len({line.count("|") for line in text}) == 1
    assert text[2] == (
        "| synthetic | layers | first | 2 | 0.300 ± 0.141 | 0.500 ± 0.000 | 0.250 ± 0.000 |  |  | 0.401, 0.301 |"
    )
    assert "| +0.110 (-0.017 to +0.237) | +0.000 (+0.000 to +0.000) |  |" in text[3]
    records[keys[1][1]] = figures(0.51)  # now 0.1 and 0.11: 0.105 and 12.706 times 0.005
    assert "| **+0.105** (+0.041 to +0.169) |" in ablation.markdown(ablation.table(groups, records, options))

    del records[keys[1][1]]
    one = ablation.table(groups, records, options)[1]
    assert one["runs"] == 1 and one["macro_f1_gain"][0] == pytest.approx(0.1)
    assert "| +0.100 | +0.000 |" in ablation.markdown([one])
    assert len(ablation.markdown(ablation.table(groups, {}, options)).splitlines()) == 2
    assert ablation.table(groups, {}, options)[1]["macro_f1"] is None


def test_a_line_that_was_cut_short_counts_as_not_run(ablation, tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"key": "a", "metrics": {}}\n{"key": "b", "met')
    assert list(ablation.finished(tmp_path)) == ["a"]
    assert ablation.finished(tmp_path / "elsewhere") == {}


@pytest.mark.slow
def test_a_tiny_table_is_written_and_a_second_call_trains_nothing(ablation, tmp_path, monkeypatch, capsys):
    pytest.importorskip("espeakng_loader")
    rows = {"weighting": ablation.GROUPS["synthetic"]["weighting"][1:], "layers": ablation.LAYERS[:1]}
    monkeypatch.setitem(ablation.GROUPS, "synthetic", rows)
    monkeypatch.setattr(ablation, "SHARED", tmp_path)
    arguments = ["--audio_backbone", "tiny-whisper", "--seeds", "0", "--epochs", "1", "--corpora", "synthetic"]
    arguments += ["--synthetic", json.dumps(TINY), "--output_dir", str(tmp_path / "ablation")]
    arguments += ["--markdown", str(tmp_path / "table.md"), "--json", str(tmp_path / "table.json")]
    ablation.main(arguments)
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "table.json").read_text())
    assert [line["runs"] for line in report["rows"]] == [1, 1, 1]
    assert all(0 <= line["macro_f1"][0] <= 1 for line in report["rows"])
    assert " ".join(arguments) in report["command"] and report["hardware"] and report["date"]
    assert (tmp_path / "table.md").read_text() == printed

    monkeypatch.setattr(ablation, "run", None)
    ablation.main(arguments)
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_a_teacher_is_trained_once_a_seed_judged_and_learned_from(ablation, tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    monkeypatch.setitem(ablation.GROUPS, "synthetic", {"objective": ablation.GROUPS["synthetic"]["objective"]})
    prepared, judged = [], []
    prepare, predict = ablation.prepare, ablation.predict
    monkeypatch.setattr(ablation, "prepare", lambda *given: prepared.append(given[0]) or prepare(*given))
    monkeypatch.setattr(ablation, "predict", lambda *given: judged.append(given[0]) or predict(*given))
    arguments = ["--audio_backbone", "tiny-whisper", "--seeds", "0", "--epochs", "1", "--corpora", "synthetic"]
    arguments += ["--synthetic", json.dumps(TINY), "--output_dir", str(tmp_path)]
    ablation.main([*arguments, "--json", str(tmp_path / "table.json")])
    rows = {
        row["setting"]: row["runs"]
        for row in json.loads((tmp_path / "table.json").read_text())["rows"]
        if row["corpus"] == "synthetic"
    }
    assert list(rows.values()) == [1] * 4 and list(rows)[2:] == [
        "three of the first row, averaged",
        "distilled from those three",
    ]
    # The first row, ce, three teachers and the student; the teachers' mean is judged once, and trains no more.
    objectives = [settings.objective.objective for settings in prepared]
    assert objectives == ["kl", "ce", "kl", "kl", "kl", "distil"]
    (teacher,) = (tmp_path / "teachers").iterdir()
    assert prepared[-1].objective.teacher == str(teacher)
    (ensemble,) = judged
    heads = [member.heads["primary"][-1].weight for member in ensemble.members]
    assert len(heads) == 3 and not any(torch.equal(heads[0], other) for other in heads[1:])


def test_rows_that_fine_tune_keep_no_features(ablation, options):
    fine_tuned = ablation.rows_to_run(options)["ravdess"]["recipe"][-1]
    (first, *_) = ablation.runs_of("ravdess", fine_tuned, options).values()
    assert first["cache_features"] == "off"
    assert ablation.resolve(first).model.trainable_audio_layers == 3
