"""A corpus of a few seconds of noise, and the options of a run on it that takes a few seconds."""

from pathlib import Path

import soundfile

from .sounds import noise

LABELS = ("Angry", "Happy", "Sad")
SPLITS = {"train": 12, "validation": 6, "test": 6}


def write_corpus(folder: Path) -> Path:
    """A manifest of 24 clips of six speakers (s0 to s3 train, s4 validates, s5 tests) and their recordings."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, number = ["audio,split,label,votes,speaker"], 0
    for split, clips in SPLITS.items():
        for index in range(clips):
            soundfile.write(folder / f"{number}.wav", noise(0.3 + 0.02 * index, number), 16000)
            label, other = LABELS[index % 3], LABELS[(index + index // 3) % 3]
            speaker = {"train": f"s{index % 4}", "validation": "s4", "test": "s5"}[split]
            lines.append(f"{number}.wav,{split},{label},{label};{label};{other},{speaker}")
            number += 1
    path = folder / "clips.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_options(corpus: Path, output_dir: Path, **options: str) -> list[str]:
    """The command line of `sailer train` for such a run."""
    given = {
        **{"corpus": "manifest", "data_dir": str(corpus), "corpus_options": "{}", "output_dir": str(output_dir)},
        **{"audio_backbone": "tiny-whisper", "text_backbone": "null", "heads": "[primary]", "audio_layers": "last"},
        **{"freeze_audio": "true", "hidden_size": "8", "num_train_epochs": "2", "per_device_train_batch_size": "4"},
        **{"mixing_probability": "0", "annotation_dropout": "0", "shuffled_label_baseline": "false"},
        **{"text_dropout": "0", "labels": "[Angry, Happy, Sad]", "use_cpu": "true", "disable_tqdm": "true"},
    }
    return ["train", "demo", *(f"--{name}={value}" for name, value in (given | options).items())]
