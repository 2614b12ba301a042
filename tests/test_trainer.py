"""SailerTrainer on a tiny system: named losses, accumulation, exact evaluation losses, selection, mixup."""

from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from sailer import SailerForAudioClassification, SailerProcessor, SailerTrainer, SailerTrainingArguments
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import LabelSet, build_dataset
from sailer.training.losses import ObjectiveSettings, SailerObjective

HEADS = ["primary", "secondary", "attributes", "sex", "age"]


def wav(seconds: float, seed: int) -> bytes:
    import io

    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(seed).normal(0, 0.1, round(16000 * seconds)), 16000, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def rows() -> Dataset:
    random = np.random.default_rng(0)
    clips = 16
    labels = random.integers(0, 9, clips)
    votes = np.eye(9)[labels] * 3 + random.integers(0, 2, (clips, 9))
    attributes = random.random((clips, 3))
    attributes[3] = np.nan
    return build_dataset(
        {
            "id": [f"clip{i}" for i in range(clips)],
            "audio": [{"bytes": wav(0.2 + 0.05 * (i % 4), i)} for i in range(clips)],
            "duration": [0.2 + 0.05 * (i % 4) for i in range(clips)],
            "transcript": ["so happy", "leave me alone", "", "the lazy dog"] * 4,
            "votes": votes,
            "secondary_votes": random.integers(0, 2, (clips, 17)),
            "attributes": attributes,
            "label": [*labels[:-2], -1, -100],
            "sex": ["female", "male", "", "female"] * 4,
            "age": [20.0, np.nan, 44.0, 70.0] * 4,
        }
    )


def trainer(folder, tiny_sailer, rows, plan=None, settings=None, config=None, **options) -> SailerTrainer:
    torch.manual_seed(0)
    model = SailerForAudioClassification.from_pretrained(tiny_sailer, conv_dropout=0.0, **(config or {}))
    processor = SailerProcessor.from_pretrained(tiny_sailer)
    extra = {name: options.pop(name) for name in ("manifold_mixup", "callbacks") if name in options}
    heads = options.pop("heads", HEADS)
    arguments = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "load_best_model_at_end": False,
    }
    return SailerTrainer(
        model,
        SailerTrainingArguments(output_dir=str(folder), **(arguments | options)),
        objective=SailerObjective(settings or ObjectiveSettings(target_weighting="none")),
        train_dataset=PlannedDataset(rows, plan or AugmentationSettings(), LabelSet()),
        eval_dataset=rows,
        data_collator=SailerCollator(processor, LabelSet(), heads),
        processing_class=processor,
        **extra,
    )


def test_each_component_is_logged(tmp_path, tiny_sailer, rows) -> None:
    run = trainer(tmp_path, tiny_sailer, rows)
    run.train()
    train, evaluation = run.state.log_history[0], run.state.log_history[1]
    parts = [train[f"loss_{name}"] for name in HEADS]
    assert all(np.isfinite(parts)) and train["loss"] == pytest.approx(sum(parts), rel=1e-4)
    for name in ("loss", *(f"loss_{head}" for head in HEADS), "macro_f1", "min_map", "ccc", "sex_accuracy", "age_mae"):
        assert f"eval_{name}" in evaluation, name
    assert evaluation["eval_scored_clips"] == 14 - sum(label == 8 for label in rows["label"][:14])


def test_fine_tuned_towers_have_their_own_learning_rate(tmp_path, tiny_sailer, rows) -> None:
    def weights(run: SailerTrainer) -> tuple[torch.Tensor, torch.Tensor]:
        layer = run.model.sailer.audio_encoder.layers[-1].fc1.weight
        return layer.detach().clone(), run.model.heads["primary"][0].weight.detach().clone()

    moved = {}
    for rate in (None, 1e-2):
        run = trainer(
            tmp_path,
            tiny_sailer,
            rows,
            config={"freeze_audio": False},
            backbone_learning_rate=rate,
            learning_rate=1e-3,
            optim="sgd",
            weight_decay=0.1,
            per_device_train_batch_size=16,
            warmup_steps=0,
            max_grad_norm=0,
            lr_scheduler_type="constant",
        )
        before = weights(run)
        run.train()
        moved[rate] = [new - old for new, old in zip(weights(run), before, strict=True)]
        groups = run.optimizer.param_groups
        everything = [parameter for group in groups for parameter in group["params"]]
        assert len(everything) == len(set(everything)) == sum(p.requires_grad for p in run.model.parameters())
        assert {group["weight_decay"] for group in groups if group["lr"] == (rate or 1e-3)} == {0.0, 0.1}
    # One step of plain gradient descent: ten times the rate moves the tower ten times as far, and the heads alike.
    torch.testing.assert_close(moved[1e-2][0], 10 * moved[None][0], rtol=1e-2, atol=1e-7)
    torch.testing.assert_close(moved[1e-2][1], moved[None][1], rtol=1e-5, atol=1e-9)


def test_a_rate_for_towers_that_do_not_train_is_refused(tmp_path, tiny_sailer, rows) -> None:
    with pytest.raises(ValueError, match="no tower trains: set freeze_audio"):
        trainer(tmp_path, tiny_sailer, rows, backbone_learning_rate=1e-4).train()
    with pytest.raises(ValueError, match="backbone_learning_rate is 0"):
        SailerTrainingArguments(output_dir=str(tmp_path), backbone_learning_rate=0.0)


def step_with(folder, tiny_sailer, rows, batch: int, accumulation: int) -> dict[str, torch.Tensor]:
    run = trainer(
        folder,
        tiny_sailer,
        rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        warmup_steps=0,
        max_grad_norm=1e9,
        eval_strategy="no",
    )
    run.train()
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_accumulation_changes_no_step(tmp_path, tiny_sailer, rows) -> None:
    whole = step_with(tmp_path / "1x8", tiny_sailer, rows, 8, 1)
    halves = step_with(tmp_path / "2x4", tiny_sailer, rows, 4, 2)
    before = SailerForAudioClassification.from_pretrained(tiny_sailer).state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, atol=1e-6, rtol=1e-4, msg=name)
    moved = [name for name in whole if not torch.equal(whole[name], before[name])]
    assert "heads.primary.2.weight" in moved and not [name for name in moved if "_encoder." in name]


def test_evaluation_loss_is_the_mean_over_clips(tmp_path, tiny_sailer, rows) -> None:
    whole = trainer(tmp_path, tiny_sailer, rows, per_device_eval_batch_size=16).evaluate()
    uneven = trainer(tmp_path, tiny_sailer, rows, per_device_eval_batch_size=5).evaluate()
    for name in ("eval_loss", *(f"eval_loss_{head}" for head in HEADS), "eval_kl"):
        assert uneven[name] == pytest.approx(whole[name], rel=1e-5)
    assert whole["eval_loss_primary"] == pytest.approx(whole["eval_kl"], rel=1e-4)


def test_evaluation_batches_are_of_like_length_and_the_order_is_kept(tmp_path, tiny_sailer, rows) -> None:
    run = trainer(tmp_path, tiny_sailer, rows, per_device_eval_batch_size=4)
    widths = [batch["attention_mask"].sum(1).unique().tolist() for batch in run.get_eval_dataloader()]
    assert widths == [[35], [30], [25], [20]]
    prediction = run.predict(rows)
    assert prediction.label_ids["consensus"].tolist() == rows["label"]
    one_by_one = run.predict(rows.remove_columns("duration"))
    for name, values in prediction.predictions.items():
        np.testing.assert_allclose(values, one_by_one.predictions[name], rtol=1e-5, atol=1e-5)


def test_log_mel_may_be_made_by_the_trainer(tmp_path, tiny_sailer, rows) -> None:
    """From the waveforms of the batch, where the model is; training and evaluation are as from the collator's."""
    logs = {}
    for log_mel in (True, False):
        run = trainer(tmp_path, tiny_sailer, rows)
        run.data_collator.log_mel = log_mel
        assert ("waveforms" in next(iter(run.get_train_dataloader()))) is not log_mel
        run.train()
        timed = ("runtime", "per_second")
        logs[log_mel] = {
            key: value
            for entry in run.state.log_history[:2]
            for key, value in entry.items()
            if not key.endswith(timed)
        }
    assert logs[False] == pytest.approx(logs[True], rel=1e-4, abs=1e-5)
    run.processor = None
    with pytest.raises(ValueError, match="pass the processor as processing_class"):
        run.evaluate()


def test_resuming_within_an_epoch_goes_on_where_it_stopped(tmp_path, tiny_sailer, rows) -> None:
    """With the rows of that epoch's own plan, in its own order, to the same weights."""
    plan = AugmentationSettings(mixing_probability=0.5)

    def heard(**options) -> tuple[list[list[tuple]], dict[str, torch.Tensor]]:
        given = {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "eval_strategy": "no",
            "save_total_limit": None,
        }
        run = trainer(
            tmp_path, tiny_sailer, rows, plan, **(given | {"save_strategy": "steps", "save_steps": 2} | options)
        )
        seen, collate = [], run.data_collator

        def spy(items):
            seen.append([(*(clip["id"] for clip in item["clips"]), item["gap"]) for item in items])
            return collate(items)

        run.data_collator = spy
        run.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
        return seen, {name: value.clone() for name, value in run.model.state_dict().items()}

    whole, weights = heard()
    assert len(whole) == 8 and set(chain(*whole[:4])) != set(chain(*whole[4:]))
    rest, resumed = heard(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert rest == whole[6:]
    assert [name for name, value in weights.items() if not torch.equal(value, resumed[name])] == []


@pytest.mark.slow
def test_training_in_batches_of_like_length(tmp_path, tiny_sailer, rows) -> None:
    """In every epoch, also one that is gone on with, and the same whether batches are accumulated."""

    def lengths(**options) -> list[list[int]]:
        run = trainer(tmp_path, tiny_sailer, rows, eval_strategy="no", num_train_epochs=2, **options)
        seen, collate = [], run.data_collator

        def spy(items):
            batch = collate(items)
            seen.append(sorted(batch["attention_mask"].sum(1).tolist()))
            return batch

        run.data_collator = spy
        run.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
        return seen

    alike = {
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "steps",
        "save_steps": 3,
        "save_total_limit": None,
    }
    whole = lengths(per_device_train_batch_size=4, **alike)
    assert sorted(map(set, whole[:4]), key=min) == [{20}, {25}, {30}, {35}]
    assert [set(batch) for batch in whole[4:]] != [set(batch) for batch in whole[:4]]
    resumed = lengths(
        per_device_train_batch_size=4, **(alike | {"resume_from_checkpoint": str(tmp_path / "checkpoint-6")})
    )
    assert resumed[-2:] == whole[-2:]
    halves = lengths(per_device_train_batch_size=2, gradient_accumulation_steps=2, **alike)
    assert [sorted(first + second) for first, second in zip(halves[::2], halves[1::2], strict=True)] == whole
    assert any(len(set(batch)) > 1 for batch in lengths(per_device_train_batch_size=4))


def test_training_lowers_the_loss_and_keeps_the_best(tmp_path, tiny_sailer, rows) -> None:
    class Spoil(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model, **kwargs) -> None:
            if state.epoch >= 5:
                model.heads["primary"][-1].bias.data[0] += 20

    run = trainer(
        tmp_path,
        tiny_sailer,
        rows,
        num_train_epochs=6,
        callbacks=[Spoil()],
        learning_rate=5e-3,
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="kl",
    )
    assert run.args.greater_is_better is False
    run.train()
    divergences = [entry["eval_kl"] for entry in run.state.log_history if "eval_kl" in entry]
    assert min(divergences) < divergences[0] and min(divergences) < divergences[-1] - 1
    assert run.state.best_metric == pytest.approx(min(divergences))
    assert run.evaluate()["eval_kl"] == pytest.approx(min(divergences), rel=1e-5)
    weights = {path.name for path in tmp_path.glob("checkpoint-*/*.safetensors")}
    assert weights == {"trained.safetensors"}  # without the frozen towers; a system that is saved has them
    run.save_model(str(tmp_path / "system"))
    saved = SailerForAudioClassification.from_pretrained(tmp_path / "system").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in run.model.state_dict().items())
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    assert SailerProcessor.from_pretrained(checkpoint).tokenizer is not None


def test_a_speech_only_system_trains(tmp_path, tiny_speech_sailer, rows) -> None:
    run = trainer(tmp_path, tiny_speech_sailer, rows, heads=["primary"])
    run.train()
    assert set(run.state.log_history[0]) >= {"loss", "loss_primary"} and "eval_ccc" not in run.state.log_history[1]


def test_manifold_mixup_trains_and_evaluation_does_not_mix(tmp_path, tiny_sailer, rows) -> None:
    run = trainer(tmp_path, tiny_sailer, rows, manifold_mixup=0.4)
    before = run.evaluate()["eval_loss"]
    assert run.evaluate()["eval_loss"] == before
    plain = trainer(tmp_path, tiny_sailer, rows)
    batch = run.data_collator([rows[i] for i in range(8)])

    def loss(run: SailerTrainer, training: bool) -> float:
        with torch.no_grad():
            return run.compute_loss(run.model.train(training), dict(batch)).item()

    assert loss(run, training=False) == loss(plain, training=False)
    assert abs(loss(run, training=True) - loss(plain, training=True)) > 1e-2
    run.train()
    assert np.isfinite(run.state.log_history[0]["loss"])


def test_mixed_targets_by_hand(tmp_path, tiny_sailer, rows, monkeypatch) -> None:
    run = trainer(tmp_path, tiny_sailer, rows, manifold_mixup=1.0)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor([1, 0]))
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.tensor([0.25, 1.0]))
    targets = {"labels": torch.eye(2), "sex_labels": torch.tensor([0, 1]), "age_labels": torch.tensor([20.0, 60.0])}
    inputs, mixed = run._mix_up({}, targets)
    torch.testing.assert_close(mixed["labels"], torch.tensor([[0.25, 0.75], [0.0, 1.0]]))
    assert mixed["sex_labels"].tolist() == [-100, -100]
    assert mixed["age_labels"].tolist() == [50.0, 60.0]
    assert inputs["mixup_permutation"].tolist() == [1, 0]
