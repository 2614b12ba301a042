"""Every option of `sailer train` reaches what it sets: runs through the command line, looked at from within.

Figures are computed anew from the corpus' file and the saved system; each of these tests has been seen to fail with
its subject taken out (tests/wiring.md).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from scipy.special import log_softmax, rel_entr

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.data import LabelSet, load_corpus
from sailer.data.augmentation import AugmentationSettings, plan_epoch

from .recorded_training import (
    ANNOTATORS,
    LABELS,
    MAJORITY,
    Record,
    distributions,
    read_corpus,
    recording,
    write_corpus,
)

SEED, BATCH = 3, 8
OPTIONS = {
    "corpus": "manifest",
    "corpus_options": "{}",
    "seed": SEED,
    "hidden_size": 16,
    "freeze_audio": "true",
    "freeze_text": "true",
    "num_train_epochs": 1,
    "per_device_train_batch_size": BATCH,
    "dataloader_num_workers": 0,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "save_strategy": "no",
    "load_best_model_at_end": "false",
    "shuffled_label_baseline": "false",
    "annotation_dropout": 0,
    "mixing_probability": 0,
    "use_cpu": "true",
    "disable_tqdm": "true",
}
AUGMENTATIONS = {
    "annotation_dropout": 0.2,
    "mixing_probability": 0.5,
    "text_dropout": 0.3,
    "undersample_majority": 0.25,
    "speed_perturbation": 0.25,
}
EPOCHS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def train(corpus: Path, folder: Path, **options: Any) -> Record:
    """A run through the command line; the finished system is in the folder."""
    given = OPTIONS | {"data_dir": corpus, "output_dir": folder} | options
    with recording() as record:
        assert main(["train", "demo", *(f"--{name}={value}" for name, value in given.items())]) == 0
    return record


def logged(folder: Path, name: str) -> list[float]:
    """Every value of a figure in the training log."""
    log = json.loads((folder / "training_log.json").read_text())
    return [entry[name] for entry in log if name in entry]


@pytest.fixture(scope="module")
def augmented(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """Three epochs with every augmentation of the plan, and the paper's objective."""
    folder = tmp_path_factory.mktemp("augmented") / "run"
    return folder, train(corpus, folder, num_train_epochs=EPOCHS, **AUGMENTATIONS)


def epochs_of(record: Record) -> list[list[dict[str, Any]]]:
    items = record.items()
    assert len(items) % EPOCHS == 0
    return [items[start : start + len(items) // EPOCHS] for start in range(0, len(items), len(items) // EPOCHS)]


def test_every_epoch_hears_the_clips_of_its_own_plan_in_its_own_order(augmented: tuple, corpus: Path) -> None:
    rows = load_corpus("manifest", corpus, audio=False)["train"]
    orders = []
    for epoch, heard in enumerate(epochs_of(augmented[1])):
        plan = plan_epoch(rows, AugmentationSettings(**AUGMENTATIONS), LabelSet(), SEED, epoch)
        order = np.arange(len(plan))
        np.random.default_rng([SEED, epoch]).shuffle(order)
        assert [item["index"] for item in heard] == [plan[int(row)]["index"] for row in order]
        for item, row in zip(heard, order, strict=True):
            planned = plan[int(row)]
            np.testing.assert_equal({name: item[name] for name in planned}, planned)  # NaN where unknown
            clips = [rows[planned["index"]]["id"]]
            if planned["partner"] >= 0:
                clips.insert(0 if planned["partner_first"] else 1, rows[planned["partner"]]["id"])
            assert item["clips"] == clips
        orders.append([(item["index"], item["gap"]) for item in heard])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({tuple(sorted(index for index, _ in order)) for order in orders}) == EPOCHS, "undersampled anew"


def test_the_targets_follow_from_the_annotators_votes(augmented: tuple, corpus: Path) -> None:
    """Of five votes, a fifth is one: each clip loses one vote for a majority class, if it has any."""
    rows = {row["id"]: row for row in read_corpus(corpus, "train")}
    mixes = alone = 0

    def left(clip: str) -> list[np.ndarray]:
        """Distributions that may be left of a clip's votes."""
        (votes,) = distributions([rows[clip]]) * ANNOTATORS
        drops = [np.eye(len(LABELS))[LABELS.index(name)] for name in MAJORITY if votes[LABELS.index(name)] > 0.5]
        return [(votes - drop) / (ANNOTATORS - 1) for drop in drops] or [votes / ANNOTATORS]

    for batch in augmented[1].batches:
        for number, item in enumerate(batch["items"]):
            target = batch["labels"][number].numpy()
            possible = left(item["clips"][0])
            if len(item["clips"]) == 2:
                possible = [(one + other) / 2 for one in possible for other in left(item["clips"][1])]
                labels = {rows[clip]["label"] for clip in item["clips"]}
                assert len(labels & set(MAJORITY)) == 1 and not labels & {"no agreement", "Other"}
                mixes += 1
            else:
                alone += rows[item["clips"][0]]["label"] in MAJORITY
            assert min(np.abs(target - other).max() for other in possible) < 1e-6
            ratings = [
                [(float(rows[clip][name]) - 1) / 6 for clip in item["clips"]]
                for name in ("arousal", "valence", "dominance")
            ]
            np.testing.assert_allclose(batch["attribute_labels"][number], np.mean(ratings, axis=1), atol=1e-6)
    assert 0.25 < mixes / (mixes + alone) < 0.75, "half of the majority classes' clips are mixed"


def test_what_is_heard_and_read_is_what_the_plan_says(augmented: tuple, corpus: Path) -> None:
    rows = {row["id"]: row for row in read_corpus(corpus, "train")}
    withheld = []
    for batch in augmented[1].batches:
        for number, item in enumerate(batch["items"]):
            lengths = [soundfile.info(corpus.parent / rows[clip]["audio"]).frames for clip in item["clips"]]
            gap = max(round(item["gap"] * 16000), -min(lengths)) if len(lengths) == 2 else 0
            frames = int(batch["attention_mask"][number].sum())
            assert abs(frames - (sum(lengths) + gap) / item["speed"] / 160) <= 1
            tokens = int(batch["text_attention_mask"][number].sum())
            words = sum(len(rows[clip]["transcript"].split()) for clip in item["clips"])
            assert tokens == 0 if item["drop_text"] else tokens >= words
            withheld.append(item["drop_text"])
    assert 0.15 < np.mean(withheld) < 0.45


def weights_by_hand(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prior q and weights 1 / (K q) of the training clips' targets."""
    prior = targets[~np.isnan(targets).any(axis=1)].mean(axis=0)
    weights = np.divide(1, (prior > 0).sum() * prior, out=np.zeros_like(prior), where=prior > 0)
    return prior, weights


def one_hot(rows: list[dict[str, str]]) -> np.ndarray:
    """(clips, 9) the published labels, NaN without agreement."""
    return np.array(
        [np.eye(9)[LABELS.index(row["label"])] if row["label"] in LABELS else [np.nan] * 9 for row in rows]
    )


def primary_by_hand(
    kind: str, weighting: str, logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, shift: np.ndarray
) -> float:
    """The primary loss of a batch, from the paper's formulas."""
    total = 0.0
    for target, scores in zip(targets, logits.astype(np.float64) + shift, strict=True):
        if np.isnan(target).any():
            continue  # counts in the denominator alone
        log_p = log_softmax(scores)
        t = {"product": target * weights, "normalized": target * weights / (target @ weights), "none": target}[
            weighting
        ]
        if kind == "kl":
            total += sum(a * (np.log(a) - b) for a, b in zip(t, log_p, strict=True) if a > 0)
        else:
            total -= (t * (1 - np.exp(log_p)) ** (1.0 if kind == "focal" else 0.0) * log_p).sum()
    return total / len(targets)


def assert_loss_is(
    folder: Path,
    record: Record,
    corpus: Path,
    kind: str = "kl",
    weighting: str = "product",
    tau: float = 0.0,
    secondary_weight: float = 1.0,
) -> None:
    """The logged losses are those that the formulas give of what the model said and what it was to say."""
    rows = read_corpus(corpus, "train")
    everything = one_hot(rows) if kind == "ce" else distributions(rows)
    prior, weights = weights_by_hand(everything)
    shift = tau * np.log(np.where(prior > 0, prior, prior[prior > 0].min())) if tau else np.zeros(9)
    assert len(record.losses) == len(record.batches) == len(logged(folder, "loss"))
    for step, call in enumerate(record.losses):
        logits, targets = call["outputs"]["logits"].numpy(), record.batches[step]["labels"].numpy()
        primary = primary_by_hand(kind, weighting, logits, targets, weights, shift)
        assert primary == pytest.approx(logged(folder, "loss_primary")[step], rel=1e-4)
        parts = {
            name: values[step]
            for name in ("secondary", "attributes", "sex", "age")
            if (values := logged(folder, f"loss_{name}"))
        }
        if "secondary" in parts:
            parts["secondary"] *= secondary_weight
        assert primary + sum(parts.values()) == pytest.approx(logged(folder, "loss")[step], rel=1e-4)


def test_the_papers_objective_is_what_is_trained(augmented: tuple, corpus: Path) -> None:
    assert_loss_is(*augmented, corpus)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weighting", "more"),
    [
        ("kl", "none", {}),
        ("kl", "normalized", {"secondary_weight": 0.3}),
        ("kl", "none", {"logit_adjustment_train": 1.0}),
        ("soft_ce", "product", {}),
        ("focal", "product", {"focal_gamma": 1.0}),
        ("ce", "none", {}),
    ],
)
def test_the_objective_and_the_weighting_are_those_that_were_asked_for(
    kind: str, weighting: str, more: dict[str, float], corpus: Path, tmp_path: Path
) -> None:
    options = {"objective": kind, "target_weighting": weighting, "heads": "[primary,secondary]", **more}
    record = train(corpus, tmp_path / "run", **options)
    tau, secondary = more.get("logit_adjustment_train", 0.0), more.get("secondary_weight", 1.0)
    assert_loss_is(tmp_path / "run", record, corpus, kind, weighting, tau, secondary)


@pytest.mark.slow
def test_the_attributes_may_be_judged_by_their_concordance(corpus: Path, tmp_path: Path) -> None:
    options = {
        "heads": "[attributes]",
        "attribute_loss": "ccc",
        "attribute_weight": 0.5,
        "metric_for_best_model": "ccc",
    }
    record = train(corpus, tmp_path / "run", **options)
    for step, call in enumerate(record.losses):
        said, truth = call["outputs"]["attributes"].double().numpy(), record.batches[step]["attribute_labels"].numpy()
        ccc = [
            2 * np.cov(x, y, bias=True)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
            for x, y in zip(said.T, truth.T.astype(np.float64), strict=True)
        ]
        assert logged(tmp_path / "run", "loss")[step] == pytest.approx(0.5 * (1 - np.mean(ccc)), rel=1e-4)


@pytest.mark.slow
def test_manifold_mixup_mixes_the_targets_of_a_batch(corpus: Path, tmp_path: Path, augmented: tuple) -> None:
    record = train(corpus, tmp_path / "run", manifold_mixup=0.5, heads="[primary]")
    for batch, call in zip(record.batches, record.losses, strict=True):
        own, mixed = batch["labels"].double(), call["targets"]["labels"].double()
        assert (own - mixed).abs().max() > 0.05
        # Each mixed target lies on the line between its own and some other of the batch.
        for one, got in zip(own, mixed, strict=True):
            assert min(_off_the_line(one, other, got) for other in own) < 1e-5
    for batch, call in zip(augmented[1].batches, augmented[1].losses, strict=True):
        torch.testing.assert_close(batch["labels"], call["targets"]["labels"], rtol=0, atol=0)


@pytest.mark.slow
def test_kept_states_are_mixed_within_a_batch(corpus: Path, tmp_path: Path) -> None:
    kept = {"text_backbone": "null", "cache_features": "memory", "frame_pooling": 16, "heads": "[primary]"}
    record = train(corpus, tmp_path / "run", augmentation_variants=1, state_mixup=0.5, **kept)
    for batch, call in zip(record.batches, record.losses, strict=True):
        own, mixed = batch["labels"].double(), call["targets"]["labels"].double()
        assert (own - mixed).abs().max() > 0.05
        for one, got in zip(own, mixed, strict=True):
            assert min(_off_the_line(one, other, got) for other in own) < 1e-5


@pytest.mark.slow
def test_states_are_kept_in_the_precision_of_the_training(corpus: Path, tmp_path: Path) -> None:
    """Those of one precision are none of another's: three runs make two sets of sounds' and transcripts' states."""
    for name, bf16, sets in (("exact", "false", 1), ("half", "true", 2), ("again", "true", 2)):
        options = {"bf16": bf16, "cache_features": "disk", "feature_cache_dir": tmp_path / "states"}
        train(corpus, tmp_path / name, augmentation_variants=1, **options)
        assert len(list((tmp_path / "states").glob("*.safetensors"))) == 2 * sets


def _off_the_line(start: torch.Tensor, end: torch.Tensor, point: torch.Tensor) -> float:
    """How far a point is from the line between two others."""
    way = end - start
    share = ((point - start) @ way / (way @ way)).clamp(0, 1) if way.any() else 0
    return float((start + share * way - point).abs().max())


@pytest.fixture(scope="module")
def consensus(corpus: Path, tiny_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    """A run on hard targets whose clips are cut at half a second, of a system that hears what dropout takes away."""
    folder = tmp_path_factory.mktemp("consensus") / "run"
    return folder, train(corpus, folder, objective="ce", base_model=tiny_sailer, max_seconds=0.5)


def test_hard_targets_are_the_published_labels(consensus: tuple, corpus: Path) -> None:
    folder, record = consensus
    rows = read_corpus(corpus, "train")
    hard = dict(zip((row["id"] for row in rows), one_hot(rows), strict=True))
    for batch in record.batches:
        expected = np.array([hard[item["clips"][0]] for item in batch["items"]])
        np.testing.assert_array_equal(batch["labels"].numpy(), expected)
        assert batch["attention_mask"].sum(1).max() <= 50 < batch["attention_mask"].shape[1]
    assert_loss_is(folder, record, corpus, kind="ce")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_is_of_the_saved_system_against_the_annotators(consensus: tuple, corpus: Path, split: str) -> None:
    """Without dropout, without weights, on soft targets also where training is on hard ones; clip by clip by hand."""
    folder = consensus[0]
    rows = read_corpus(corpus, split)
    model = SailerForAudioClassification.from_pretrained(folder).eval()
    processor = SailerProcessor.from_pretrained(folder)
    logits = []
    for row in rows:
        waveform, rate = soundfile.read(corpus.parent / row["audio"], dtype="float32")
        inputs = processor(audio=waveform[:8000], text=row["transcript"], sampling_rate=rate)
        with torch.no_grad():
            logits.append(model(**inputs).logits[0].double().numpy())
    log_p, soft = log_softmax(np.array(logits), axis=1), distributions(rows)
    figures = json.loads((folder / "metrics.json").read_text())[split]
    assert figures["loss_primary"] == pytest.approx(-(soft * log_p).sum(1).mean(), rel=1e-4)
    floored = np.exp(log_p).clip(min=1e-12)  # as the metric does
    assert figures["kl"] == pytest.approx(rel_entr(soft, floored).sum(1).mean(), rel=1e-4)
    scored = [index for index, row in enumerate(rows) if row["label"] in LABELS[:-1]]
    decided = np.argmax(np.array(logits)[scored][:, :-1], axis=1)
    truth = np.array([LABELS.index(rows[index]["label"]) for index in scored])
    assert figures["accuracy"] == pytest.approx(np.mean(decided == truth))
    if split == "validation":
        assert logged(folder, "eval_loss_primary") == [pytest.approx(figures["loss_primary"], rel=1e-5)]
