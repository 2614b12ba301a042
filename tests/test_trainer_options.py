"""Options of transformers that change how a system trains, or who hears of it: each does what it says."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.trainer as trainer_module
from transformers import TrainerCallback, integrations

from sailer import SailerForAudioClassification, SailerTrainer, SailerTrainingArguments
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import LabelSet
from sailer.training.losses import ObjectiveSettings, SailerObjective

from .test_trainer import HEADS, rows, trainer  # noqa: F401 - a fixture


def losses(run: SailerTrainer) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


# Since Whisper's forward is one graph, Inductor (torch 2.13) cannot order the strides of its states of free length.
INDUCTOR = pytest.mark.xfail(reason="Inductor: cannot determine truth value of Relational", strict=False)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True}, marks=[pytest.mark.slow, INDUCTOR]),
    ],
    ids=str,
)
def test_the_same_losses_with(tmp_path, tiny_sailer, rows, options) -> None:  # noqa: F811
    config = {"freeze_audio": False, "trainable_audio_layers": 1}
    torch._dynamo.reset()
    plain = losses(trainer(tmp_path, tiny_sailer, rows, config=config, num_train_epochs=2, eval_strategy="no"))
    run = trainer(tmp_path, tiny_sailer, rows, config=config, num_train_epochs=2, eval_strategy="no", **options)
    assert losses(run) == pytest.approx(plain, rel=1e-4)
    if "gradient_checkpointing" in options:
        assert run.model.sailer.audio_encoder.layers[-1].gradient_checkpointing


def test_a_tracker_hears_of_every_loss(tmp_path, tiny_sailer, rows, monkeypatch) -> None:  # noqa: F811
    heard: list[dict] = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            heard.append(logs)

    monkeypatch.setitem(integrations.integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", Tracker)
    trainer(tmp_path, tiny_sailer, rows, report_to=["mlflow"]).train()
    assert {"loss", "loss_primary", "loss_age"} <= set(heard[0]) and "eval_macro_f1" in heard[1]


def searching(folder, tiny_sailer, rows) -> SailerTrainer:  # noqa: F811
    """A trainer that builds its system anew for every trial."""
    base = trainer(folder, tiny_sailer, rows)

    def fresh() -> SailerForAudioClassification:
        return SailerForAudioClassification.from_pretrained(tiny_sailer, conv_dropout=0.0)

    return SailerTrainer(
        args=SailerTrainingArguments(
            str(folder), num_train_epochs=2, use_cpu=True, disable_tqdm=True, per_device_train_batch_size=8
        ),
        model_init=fresh,
        objective=SailerObjective(ObjectiveSettings(target_weighting="none")),
        train_dataset=PlannedDataset(rows, AugmentationSettings(), LabelSet()),
        eval_dataset=rows,
        data_collator=SailerCollator(base.processor, LabelSet(), HEADS),
        processing_class=base.processor,
    )


def test_hyperparameter_search(tmp_path, tiny_sailer, rows, monkeypatch) -> None:  # noqa: F811
    """Optuna's part is played here; the Trainer keeps what it is told to minimise under a name of its own choice, and
    forgets the model of a trial."""
    optuna = ModuleType("optuna")
    optuna.__spec__ = ModuleSpec("optuna", None)
    optuna.trial = SimpleNamespace(BaseTrial=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "optuna", optuna)
    tried: list[tuple[float, float]] = []

    class Search:
        def ensure_available(self) -> None: ...

        def run(self, run: SailerTrainer, n_trials: int, direction: str, **kwargs: object) -> float:
            for number in range(n_trials):
                run.objective = None
                run.train(trial=SimpleNamespace(number=number, params={}))
                tried.append((run.args.learning_rate, run.objective))
                run.model_wrapped = run.model = None
            return min(value for _, value in tried)

    monkeypatch.setitem(
        trainer_module.ALL_HYPERPARAMETER_SEARCH_BACKENDS, trainer_module.HPSearchBackend.OPTUNA, Search
    )
    run = searching(tmp_path, tiny_sailer, rows)
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": (1e-6, 1e-3)[trial.number]},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
    )
    assert [rate for rate, _ in tried] == [1e-6, 1e-3]
    values = [value for _, value in tried]
    assert best == min(values) < max(values) and np.isfinite(values).all()
    assert (
        len([callback for callback in run.callback_handler.callbacks if type(callback).__name__ == "_EpochCallback"])
        == 1
    )


@pytest.mark.slow
def test_hyperparameter_search_by_optuna(tmp_path, tiny_sailer, rows) -> None:  # noqa: F811
    pytest.importorskip("optuna", reason="the search is Optuna's (the search extra)")
    best = searching(tmp_path, tiny_sailer, rows).hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-5, 1e-1])},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=3,
        backend="optuna",
    )
    assert np.isfinite(best.objective) and best.hyperparameters["learning_rate"] in (1e-5, 1e-1)
