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


class Graphs(TrainerCallback):
    """How many graphs torch has compiled at the end of each epoch."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self.made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def number_of_hooks(run: SailerTrainer) -> int:
    return sum(len(part._forward_hooks) for part in run.model.modules())


@pytest.fixture
def launched_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves the wish for a compiler in the environment, where the next trainer would find it."""
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no" if "BACKEND" in name else "default")


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, marks=pytest.mark.slow),
        pytest.param({"torch_compile": True, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_losses_with(tmp_path, tiny_sailer, rows, options, launched_as_it_is, capsys) -> None:  # noqa: F811
    config = {"freeze_audio": False, "trainable_audio_layers": 1}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = losses(trainer(tmp_path, tiny_sailer, rows, config=config, num_train_epochs=3))
    assert not torch._dynamo.utils.counters
    graphs = Graphs()
    run = trainer(tmp_path, tiny_sailer, rows, config=config, num_train_epochs=3, callbacks=[graphs], **options)
    hooks = number_of_hooks(run)
    with torch._inductor.config.patch(fallback_random=True):  # dropout's numbers are torch's
        assert losses(run) == pytest.approx(plain, rel=1e-4)
    layers = run.model.sailer.audio_encoder.layers
    if "gradient_checkpointing" in options:
        assert layers[-1].gradient_checkpointing
    if "torch_compile" in options:
        assert graphs.made[0] > 0 and graphs.made[1] == graphs.made[2]  # whatever the lengths of the third epoch are
        text = run.model.sailer.text_encoder.encoder.layer
        assert f"the towers' {len(layers) + len(text)} transformer layers are compiled" in capsys.readouterr().out
        assert not [layer for layer in (*layers, *text) if "forward" in vars(layer)]
        assert number_of_hooks(run) == hooks > 0 and not torch._dynamo.utils.counters["graph_break"]


def test_a_compiler_wants_layers(tmp_path, tiny_sailer, rows, launched_as_it_is) -> None:  # noqa: F811
    run = trainer(tmp_path, tiny_sailer, rows, torch_compile=True, torch_compile_backend="eager")
    for layers in (run.model.sailer.audio_encoder.layers, run.model.sailer.text_encoder.encoder.layer):
        del layers[:]
    with pytest.raises(ValueError, match="no tower has layers that could be compiled: leave it out"):
        run.train()


def test_a_run_that_goes_on_logs_and_saves_as_it_is_told(tmp_path, tiny_sailer, rows) -> None:  # noqa: F811
    """transformers takes the intervals from the checkpoint, whatever the arguments say."""
    steps = {"save_strategy": "steps", "logging_strategy": "steps", "eval_strategy": "no", "save_total_limit": None}
    steps |= {"per_device_train_batch_size": 2}  # 8 steps an epoch
    trainer(tmp_path, tiny_sailer, rows, **steps, logging_steps=4, save_steps=8).train()
    run = trainer(tmp_path, tiny_sailer, rows, **steps, logging_steps=1, save_steps=3, num_train_epochs=2)
    run.train(resume_from_checkpoint=True)
    logged = [entry["step"] for entry in run.state.log_history if "loss" in entry]
    assert logged == [4, 8, *range(9, 17)]
    saved = sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    assert saved == [8, 9, 12, 15, 16]


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
