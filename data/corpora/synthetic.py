"""The synthetic corpus by name: options -> `sailer.data.synthetic`. It reads no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sailer.data.corpora import About, corpus
from sailer.data.schema import CorpusReport, LabelSet


@corpus(
    "synthetic",
    reads_folder=False,
    about=About(
        title="synthetic speech (eSpeak NG)",
        license="apache-2.0",  # sentences and votes are this package's; what eSpeak NG speaks is not under its license
        link="https://github.com/espeak-ng/espeak-ng",
        languages=("en",),
        kin="All of its speakers are voices of one synthesiser.",
    ),
)
def load(
    path: Path | None,
    *,
    label_set: LabelSet,
    audio: bool,
    strict: bool,
    report: CorpusReport,
    seed: int = 0,
    train_clips: int = 700,
    validation_clips: int = 150,
    test_clips_per_class: int = 20,
    annotators: int = 5,
    speakers: int = 24,
    emotional_text: float = 0.6,
) -> dict[str, dict[str, Any]]:
    """Columns of the canonical row per split, spoken by eSpeak NG; the options are those of `synthetic.make_corpus`.

    Raises:
        CorpusError: an impossible option, or a class of the label set that it has no voice for.
        ImportError: audio is asked for and `espeakng-loader` is not installed.
    """
    from sailer.data.synthetic import make_corpus

    if path is not None:
        report.note(f"The synthetic corpus is made, not read: nothing was looked for in {path}.")
    report.note("Synthetic speech and simulated annotators: figures on it say nothing of real speech.")
    return make_corpus(
        label_set,
        seed=seed,
        train_clips=train_clips,
        validation_clips=validation_clips,
        test_clips_per_class=test_clips_per_class,
        annotators=annotators,
        speakers=speakers,
        emotional_text=emotional_text,
        audio=audio,
    )
