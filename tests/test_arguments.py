"""The training arguments in a script of one's own: what is refused, and that each of transformers' was looked at."""

import dataclasses
import re
from importlib.metadata import version

import pytest
import torch
from transformers import TrainingArguments

from sailer import SailerTrainingArguments
from sailer.training import arguments as arguments_module
from sailer.training.arguments import NOT_HONOURED, NOT_IN_THE_MAIN_JOB, gpu_defaults

# Seen to do what transformers says of them, in runs on a CPU of one process and of two, but for what needs a GPU, a
# tracker or an optimizer's package.
HONOURED = re.findall(
    r"\w+",
    """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm
bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id
eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start eval_accumulation_steps save_only_model
save_strategy save_steps save_on_each_node save_total_limit load_best_model_at_end
metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed
data_seed use_cpu accelerator_config dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters
ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout skip_memory_metrics
train_sampling_strategy
resume_from_checkpoint local_rank neftune_noise_alpha push_to_hub hub_model_id hub_private_repo
""",
)


@pytest.mark.skipif(version("transformers") != "5.23.0", reason="the arguments of another version")
def test_every_argument_of_transformers_was_looked_at() -> None:
    arguments = {item.name for item in dataclasses.fields(TrainingArguments) if item.init}
    assert arguments == {*HONOURED, *NOT_IN_THE_MAIN_JOB}
    assert len(HONOURED) + len(NOT_IN_THE_MAIN_JOB) == len(arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("average_tokens_across_devices", False),
        ("label_names", ["labels"]),
        ("fsdp", "full_shard"),
        ("remove_unused_columns", True),
        ("batch_eval_metrics", True),
        ("debug", "underflow_overflow"),
        ("hub_strategy", "checkpoint"),
    ],
)
def test_what_the_trainer_would_ignore_is_refused(name: str, value: object, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*: ") as refused:
        SailerTrainingArguments(str(tmp_path), **{name: value})
    assert str(refused.value).endswith(NOT_HONOURED[name])


def test_what_only_the_main_job_refuses_is_left_to_a_script(tmp_path) -> None:
    arguments = SailerTrainingArguments(str(tmp_path), do_train=True, hub_model_id="me/it", enable_jit_checkpoint=True)
    assert arguments.do_train and arguments.hub_model_id == "me/it"


def test_arguments_can_be_copied(tmp_path) -> None:
    """Transformers changes some when they are made: what it put there is not refused."""
    arguments = SailerTrainingArguments(str(tmp_path), use_cpu=True, learning_rate=1e-3)
    copied = dataclasses.replace(arguments, seed=7)
    assert (copied.learning_rate, copied.seed) == (1e-3, 7)
    assert SailerTrainingArguments(
        **{item: getattr(arguments, item) for item in NOT_HONOURED if hasattr(arguments, item)}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp16": True}, "fp16 is true, which does nothing on a CPU: set bf16"),
        ({"accelerator_config": {"even_batches": False}}, "even_batches is false: .*leave it out"),
        ({"train_sampling_strategy": "sequential"}, "in the corpus' order; choose 'random' or 'group_by_length'"),
        ({"backbone_learning_rate": 0.0}, "backbone_learning_rate is 0.0: give a positive rate"),
    ],
)
def test_values_that_do_nothing_or_hang_are_refused(options: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        SailerTrainingArguments(str(tmp_path), use_cpu=True, **options)


def test_the_direction_of_the_metric_follows_from_it(tmp_path) -> None:
    found = {
        name: SailerTrainingArguments(str(tmp_path), metric_for_best_model=name).greater_is_better
        for name in ("macro_f1", "loss", "eval_loss_primary", "kl")
    }
    assert found == {"macro_f1": True, "loss": False, "eval_loss_primary": False, "kl": False}


def test_what_is_on_without_asking_where_there_is_a_gpu(tmp_path, monkeypatch) -> None:
    plain = SailerTrainingArguments(str(tmp_path), use_cpu=True)
    assert (plain.bf16, plain.tf32, plain.dataloader_num_workers) == (False, None, 0)
    assert not plain.accelerator_config.non_blocking and not plain.logging_nan_inf_filter
    monkeypatch.setattr(arguments_module, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(arguments_module, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    given = SailerTrainingArguments(str(tmp_path), use_cpu=True)
    given.dataloader_pin_memory = True  # which a CPU has not
    on = {"bf16": True, "tf32": True, "dataloader_num_workers": 3, "accelerator_config": {"non_blocking": True}}
    assert gpu_defaults(given) == on
    given.fp16, given.dataloader_pin_memory = True, False
    assert gpu_defaults(given) == on | {"bf16": False, "accelerator_config": None}

    # The way through: what was said stands, what was not is filled in.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda:0"))
    filled = SailerTrainingArguments(str(tmp_path), dataloader_pin_memory=True)
    choice = {"bf16": False, "tf32": False, "dataloader_num_workers": 0}
    said = SailerTrainingArguments(str(tmp_path), accelerator_config={"non_blocking": False}, **choice)
    assert {name: getattr(filled, name) for name in on} == on
    assert (said.bf16, said.tf32, said.dataloader_num_workers) == (False, False, 0)
    assert said.accelerator_config == {"non_blocking": False}
