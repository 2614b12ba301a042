"""Several seeds in one call: each kept, gone on with, summed up by Student's t; through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from sailer.cli import main
from sailer.settings import SettingsError, load_recipe, resolve
from sailer.train import prepare
from sailer.training.seeds import check_seeds, summarize

from .small_runs import run_options, write_corpus


def test_mean_deviation_and_interval_by_hand() -> None:
    runs = [(0.4, 1.0), (0.5, None), (0.6, 3.0)]
    figures = {
        seed: {"test": {"macro_f1": f1, "min_map": score, "loss": 1.0, "runtime": 2.0}, "wall_seconds": 5.0}
        for seed, (f1, score) in enumerate(runs)
    }
    summary = summarize(figures)
    assert summary["seeds"] == [0, 1, 2] and list(summary["splits"]) == ["test"]
    assert list(summary["splits"]["test"]) == ["macro_f1", "min_map"]
    found = summary["splits"]["test"]["macro_f1"]
    assert found["values"] == [0.4, 0.5, 0.6]
    assert (found["mean"], found["deviation"]) == (pytest.approx(0.5), pytest.approx(0.1))
    reach = 4.302653 * 0.1 / 3**0.5  # a table of Student's t: 97.5 %, 2 degrees of freedom
    assert found["interval"] == pytest.approx([0.5 - reach, 0.5 + reach], abs=1e-6)
    other = summary["splits"]["test"]["min_map"]  # of the two that there are: sqrt(2), 1 degree of freedom
    assert (other["mean"], other["deviation"]) == (pytest.approx(2.0), pytest.approx(2**0.5))
    assert other["interval"] == pytest.approx([2 - 12.706205, 2 + 12.706205], abs=1e-5)
    assert "2 degrees of freedom" in summary["method"]


def test_one_seed_has_no_interval() -> None:
    found = summarize({7: {"test": {"macro_f1": 0.5, "min_map": None}}})
    assert found["splits"]["test"]["macro_f1"] == {"values": [0.5], "mean": 0.5, "deviation": None, "interval": None}
    assert found["splits"]["test"]["min_map"]["mean"] is None and "no interval" in found["method"]


@pytest.mark.parametrize("given", ["0,1,2", [0, 1, 2], ["0", 1, 2], "0, 1, 2"])
def test_seeds_are_read_in_every_form(given: object) -> None:
    assert resolve({"audio_backbone": "tiny-whisper"}, {"seeds": given}).data.seeds == [0, 1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0,1,0"], "seeds is [0, 1, 0]: 0 is there twice"),
        (["--seeds", "0", "--seed", "0"], "seed is 0 beside seeds: each run has one of the seeds"),
        (["--seeds", "0,1.5"], "Option 'seeds' (command line) is '0,1.5', expected list[int]"),
        (["--seeds", "one"], "Option 'seeds' (command line) is 'one', expected list[int]"),
        (["--seeds", "-1"], "seeds is [-1]: give whole numbers from 0"),
        (["--seeds", "[]"], "seeds is []: give whole numbers from 0"),
        (["--seeds", "0,1", "--push_to_hub", "true"], "sailer push OUTPUT/seed-N REPO_ID"),
        (["--seeds", "0,1", "--resume_from_checkpoint", "true"], "goes on by itself"),
    ],
)
def test_seeds_that_cannot_be_used_are_refused(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main(["train", "demo", "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_system_on_a_tiny_backbone_begins_as_its_seed_says(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")

    def heads(seed: int, place: str) -> torch.Tensor:
        words = [word.removeprefix("--").split("=", 1) for word in run_options(corpus, tmp_path / place)[2:]]
        given = {name: yaml.safe_load(value) for name, value in words} | {"seed": seed}
        heads = prepare(resolve(load_recipe("demo"), given)).system.model.heads
        return torch.cat([parameter.detach().flatten() for parameter in heads.parameters()])

    first = heads(0, "a")
    assert not torch.equal(first, heads(1, "b"))
    assert torch.equal(first, heads(0, "a")), "the backbone is there already, which changes nothing"


def test_a_recipe_s_own_seed_stands_back() -> None:
    check_seeds([0, 1], {"seed": None, "push_to_hub": False})
    with pytest.raises(SettingsError, match="beside seeds"):
        check_seeds([0, 1], {"seed": 0})


@pytest.mark.slow
def test_each_seed_is_kept_gone_on_with_and_summed_up(tmp_path: Path, monkeypatch, capsys) -> None:
    import sailer.train

    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "out"
    options = run_options(corpus, out, seeds="0,1", cache_features="memory")
    with monkeypatch.context() as patch:  # cut short after the second one's training

        def cut(model, validation):
            if (out / "seed-0" / "metrics.json").is_file():
                raise KeyboardInterrupt

        patch.setattr(sailer.train, "calibrate", cut)
        assert main(options) == 130
    assert (out / "seed-0" / "README.md").is_file() and not (out / "seed-1" / "metrics.json").exists()
    assert list((out / "seed-1" / "checkpoints").glob("checkpoint-*")) and not (out / "seeds.json").exists()
    shards = sorted((out / "features").iterdir())
    assert shards, "what both hear is kept in one place"
    written = (out / "seed-0" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()

    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "seed 0 is finished" in printed and "epoch 1: loss" not in printed  # the half one went on from its end
    assert (out / "seed-0" / "model.safetensors").stat().st_mtime_ns == written
    assert sorted((out / "features").iterdir()) == shards, "nothing was encoded again"
    summary = json.loads((out / "seeds.json").read_text())
    for seed in (0, 1):
        figures = json.loads((out / f"seed-{seed}" / "metrics.json").read_text())
        assert summary["splits"]["test"]["accuracy"]["values"][seed] == figures["test"]["accuracy"]
        assert summary["splits"]["test"]["kl"]["values"][seed] == figures["test"]["kl"]
    kl = summary["splits"]["test"]["kl"]
    assert kl["values"][0] != kl["values"][1] and kl["interval"][0] < kl["mean"] < kl["interval"][1]
    report = (out / "report.md").read_text()
    assert "Student's t distribution with 1 degree of freedom" in report and f"| kl | {kl['mean']:.3f} |" in report
    card = ModelCard.load(out / "seed-1" / "README.md")
    assert "This system is that of seed 1; others were trained by the same recipe with the seeds 0." in card.text
    assert f"| kl | {kl['mean']:.3f} |" in card.text.split("## With other seeds")[1]

    shutil.copy(out / "seed-0" / "metrics.json", tmp_path)
    assert main([*options, "--num_train_epochs", "3"]) == 2
    assert "num_train_epochs (2" in capsys.readouterr().err
    assert (out / "seed-0" / "metrics.json").read_bytes() == (tmp_path / "metrics.json").read_bytes()
