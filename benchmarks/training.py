"""Training a frozen system with and without kept states: ratios of naive, like-length and kept epochs in one run.

    python benchmarks/training.py --ravdess DIR --backbone DIR

times an epoch of each kind, each from the audio files on: batches padded to max_seconds (as the released code does),
random batches padded to their longest clip, batches of like length, and kept states, with the pass that encodes them.
Fifteen epochs are 15 times the epoch, and for kept states the encoding of every plan beside it. The logits of a batch
with and without kept states are compared in float32.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
from dataclasses import replace

import torch
from transformers import AutoFeatureExtractor, set_seed

from sailer import SailerForAudioClassification, SailerProcessor, SailerTrainer, SailerTrainingArguments
from sailer.data import LabelSet, load_corpus
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.sampler import PlannedDataset
from sailer.training.features import FeatureStore
from sailer.training.losses import ObjectiveSettings, SailerObjective

EPOCHS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ravdess", required=True, help="folder of RAVDESS")
    parser.add_argument("--backbone", default="openai/whisper-base")
    parser.add_argument("--clips", type=int, default=0, help="of the training actors' clips, the first so many")
    parser.add_argument("--padded", action="store_true", help="also time batches padded to 15 s")
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 3], help="plans to cycle through")
    arguments = parser.parse_args()
    rows = load_corpus("ravdess", arguments.ravdess)["train"]
    if arguments.clips:
        rows = rows.shuffle(seed=0).select(range(arguments.clips)).flatten_indices()
    set_seed(0)
    model = SailerForAudioClassification.from_audio_text_pretrained(arguments.backbone, heads=["primary"])
    extractor = AutoFeatureExtractor.from_pretrained(arguments.backbone)
    collator = SailerCollator(SailerProcessor(extractor), LabelSet(), ["primary"])
    print(f"{len(rows)} clips of {sum(rows['duration']) / len(rows):.2f} s, {torch.get_num_threads()} threads")
    for variants in arguments.variants:
        # Mixing makes every plan's sounds its own, as the paper's recipes have it.
        settings = AugmentationSettings(augmentation_variants=variants, mixing_probability=0.3 if variants > 1 else 0)
        dataset = PlannedDataset(rows, settings)
        seconds = {}
        if arguments.padded:
            longest = copy.deepcopy(extractor)  # the other batches' one stays as it is
            longest.n_samples, longest.nb_max_frames = 15 * longest.sampling_rate, 1500
            padded = replace(collator, processor=SailerProcessor(longest, audio_padding="max_length"))
            seconds["padded to 15 s"] = epoch(model, dataset, padded, "random")
        seconds["random batches"] = epoch(model, dataset, collator, "random")
        seconds["like length"] = epoch(model, dataset, collator, "group_by_length")
        started = time.perf_counter()
        store = FeatureStore.build(model.eval(), collator, [dataset])
        encoding = time.perf_counter() - started
        kept = epoch(model, dataset, replace(collator, features=store), "group_by_length")
        total = encoding + EPOCHS * kept
        print(f"augmentation_variants {variants}: encoding {encoding:.1f} s, an epoch of kept states {kept:.2f} s")
        for name, value in seconds.items():
            print(f"  {name}: {value:.1f} s an epoch, {EPOCHS} of them {EPOCHS * value / total:.2f} times the kept")
        items = [dataset[key] for key in range(8)]
        difference = (logits(model, collator(items)) - logits(model, replace(collator, features=store)(items))).abs()
        print(f"  largest difference of a logit: {difference.max():.1e}", flush=True)


def epoch(model: SailerForAudioClassification, dataset: PlannedDataset, collator: SailerCollator, order: str) -> float:
    """Seconds of one training epoch in batches of 32."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SailerTrainer(
            model,
            SailerTrainingArguments(
                folder,
                num_train_epochs=1,
                train_sampling_strategy=order,
                eval_strategy="no",
                save_strategy="no",
                load_best_model_at_end=False,
                disable_tqdm=True,
            ),
            objective=SailerObjective(ObjectiveSettings(target_weighting="none")),
            train_dataset=dataset,
            data_collator=collator,
            processing_class=collator.processor,
        )
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


@torch.no_grad()
def logits(model: SailerForAudioClassification, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**batch).logits


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
