"""Mixup of kept states: by hand, through the model, in training alone, by the seed, and refused where it cannot be."""

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from datasets import Dataset

from sailer import SailerForAudioClassification, SailerProcessor, SailerTrainer, SailerTrainingArguments
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import LabelSet, build_dataset
from sailer.settings import SettingsError, resolve
from sailer.training.features import FeatureStore
from sailer.training.losses import ObjectiveSettings, SailerObjective
from sailer.training.mixup import Mixture, mix_states, mix_targets

from .sounds import noise

PAIR = Mixture(torch.tensor([1, 0]), torch.tensor([0.25, 0.5]))
KEPT = {"audio_backbone": "tiny-whisper", "cache_features": "memory", "frame_pooling": 64}


def test_states_by_hand() -> None:
    """Two clips of two groups and one, of a layer and of two: the second ends where the first goes on alone."""
    states = torch.tensor([[[[2.0], [8.0]]], [[[4.0], [0.0]]]]).expand(2, 2, 2, 1)  # (clips, layers, groups, width)
    counts = torch.tensor([[64, 32], [16, 0]])
    texts = torch.tensor([[[1.0]], [[3.0]]])
    for name, given in (("pooled_hidden_states", states), ("audio_hidden_states", states[:, 0])):
        batch = {name: given, "attention_mask": counts, "text_hidden_states": texts}
        mixed = mix_states(batch, PAIR)
        # Frames of each: 0.25 * 64 + 0.75 * 16 = 28 and 0.25 * 32 = 8; 0.5 * (16 + 64) = 40 and 0.5 * 32 = 16.
        assert mixed["attention_mask"].tolist() == [[28, 8], [40, 16]]
        # (16 * 2 + 12 * 4) / 28 and 8 alone; (8 * 4 + 32 * 2) / 40 and 8 alone.
        expected = torch.tensor([[[80 / 28], [8.0]], [[2.4], [8.0]]])
        torch.testing.assert_close(
            mixed[name], expected.unsqueeze(1).expand(2, 2, 2, 1) if given.ndim == 4 else expected
        )
        assert mixed["text_hidden_states"].flatten().tolist() == [0.25 * 1 + 0.75 * 3, 0.5 * 3 + 0.5 * 1]


def test_targets_by_hand() -> None:
    targets = {"labels": torch.eye(2), "sex_labels": torch.tensor([0, 1]), "age_labels": torch.tensor([20.0, 60.0])}
    mixed = mix_targets(targets | {"alike": torch.tensor([1, 1])}, PAIR)
    assert mixed["labels"].tolist() == [[0.25, 0.75], [0.5, 0.5]] and mixed["age_labels"].tolist() == [50, 40]
    assert mixed["sex_labels"].tolist() == [-100, -100] and mixed["alike"].tolist() == [1, 1]


def test_shares_follow_beta_and_the_seed() -> None:
    def drawn(seed: int) -> Mixture:
        torch.manual_seed(seed)
        return Mixture.draw(0.4, 4000, "cpu")

    mixture = drawn(0)
    assert sorted(mixture.permutation.tolist()) == list(range(4000))
    # Beta(a, a) has the mean 1/2 and the variance 1 / (8 a + 4).
    assert mixture.shares.mean() == pytest.approx(0.5, abs=0.02)
    assert mixture.shares.var() == pytest.approx(1 / 7.2, rel=0.05)
    assert torch.equal(drawn(0).shares, mixture.shares) and not torch.equal(drawn(1).shares, mixture.shares)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("clips")
    seconds = [0.3 + 0.2 * clip for clip in range(8)]
    for clip, length in enumerate(seconds):
        soundfile.write(folder / f"{clip}.wav", noise(length, clip), 16000)
    return build_dataset(
        {
            "id": [f"clip{clip}" for clip in range(8)],
            "audio": [{"path": str(folder / f"{clip}.wav"), "bytes": None} for clip in range(8)],
            "duration": seconds,
            "votes": torch.eye(9)[torch.arange(8)].numpy() * 3,
            "label": list(range(8)),
        }
    )


@pytest.fixture
def make(tmp_path: Path, tiny_speech_sailer: Path, rows: Dataset) -> Callable[..., SailerTrainer]:
    """A trainer on pooled states that are kept, of batches of four."""

    def trainer(frame_pooling: int = 8, audio_layers: str = "weighted_norm", **options: float) -> SailerTrainer:
        torch.manual_seed(0)
        config = {
            "frame_pooling": frame_pooling,
            "audio_layers": audio_layers,
            "frame_norm": True,
            "conv_dropout": 0.0,
        }
        saved = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
        model = SailerForAudioClassification(type(saved.config)(**(saved.config.to_dict() | config)))
        collator = SailerCollator(SailerProcessor.from_pretrained(tiny_speech_sailer), LabelSet(), ["primary"])
        planned = PlannedDataset(rows, AugmentationSettings(augmentation_variants=1), LabelSet())
        collator.features = FeatureStore.build(model.eval(), collator, [planned, rows])
        arguments = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "use_cpu": True, "disable_tqdm": True}
        arguments |= {"save_strategy": "no", "load_best_model_at_end": False}
        return SailerTrainer(
            model,
            SailerTrainingArguments(output_dir=str(tmp_path), **arguments),
            objective=SailerObjective(ObjectiveSettings(target_weighting="none")),
            train_dataset=planned,
            eval_dataset=rows,
            data_collator=collator,
            **options,
        )

    return trainer


def test_mixed_states_are_mixed_speech(make: Callable[..., SailerTrainer], rows: Dataset) -> None:
    """What the head is given of a mixture is what it is given of the clips, mixed: the layers' sum comes after."""
    run = make()
    batch = run.data_collator([rows[0], rows[7]])
    batch.pop("labels"), batch.pop("consensus", None)
    model = run.model.eval()
    with torch.no_grad():
        model.sailer.audio_layer_weights.weight.copy_(
            torch.linspace(-1, 1, len(model.sailer.audio_layer_weights.weight))
        )
        alone = model(**batch).speech_means
        mixed = model(**mix_states(batch, PAIR, normalizes=True)).speech_means
        itself = model(**mix_states(batch, Mixture(PAIR.permutation, torch.ones(2)), normalizes=True))
    frames = batch["attention_mask"].sum(1).float()
    for clip, share in enumerate(PAIR.shares):
        parts = torch.stack([share * frames[clip], (1 - share) * frames[1 - clip]])
        expected = (parts[0] * alone[clip] + parts[1] * alone[1 - clip]) / parts.sum()
        torch.testing.assert_close(mixed[clip], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(itself.speech_means, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_training_mixes_by_the_seed_and_evaluation_does_not(make: Callable[..., SailerTrainer], rows: Dataset) -> None:
    run, plain = make(state_mixup=0.4), make()
    batch = run.data_collator([rows[clip] for clip in range(4)])

    def loss(run: SailerTrainer, training: bool) -> float:
        run.model.train(training)
        with torch.no_grad():
            return run.compute_loss(run.model, dict(batch)).item()

    torch.manual_seed(3)
    assert loss(run, training=False) == loss(plain, training=False)
    first, second = loss(run, training=True), loss(run, training=True)
    assert abs(first - loss(plain, training=True)) > 1e-3 and first != second  # another batch, another mixture

    def history(run: SailerTrainer) -> list[float]:
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    one, again = history(make(state_mixup=0.4)), history(make(state_mixup=0.4))
    assert one == again != history(make())


def test_states_that_are_not_as_they_are_summed(make: Callable[..., SailerTrainer], rows: Dataset) -> None:
    """Unpooled ones are refused where layers are normalised later, and mixed where they are not."""
    for audio_layers in ("weighted_norm", "concat_norm", "weighted"):
        run = make(frame_pooling=1, audio_layers=audio_layers, state_mixup=0.4)
        batch = run.data_collator([rows[clip] for clip in range(4)])
        assert batch["audio_hidden_states"].ndim == 4
        if audio_layers == "weighted":
            assert torch.isfinite(run.compute_loss(run.model.train(), batch))
        else:
            with pytest.raises(ValueError, match=r"keep them pooled \(frame_pooling: 64\)"):
                run.compute_loss(run.model.train(), batch)


def test_a_batch_without_kept_states_is_refused() -> None:
    for batch in ({"input_features": torch.zeros(2, 80, 10)}, {"audio_hidden_states": torch.zeros(2, 3, 4)}):
        with pytest.raises(ValueError, match="state_mixup mixes kept states"):
            mix_states(batch | {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}, PAIR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_features": "off"}, "state_mixup is 0.4 but not every tower's states are kept"),
        ({"text_backbone": "tiny-text", "freeze_text": False}, "state_mixup is 0.4 but not every tower's states"),
        ({"audio_layers": "weighted_norm", "frame_pooling": 1}, r"keep them pooled \(frame_pooling: 64\)"),
    ],
)
def test_recipes_whose_states_cannot_be_mixed(options: dict, message: str) -> None:
    assert resolve(KEPT | {"state_mixup": 0.4}).augmentation.state_mixup == 0.4
    with pytest.raises(SettingsError, match=message):
        resolve(KEPT | {"state_mixup": 0.4} | options)


def test_one_mixture_a_batch() -> None:
    with pytest.raises(ValueError, match=r"manifold_mixup is 0\.2 and state_mixup 0\.4"):
        AugmentationSettings(manifold_mixup=0.2, state_mixup=0.4)
