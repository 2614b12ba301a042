"""SailerTrainer: the collator's batches in, a trained system and exact, named metrics out (paper, section 3)."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import torch
from accelerate.utils import TorchDynamoPlugin
from torch.utils.data import Dataset, Sampler
from transformers import EvalPrediction, PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from sailer.data.sampler import EpochSampler, LongestFirst, PlannedDataset, longest_first
from sailer.data.schema import LabelSet
from sailer.data.streaming import StreamedClips
from sailer.layers_sailer import NORMALIZED_LAYERS
from sailer.training import checkpoints
from sailer.training.arguments import TARGETS, SailerTrainingArguments
from sailer.training.compilation import LayerCompilation
from sailer.training.losses import TEACHER, SailerObjective
from sailer.training.mixup import Mixture, mix_states, mix_targets
from sailer.training.progress import BarCallback, LineCallback
from sailer.training.publishing import PublishingTrainer
from sailer.training.sharding import ShardedTrainer, is_asked_for, split_weights
from sailer.training.throughput import Throughput

# In a batch for scoring but not for the model: the consensus label that the corpus publishes.
CONSENSUS = "consensus"


class SplitPrediction(NamedTuple):
    """What a system says of a split: outputs and targets by name, (clips, ...) each, and figures by name."""

    predictions: dict[str, np.ndarray]
    label_ids: dict[str, np.ndarray]
    metrics: dict[str, float]


class SailerTrainer(ShardedTrainer, PublishingTrainer):
    """
    Trainer whose loss is a `SailerObjective` and whose evaluation is `sailer.training.metrics.emotion_report`.

    Each named component of the loss is logged beside it. Evaluation losses are computed over exactly the clips of the
    split, whatever the number of processes.

    Args:
        model: a `SailerForAudioClassification`.
        args: `SailerTrainingArguments`.
        objective: the training loss.
        label_set: the primary emotions, for the metrics.
        manifold_mixup: alpha of the Beta distribution for mixing fused embeddings within a batch
            (https://arxiv.org/abs/1806.05236); 0 is off.
        state_mixup: the same for the frozen towers' kept states, in place of it: `sailer.training.mixup.mix_states`.
        evaluation_collator: makes evaluation batches; the training collator by default.
        processing_class: the `SailerProcessor`, saved with every checkpoint.
        identity: what another run must share to go on with this one's checkpoints, by name.
        card: facts for the model card that the Trainer cannot know, see `sailer.training.card_facts.trainer_facts`.
        trainer_arguments: as `transformers.Trainer` takes them.
    """

    args: SailerTrainingArguments
    model: torch.nn.Module
    # The loss is the mean over a batch's rows: Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any = None,
        args: SailerTrainingArguments | None = None,
        *,
        objective: SailerObjective,
        label_set: LabelSet | None = None,
        manifold_mixup: float = 0.0,
        state_mixup: float = 0.0,
        evaluation_collator: Any = None,
        processing_class: Any = None,
        identity: Mapping[str, Any] | None = None,
        card: Mapping[str, Any] | None = None,
        **trainer_arguments: Any,
    ) -> None:
        # Kept from Trainer, which would align the special tokens of a text generator with its tokenizer.
        self.processor = processing_class
        if args is not None and args.ddp_find_unused_parameters is None and isinstance(model, torch.nn.Module):
            args.ddp_find_unused_parameters = has_parts_left_out(model)
        super().__init__(model, args, **trainer_arguments)
        # Not `objective`, which Trainer's hyperparameter search sets to a figure.
        self.training_objective: SailerObjective = objective.to(self.args.device)
        self.label_set = label_set or LabelSet()
        self.manifold_mixup, self.state_mixup = manifold_mixup, state_mixup
        self.evaluation_collator = evaluation_collator or self.data_collator
        self._component_sums: dict[str, torch.Tensor] = {}
        self._component_batches = 0
        self._throughput = Throughput(self.args.device)
        if self.compute_metrics is None:
            self.compute_metrics = self.report
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.identity = dict(identity or {})
        self.card = dict(card or {})
        self._staging: Path | None = None
        self._frozen: str | None = None
        self._termination = checkpoints.TerminationCallback()
        self.add_callback(self._termination)
        self._compilation = LayerCompilation.asked_for(self.args)
        if self._compilation is not None:
            self.add_callback(self._compilation)
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")  # else it compiles the whole model
        self.add_callback(LineCallback if self.args.disable_tqdm else BarCallback)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The objective's weighted sum; its parts are kept for the next log."""
        targets = {name: inputs[name] for name in (*TARGETS, TEACHER) if name in inputs}
        inputs = {name: value for name, value in inputs.items() if name not in targets and name != CONSENSUS}
        if model.training and (self.manifold_mixup or self.state_mixup):
            inputs, targets = self._mix_up(inputs, targets)
        outputs = model(**inputs, output_hidden_states=False, return_dict=True)
        self.training_objective.train(model.training)
        losses = self.training_objective(outputs, targets)
        if model.training:
            self._throughput.clips += len(next(iter(targets.values())))
            self._component_batches += 1
            for name, value in losses.items():
                if name != "loss":
                    self._component_sums[name] = self._component_sums.get(name, 0) + value.detach()
        return (losses["loss"], outputs) if return_outputs else losses["loss"]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Trainer's, with log-mel features of waveforms that the collator left: on the model's device."""
        inputs = super()._prepare_inputs(inputs)
        waveforms = inputs.pop("waveforms", None)
        if waveforms is None:
            return inputs
        if self.processor is None:
            raise ValueError(
                "The collator has log_mel=False: pass the processor as processing_class, to make it here."
            )
        return {**inputs, "input_features": self.processor.log_mel(waveforms)}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the towers' parameters in groups of their own where they have their own rate."""
        made_before = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        rate = self.args.backbone_learning_rate
        if rate is None or made_before:
            return optimizer
        towers = {
            parameter
            for name, parameter in (self.model if model is None else model).named_parameters()
            if parameter.requires_grad and {"audio_encoder", "text_encoder"} & set(name.split("."))
        }
        if not towers:
            raise ValueError(
                "backbone_learning_rate is set but no tower trains: set freeze_audio or freeze_text to false or train "
                "LoRA in one (audio_lora_rank), or leave it out."
            )
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if parameter in towers]
            if own:
                group["params"] = [parameter for parameter in group["params"] if parameter not in towers]
                optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log with the mean of every loss component since the last one."""
        if "loss" in logs and self._component_batches:
            for name, total in self._component_sums.items():
                mean = self.accelerator.gather(total / self._component_batches).mean().item()
                logs[f"loss_{name}"] = mean
            self._component_sums, self._component_batches = {}, 0
        super().log(logs, start_time)

    def prediction_step(  # type: ignore[override]  # outputs by name, which Trainer gathers as it does tensors
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Outputs and targets by name. No loss: a mean over batches would count padded duplicates of clips."""
        inputs = self._prepare_inputs(inputs)
        targets = {name: inputs[name] for name in (*TARGETS, CONSENSUS) if name in inputs}
        model_inputs = {name: value for name, value in inputs.items() if name not in targets}
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**model_inputs, output_hidden_states=False, return_dict=True)
        predictions = {
            name: value.float()
            for name, value in outputs.items()
            if name not in ("loss", "embeddings", "speech_means")
        }
        return None, predictions, targets

    def predict(  # type: ignore[override]  # the same three fields, by name
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> SplitPrediction:
        """Trainer's, with what it returns by name."""
        output: Any = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        return SplitPrediction(*output)

    def report(self, prediction: EvalPrediction) -> dict[str, float]:
        """`emotion_report` of a split, and the plain (not re-weighted) losses over it."""
        outputs: Any = prediction.predictions
        targets: Any = prediction.label_ids
        return split_report(self.training_objective, self.label_set, outputs, targets, self.args.device)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """Trainer's; a stream's batches are shared out over the processes already."""
        dataset = self.train_dataset
        if not isinstance(dataset, StreamedClips):
            return super().get_train_dataloader()
        self.add_callback(_EpochCallback(dataset))
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=None,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers or 0,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Evaluation batches, by the evaluation collator."""
        return self._with_evaluation_collator(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """Test batches, by the evaluation collator."""
        return self._with_evaluation_collator(super().get_test_dataloader, test_dataset)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(dataset, PlannedDataset):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            lengths = dataset.seconds if self.args.train_sampling_strategy == "group_by_length" else None
            # A step's rows, over all processes and accumulated batches: how they are shared out changes nothing.
            step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            sampler = EpochSampler(len(dataset), seed=seed, lengths=lengths, step=step)
            self.remove_callback(_EpochCallback)  # of an earlier training by this trainer
            self.add_callback(_EpochCallback(sampler))
            return sampler
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        lengths = _lengths(eval_dataset)
        return super()._get_eval_sampler(eval_dataset) if lengths is None else LongestFirst(lengths)

    def evaluation_loop(self, dataloader: torch.utils.data.DataLoader, *args: Any, **kwargs: Any) -> Any:
        """Trainer's over batches of like length, with predictions and targets in the order of the dataset."""
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        lengths = _lengths(dataloader.dataset)
        if lengths is None:
            return output
        back = np.argsort(longest_first(lengths))
        parts = {
            part: {name: values[back] for name, values in (getattr(output, part) or {}).items()}
            for part in ("predictions", "label_ids")
        }
        return output._replace(**parts)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, going on from a whole checkpoint of the same run or from none.

        Raises:
            CheckpointError: see `sailer.training.checkpoints.point_to_resume_from`.
            Terminated: SIGTERM ended the training; its state is saved.
        """
        self._frozen = None
        if self.model is None:  # a search over settings, which builds one anew in each trial
            point = resume_from_checkpoint
        else:
            folder = checkpoints.point_to_resume_from(
                resume_from_checkpoint, self.args.output_dir, self.identity, self._digest_of_frozen()
            )
            point = None if folder is None else str(folder)
        self._throughput = Throughput(self.args.device)
        split = split_weights(self) if is_asked_for() and self.args.world_size > 1 else nullcontext()
        try:
            with split:
                output = super().train(point, *args, **kwargs)
        finally:
            self._termination.restore()
            if self._compilation is not None:
                self._compilation.restore()
        told = self._throughput.told(self.accelerator)
        if self.is_world_process_zero():
            print(told, flush=True)
        return output

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        trained: tuple[int, int] = super()._init_training_state(max_steps, *args, **kwargs)
        # A checkpoint's state brings the intervals of logging and saving along that its run had.
        self.state.compute_steps(self.args, max_steps)
        return trained

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's; its time is not counted as training."""
        with self._throughput.paused():
            return super().evaluate(*args, **kwargs)

    def _digest_of_frozen(self) -> str:
        """Of the model that trains; made once."""
        if self._frozen is None:
            self._frozen = checkpoints.digest_of_frozen(self.model)
        return self._frozen

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Trainer's, written beside its place and renamed when it is whole; older ones are deleted after that."""
        run_dir, step = Path(super()._get_output_dir(trial)), self.state.global_step
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self._staging, limit = run_dir / checkpoints.STAGING, self.args.save_total_limit
        if self.args.should_save:
            checkpoints.clear_staging(run_dir)
        self.accelerator.wait_for_everyone()
        best = str(folder) if self.state.best_global_step == step else self.state.best_model_checkpoint
        try:
            self.args.save_total_limit = None
            super()._save_checkpoint(model, trial)
            self.state.best_model_checkpoint = best
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = self._staging / folder.name
                self.state.save_to_json(str(written / checkpoints.STATE))
                checkpoints.seal(written, self.identity, self._digest_of_frozen())
                shutil.rmtree(folder, ignore_errors=True)
                written.replace(folder)
        except Exception as error:
            raise checkpoints.CheckpointError(
                f"Checkpoint {folder} could not be written: {error}. The last whole one is kept: make room, and go on "
                "with resume_from_checkpoint: true."
            ) from error
        finally:
            self.args.save_total_limit = limit
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.should_save:
            rotate_checkpoints(str(run_dir), limit, best_model_checkpoint=best, use_mtime=True)
        self.accelerator.wait_for_everyone()  # another process may load it next, as the best

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        is_checkpoint = self._staging is not None and isinstance(self.model, PreTrainedModel)
        trained = None
        if is_checkpoint and (checkpoints.is_split(self.model) or checkpoints.frozen_names(self.model)):
            trained = checkpoints.trained_part(self.model)
        if not self.args.should_save:  # another process writes, whose buffers count
            return
        if trained is not None:
            folder.mkdir(parents=True, exist_ok=True)
            cast(PreTrainedModel, self.model).config.save_pretrained(folder)
            checkpoints.save_trained(trained, folder)
            torch.save(self.args, folder / "training_args.bin")
        else:
            super()._save(output_dir, state_dict)
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if (Path(resume_from_checkpoint) / checkpoints.TRAINED_WEIGHTS).exists():
            checkpoints.load_trained(self.model if model is None else model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        if (best / checkpoints.TRAINED_WEIGHTS).exists():
            checkpoints.load_trained(self.model, best)
        else:
            super()._load_best_model()

    def _with_evaluation_collator(self, make: Any, dataset: Any) -> torch.utils.data.DataLoader:
        training_collator, self.data_collator = self.data_collator, self.evaluation_collator
        try:
            return make(dataset)
        finally:
            self.data_collator = training_collator

    def _mix_up(
        self, inputs: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rows = next(iter(targets.values()))
        mixture = Mixture.draw(self.state_mixup or self.manifold_mixup, len(rows), rows.device)
        if self.state_mixup:
            config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
            inputs = mix_states(inputs, mixture, getattr(config, "audio_layers", "last") in NORMALIZED_LAYERS)
        else:
            inputs = {**inputs, "mixup_permutation": mixture.permutation, "mixup_lambda": mixture.shares}
        return inputs, mix_targets(targets, mixture)


def has_parts_left_out(model: torch.nn.Module) -> bool:
    """Whether a training step may leave out parameters that are trained: an encoder's layers that are dropped at
    random, or a mask's embedding where nothing is masked."""
    for name, tower in model.named_modules():
        if name.rpartition(".")[2] not in ("audio_encoder", "text_encoder"):
            continue
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            continue
        config = getattr(tower, "config", None)
        holders = [tower, *tower.children(), config]
        if any(getattr(holder, drop, 0) for holder in holders for drop in ("layerdrop", "prenet_layerdrop")):
            return True
        mask = getattr(tower, "masked_spec_embed", None)
        masks = getattr(config, "apply_spec_augment", True) and getattr(config, "mask_time_prob", 0) > 0
        if mask is not None and mask.requires_grad and not masks:
            return True
    return False


def _lengths(dataset: Any) -> np.ndarray | None:
    """Durations of a split's clips, (clips,); None of what is no split."""
    if isinstance(dataset, datasets.Dataset) and "duration" in dataset.column_names:
        return dataset.select_columns(["duration"]).with_format("numpy")["duration"][:]
    return None


def split_report(
    objective: SailerObjective,
    label_set: LabelSet,
    outputs: Mapping[str, Any],
    targets: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """`emotion_report` of a split, and the plain (not re-weighted) losses over it; no figure of a head that is not.

    Args:
        objective: whose parts are the losses; it is left in evaluation mode.
        label_set: the primary emotions.
        outputs, targets: arrays (clips, ...) by name, as `SplitPrediction` has them.
        device: where the objective is.
    """
    from sailer.training.metrics import concordance_metrics, emotion_report

    objective.eval()
    tensors = [
        {name: torch.as_tensor(value, device=device) for name, value in values.items()}
        for values in (outputs, targets)
    ]
    losses = {name: value.item() for name, value in objective(*tensors).items()}
    report = {"loss": losses.pop("loss")} | {f"loss_{name}": value for name, value in losses.items()}
    both = {**outputs, **targets}
    heads = {
        name: value
        for name, value in both.items()
        if name not in ("logits", "labels", CONSENSUS) and not name.startswith("member_")  # those of an ensemble
    }
    if "logits" in outputs:
        return report | emotion_report(outputs["logits"], targets["labels"], targets[CONSENSUS], label_set, **heads)
    if "attributes" in outputs:
        return report | concordance_metrics(outputs["attributes"], targets["attribute_labels"])
    return report


class _EpochCallback(TrainerCallback):
    """Tells the sampler its epoch: a run resumed within an epoch wraps the sampler so deep that nothing else does."""

    def __init__(self, sampler: EpochSampler | StreamedClips) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
