"""Fine-tune a saved SAILER system on labels of your own with transformers' Trainer alone.

    python examples/fine_tune_with_trainer.py CHECKPOINT FOLDER OUTPUT_DIR

The sailer package need not be installed. CHECKPOINT is a folder or Hub id. FOLDER holds a subfolder of recordings for
each class: FOLDER/angry/*.wav, ... Every fifth recording of a class is kept for validation. OUTPUT_DIR loads with
`pipeline(model=OUTPUT_DIR, trust_remote_code=True)`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForAudioClassification,
    AutoProcessor,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    pipeline,
)

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()

    labels = sorted(path.name for path in options.folder.iterdir() if path.is_dir())
    if len(labels) < 2:
        parser.error(f"{options.folder} needs a subfolder of recordings for each of at least two classes.")
    clips = [
        {"path": str(path), "label": label, "validation": position % 5 == 4}
        for label, name in enumerate(labels)
        for position, path in enumerate(sorted(p for p in (options.folder / name).iterdir() if p.suffix in SUFFIXES))
    ]
    held_out = [clip for clip in clips if clip["validation"]]
    if not held_out:
        parser.error(f"{options.folder} has no class with five recordings or more, so that none is left to validate.")

    model = AutoModelForAudioClassification.from_pretrained(
        options.checkpoint,
        trust_remote_code=True,
        heads=["primary"],
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        ignore_mismatched_sizes=True,  # the new labels' last layer starts afresh
    )
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        inputs = processor(audio=[clip["path"] for clip in batch])
        return {**inputs, "labels": torch.tensor([clip["label"] for clip in batch])}

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0]
        return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}

    arguments = TrainingArguments(
        str(options.output_dir / "checkpoints"),
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        remove_unused_columns=False,  # the collator reads the paths
        report_to="none",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=[clip for clip in clips if not clip["validation"]],
        eval_dataset=held_out,
        compute_metrics=accuracy,
    )
    trainer.train()
    model.save_pretrained(options.output_dir)
    processor.save_pretrained(options.output_dir)
    classifier = pipeline(model=str(options.output_dir), trust_remote_code=True)
    print(f"{held_out[0]['path']}: {classifier(held_out[0]['path'], top_k=1)}")
    print(f"accuracy on {len(held_out)} held-out recordings: {trainer.evaluate()['eval_accuracy']:.3f}")
    print(f"The system is in {options.output_dir}")


if __name__ == "__main__":
    main()
