"""Distillation's teacher: training clips in, the same with a system's or ensemble's probabilities beside them out.

Each clip is judged once, as it is. To judge every batch as it was mixed would cost the teacher's work in every epoch,
which for an ensemble of large encoders is many times the student's, and all of it where the student's frozen states
are kept; the mean of two clips' probabilities is a mix's target, as the paper takes the mean of their votes. The
teacher may hear more than the student: transcripts that the plan withholds from a student, or that it cannot read.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig

from sailer.adapters_sailer import digest
from sailer.data.atomic import replacing
from sailer.data.augmentation import TEACHER_COLUMN
from sailer.data.collator import SailerCollator
from sailer.data.labels import distribution
from sailer.data.schema import LabelSet
from sailer.ensemble_sailer import load_system
from sailer.settings import Settings, SettingsError
from sailer.training.checkpoints import digest_of_rows
from sailer.training.losses import ObjectiveSettings, SailerObjective
from sailer.training.trainer import SailerTrainer

logger = logging.getLogger(__name__)

FILE = "teacher.safetensors"


def check_teacher(teacher: str, label_set: LabelSet) -> list[int]:
    """Positions of the student's labels among the teacher's.

    Args:
        teacher: folder or Hub id of a system or an ensemble.
        label_set: the student's primary emotions.

    Raises:
        SettingsError: there is no system, it has no primary head, or other classes; the message names both.
    """
    try:
        saved = PretrainedConfig.get_config_dict(teacher)[0]
    except (OSError, ValueError) as error:
        raise SettingsError(f"teacher {teacher!r} cannot be read: {error}") from error
    if not str(saved.get("model_type")).startswith("sailer") or "primary" not in saved.get("heads", []):
        raise SettingsError(f"teacher {teacher!r} is no SAILER system or ensemble that predicts primary emotions.")
    names = [name for _, name in sorted((int(key), name) for key, name in saved["id2label"].items())]
    if set(names) != set(label_set.labels):
        raise SettingsError(
            f"teacher {teacher!r} has the labels {names} and the recipe {list(label_set.labels)}: a student learns "
            "the classes of its teacher. Name the same labels (labels), or another teacher."
        )
    return [names.index(label) for label in label_set.labels]


def taught(rows: Dataset, settings: Settings, label_set: LabelSet) -> Dataset:
    """Rows with what the teacher says of each, (labels,), as the column "teacher".

    The processes of a run call this together and share the work. What was said is kept in the folder of the run's
    checkpoints, so that a run that goes on does not ask again.

    Args:
        rows: canonical rows with their audio.
        settings: of the run; its objective names the teacher.
        label_set: the student's primary emotions.

    Raises:
        SettingsError: see `check_teacher`; or probabilities that this teacher cannot give.
        OSError, ValueError: the teacher cannot be loaded.
    """
    teacher, prior = settings.objective.teacher, settings.objective.teacher_prior
    assert teacher is not None, "the objective 'distil' has a teacher"
    order = check_teacher(teacher, label_set)
    model, processor = load_system(teacher)
    key = json.dumps([digest(model.state_dict()), digest_of_rows([rows]), prior, model.config.max_seconds])
    file = Path(settings.training.output_dir) / FILE
    said = _kept(file, key)
    if said is None:
        print(f"The teacher {teacher} judges {len(rows)} clips", flush=True)
        said = _judged(model, processor, rows, settings, label_set, prior)
        if settings.training.process_index == 0:
            with replacing(file) as beside:
                save_file({TEACHER_COLUMN: said}, beside, metadata={"key": key})
    columns = {TEACHER_COLUMN: list(said[:, order].numpy())}
    features = Features({TEACHER_COLUMN: List(Value("float32"), length=len(order))})
    return concatenate_datasets([rows, Dataset.from_dict(columns, features=features)], axis=1)


def targets_of(rows: Dataset, objective: ObjectiveSettings) -> np.ndarray:
    """What training clips are to be taken for, (clips, labels), before any weighting; NaN where that is unknown.

    Args:
        rows: canonical rows; those of "distil" as `taught` gives them.
        objective: decides: the consensus label for "ce", else the votes; where no clip has any, what the teacher says.
    """
    columns = rows.select_columns(["votes", "label"]).with_format("numpy")[:]
    targets = distribution(columns["votes"])
    if objective.objective == "distil" and not columns["votes"].any():
        return rows.select_columns([TEACHER_COLUMN]).with_format("numpy")[:][TEACHER_COLUMN]
    if objective.objective == "ce":
        targets = np.full_like(targets, np.nan)
        known = columns["label"] >= 0
        targets[known] = np.eye(targets.shape[1])[columns["label"][known]]
    return targets


def _kept(file: Path, key: str) -> torch.Tensor | None:
    """What this teacher said of these clips before."""
    try:
        with safe_open(file, framework="pt") as kept:
            return kept.get_tensor(TEACHER_COLUMN) if (kept.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, SafetensorError):
        return None


def _judged(
    model: Any, processor: Any, rows: Dataset, settings: Settings, label_set: LabelSet, prior: str
) -> torch.Tensor:
    """(clips, the teacher's labels) probabilities."""
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(settings.training)
        args.output_dir, args.torch_compile, args.resume_from_checkpoint = folder, False, None
        trainer = SailerTrainer(
            model,
            args,
            objective=SailerObjective(ObjectiveSettings(target_weighting="none")),
            label_set=label_set,
            data_collator=SailerCollator(processor, label_set, [], model.config.max_seconds),
            eval_dataset=rows,
            compute_metrics=lambda prediction: {},
        )
        outputs = trainer.predict(rows).predictions
    model.to("cpu")
    try:
        logits = torch.from_numpy(np.asarray(outputs.get("member_logits", outputs["logits"])))
        return model.probabilities(logits, prior).float().contiguous()
    except ValueError as error:
        raise SettingsError(
            f"teacher {settings.objective.teacher!r}: {error} A student whose targets are weighted (target_weighting) "
            "learns from its balanced probabilities."
        ) from error
