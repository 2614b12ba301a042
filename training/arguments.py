"""The training arguments: transformers' with the paper's settings as defaults, and those of them that are refused."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

TARGETS = ("labels", "secondary_labels", "attribute_labels", "sex_labels", "age_labels")

_SPLIT = "a model is split over processes by examples/accelerate/fsdp2.yaml alone; leave it out."
_PUSH = "checkpoints hold pickles and are not pushed, the finished system is, once; leave it out."
_LIGER = "there are no such kernels for these models; leave it out (bf16 and torch_compile save time)."

# What SailerTrainer would ignore or fail with: argument -> why, and the way out.
NOT_HONOURED = {
    "average_tokens_across_devices": "the loss is a mean over clips and counts no tokens; leave it out.",
    "batch_eval_metrics": "the metrics want all clips at once; leave it out (eval_accumulation_steps saves memory).",
    "dataloader_drop_last": "validation and test figures would lack their last clips too; leave it out.",
    "debug": "its hooks fail on the model's masks; losses that are not finite are logged as they are.",
    "deepspeed": _SPLIT,
    "eval_do_concat_batches": "the metrics want all clips at once; leave it out.",
    "eval_use_gather_object": "predictions are tensors, and are gathered as such; leave it out.",
    "fsdp": _SPLIT,
    "fsdp_config": _SPLIT,
    "hub_always_push": _PUSH,
    "hub_revision": "systems are pushed to the main branch; leave it out.",
    "hub_strategy": _PUSH,
    "include_for_metrics": "the metrics use outputs and targets alone; leave it out.",
    "include_num_input_tokens_seen": "speech has no tokens that could be counted; leave it out.",
    "label_names": "the targets follow from the model's heads; set heads instead.",
    "label_smoothing_factor": "the annotators' votes are soft targets already, and not smoothed; leave it out.",
    "length_column_name": "lengths follow from the clips' durations and the augmentation plan; leave it out.",
    "liger_kernel_config": _LIGER,
    "optim_target_modules": "GaLore and APOLLO, which it is for, are not supported; choose another optim.",
    "parallelism_config": _SPLIT,
    "prediction_loss_only": "metrics are always computed; leave it out (eval_strategy: no skips the evaluations).",
    "remove_unused_columns": "the collator needs every column; leave it out.",
    "use_cache": "nothing is generated; leave it out (cache_features keeps the states of a frozen encoder).",
    "use_liger_kernel": _LIGER,
}

# By the launcher; ours tells the trainer, since Accelerate and transformers would heed the launcher's.
_LAUNCHER, SPLIT_WEIGHTS = "ACCELERATE_USE_FSDP", "SAILER_SPLIT_WEIGHTS"
# What the launcher's configuration may say of FSDP, and what it must: variable -> value, and why.
WANTED_OF_LAUNCHER = {
    "FSDP_VERSION": ("2", "the first FSDP is not supported"),
    "FSDP_OFFLOAD_PARAMS": ("false", "weights stay on their device"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "every process loads the encoders"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "gradient_checkpointing: true of the recipe does that"),
    "FSDP_STATE_DICT_TYPE": ("full_state_dict", "checkpoints hold whole weights"),
}

_HALF = "the system would be saved in half precision; leave it out: with bf16 or fp16 evaluation is in it too."
_STEPS = (
    "`sailer train` always trains, validates and tests; leave it out (`sailer evaluate` is for a finished system)."
)

# The main job also refuses what it has no use for or what would spoil its result; a script of one's own may want it.
NOT_IN_THE_MAIN_JOB = NOT_HONOURED | {
    "bf16_full_eval": _HALF,
    "do_eval": _STEPS,
    "do_predict": _STEPS,
    "do_train": _STEPS,
    "enable_jit_checkpoint": "a stopped run would finish with half-trained weights; save_strategy: steps and "
    "resume_from_checkpoint carry a run over an interruption.",
    "fp16_full_eval": _HALF,
    "hub_token": "a command line or recipe is no place for it; leave it out (`hf auth login` or HF_TOKEN gives one).",
}


@dataclass
class SailerTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the paper's settings as defaults: learning rate 5e-4, 15 epochs, one seed.

    Not said in the paper and chosen here: batches of 32 clips, AdamW, a linear schedule after 5 % of warm-up steps,
    gradients clipped at 1.

    Args:
        output_dir: folder for the checkpoints, and in the main job for the finished system.
        backbone_learning_rate: that of towers that are fine-tuned: weights that were pre-trained want a lower one than
            heads that start afresh. null gives them the `learning_rate`.
        metric_for_best_model: the best epoch by it is kept; any key of `sailer.training.metrics.emotion_report`. Its
            direction follows from the metric.
        resume_from_checkpoint: folder of a checkpoint to go on from; true: the last one of an interrupted run.
        train_sampling_strategy: "random" batches, or batches of like length ("group_by_length"): at speech corpora's
            lengths 98 % of such a batch is speech, of a random one 54 %. Either follows from data_seed and the epoch
            alone. Validation and test batches are always of like length.
        bf16: train and evaluate in bfloat16; by default where there is a CUDA GPU that computes in it (and no fp16).
        tf32: multiply float32 matrices as TF32; by default where there is a CUDA GPU that can.
        dataloader_num_workers: processes that read and mix clips; by default 0 without a CUDA GPU, and with one the
            machine's cores shared among its training processes, 8 at most.
        dataloader_pin_memory: pin the batches' memory; by default where there is a CUDA GPU.
        use_cpu: train on the CPU; by default where several processes are started on a machine without a GPU.
        ddp_find_unused_parameters: have several processes look for weights that a step does not use; by default only
            where layers of a trained encoder are dropped at random.
        logging_nan_inf_filter: leave losses that are not finite out of the log; it makes a GPU wait at every step.

    Raises:
        ValueError: an argument (or what the launcher says of FSDP) that is not honoured (see `NOT_HONOURED`), or
            arguments that contradict each other.
    """

    output_dir: str = "outputs"
    learning_rate: float = 5e-4
    backbone_learning_rate: float | None = None
    num_train_epochs: float = 15
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    warmup_steps: float = 0.05
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    logging_strategy: str = "epoch"
    save_total_limit: int | None = 1
    load_best_model_at_end: bool = True
    metric_for_best_model: str | None = "macro_f1"
    remove_unused_columns: bool = False
    hub_strategy: str = "end"
    label_names: list[str] | None = field(default_factory=lambda: list(TARGETS))
    report_to: str | list[str] | None = "none"
    resume_from_checkpoint: str | bool | None = None  # type: ignore[assignment]  # Trainer.train takes True too
    bf16: bool | None = None  # type: ignore[assignment]  # None: as the machine has it, see `gpu_defaults`
    dataloader_num_workers: int | None = None  # type: ignore[assignment]
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        for name in NOT_HONOURED:
            value = getattr(self, name, None)  # None: this transformers has no such argument
            if reason := refusal(name, value):
                raise ValueError(f"{name} is {value!r}: {reason}")
        if self.backbone_learning_rate is not None and not self.backbone_learning_rate > 0:
            raise ValueError(
                f"backbone_learning_rate is {self.backbone_learning_rate}: give a positive rate, or freeze the towers "
                "(freeze_audio, freeze_text)."
            )
        take_over_from_launcher()
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            from sailer.training.metrics import greater_is_better

            name = self.metric_for_best_model.removeprefix("eval_")
            self.greater_is_better = greater_is_better(name) and not name.startswith("loss")
        if self.train_sampling_strategy not in ("random", "group_by_length"):
            in_order = self.train_sampling_strategy == "sequential"
            reason = ": every epoch would train in the corpus' order" if in_order else ", which is none"
            raise ValueError(
                f"train_sampling_strategy is {self.train_sampling_strategy!r}{reason}; choose 'random' or "
                "'group_by_length'."
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else the processes would not find each other, and each train a system of its own
        found = gpu_defaults(self) if torch.cuda.is_available() and not self.use_cpu else {}
        for name, value in ({"bf16": False, "dataloader_num_workers": 0} | found).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 is true, which does nothing on a CPU: set bf16 instead, or leave it out.")
        if not getattr(self.accelerator_config, "even_batches", True):
            raise ValueError("even_batches is false: processes that evaluate would wait for each other; leave it out.")


def take_over_from_launcher() -> None:
    """Have the trainer do what the launcher's configuration asks of Accelerate.

    Raises:
        ValueError: it asks for something of FSDP that is not done here; the message names the key.
    """
    if os.environ.get(_LAUNCHER, "false").lower() not in ("1", "true", "yes"):
        return
    for variable, (wanted, reason) in WANTED_OF_LAUNCHER.items():
        given = os.environ.get(variable, "1" if variable == "FSDP_VERSION" else wanted)
        if given.lower() != wanted:
            raise ValueError(
                f"The launcher's configuration has {variable.lower()}: {given}, and {reason}: set it to {wanted}, as "
                "examples/accelerate/fsdp2.yaml does."
            )
    os.environ[SPLIT_WEIGHTS] = "true"
    del os.environ[_LAUNCHER]


def gpu_defaults(given: SailerTrainingArguments) -> dict[str, Any]:
    """What is on where there is a CUDA GPU, unless it was said otherwise: matrix products at several times the speed,
    clips read beside the GPU's work, and batches copied to it while it computes."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "bf16": is_torch_bf16_gpu_available() and not given.fp16,
        "tf32": True if is_torch_tf32_available() else None,
        "dataloader_num_workers": max(1, min(8, cores // processes)),
        "accelerator_config": {"non_blocking": True} if given.dataloader_pin_memory else None,
    }


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass's field, made if it is made by a function."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def refusal(name: str, value: Any) -> str | None:
    """The reason against a training argument, where `value` is not its default (nor as empty as that); else None."""
    item = SailerTrainingArguments.__dataclass_fields__.get(name)
    if name not in NOT_IN_THE_MAIN_JOB or item is None:
        return None
    default = default_of(item)
    return NOT_IN_THE_MAIN_JOB[name] if value != default and (value or default) else None
