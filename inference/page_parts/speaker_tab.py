"""The speaker's tab: some recordings of a speaker and a clip go in, what is heard in the clip before and after the
system adapted to the voice comes out. Nothing of a speaker is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sailer.inference.page_parts import panels
from sailer.inference.page_parts.judging import PageError, System, hear_file, read_limited
from sailer.inference.page_parts.recording_tab import MODEL_QUEUE, checked_upload
from sailer.layers_sailer import SpeakerStatistics, check_adaptable, reference_of
from sailer.pipeline_sailer import PRIORS
from sailer.windows_sailer import ITEM_ERRORS, recording_means

logger = logging.getLogger(__name__)

MOST_RECORDINGS = 20  # of a speaker; more help little (docs/results.md)
ABOUT = (
    "Voices differ, and a system may take a voice for a mood. Give it a few recordings of one speaker, without labels "
    "and best of several emotions (three help, twenty help more), and a clip of the same speaker that is not among "
    "them. Nothing of the voice is kept."
)
NONE_YET = "No recordings of the speaker yet."
KEPT = (
    "Then keep it with save_pretrained(FOLDER), and show that: sailer page FOLDER. Systems that sailer trained on "
    "four known speakers or more have it already."
)


def add(gradio: Any, system: System, settings: Any, uploads: Path) -> None:
    """Lay out the tab and say what its events do, see `recording_tab.add`; of a system that cannot be adapted, why."""
    gradio.Markdown(ABOUT)
    reason = why_not(system)
    if reason:
        gradio.HTML(panels.note(reason), elem_id="sailer-speaker-results")
        return
    untold = system.untold(settings.transcriber)
    if untold:
        gradio.HTML(panels.note(untold), elem_classes="sailer-untold")
    limits = f"up to {settings.max_minutes:g} minutes and {settings.max_megabytes} MB"
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            gradio.Markdown(f"Of the speaker up to {MOST_RECORDINGS} recordings, each {limits}:")
            files = gradio.UploadButton(
                "Choose recordings", file_count="multiple", type="filepath", elem_id="sailer-speaker-files"
            )
            chosen = gradio.HTML(panels.note(NONE_YET), elem_id="sailer-speaker-chosen")
            microphone = gradio.Audio(
                sources=["microphone"],
                type="filepath",
                label="Or record one more",
                elem_id="sailer-speaker-microphone",
                buttons=[],
            )
            clip = gradio.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label="The clip to judge",
                elem_id="sailer-speaker-clip",
                buttons=[],
            )
            prior = gradio.Radio(list(PRIORS), value=PRIORS[0], label="Scores", elem_id="sailer-speaker-prior")
            start = gradio.Button("Before and after", variant="primary", elem_id="sailer-speaker-start")
        with gradio.Column(scale=3, min_width=320):
            shown = gradio.HTML(panels.note("Nothing to compare yet."), elem_id="sailer-speaker-results")
    bar = gradio.Progress()

    def compare(paths: Sequence[str] | None, path: str | None, wanted: str, progress: Any = bar) -> str:
        try:
            if not paths or not path:
                missing = "recordings of the speaker" if not paths else "the clip to judge"
                raise PageError(f"There is nothing to compare yet: upload or record {missing}.")
            file = checked_upload(path, uploads)
            recordings = progress.tqdm(some_of(paths), desc="Recordings", unit="recordings")
            voice, rows = voice_of(recordings, system, settings, uploads)
            heard = [
                hear_file(file, system, settings.limits, wanted, settings.transcriber, **options)[0]
                for options in ({}, {"speaker": voice})
            ]
            return panels.adapted(heard[0], heard[1], wanted, rows)
        except ITEM_ERRORS as error:
            return panels.error(str(error))
        except Exception as error:
            logger.exception("The page failed on a speaker")
            return panels.error(f"The system failed on these recordings ({type(error).__name__}).")

    def told(paths: Sequence[str] | None) -> str:
        names = [Path(path).name for path in paths or ()]
        return panels.note(f"{len(names)} chosen: {', '.join(names)}" if names else NONE_YET)

    def one_more(paths: Sequence[str] | None, recorded: str | None) -> tuple[Any, Any, str]:
        if not recorded:
            return gradio.skip(), gradio.skip(), gradio.skip()
        more = [*(paths or ()), recorded]
        return more, None, told(more)

    silent: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    files.upload(told, files, chosen, **silent)
    microphone.stop_recording(one_more, [files, microphone], [files, microphone, chosen], **silent)
    start.click(
        compare,
        [files, clip, prior],
        shown,
        api_name="adapt",
        concurrency_limit=1,
        concurrency_id=MODEL_QUEUE,
        show_progress_on=shown,
    )


def why_not(system: System) -> str:
    """Why a system cannot be adapted, and what to do; "" where it can be."""
    name, model = system.name, system.classifier.model
    try:
        check_adaptable(model)
    except ValueError as error:
        return f"{name} cannot be adapted to a speaker. {error}"
    try:
        reference_of(model)
    except ValueError as error:
        return f"{name} cannot be adapted to a speaker. {error} {KEPT}"
    return ""


def some_of(paths: Sequence[str]) -> list[Path]:
    """The recordings of a speaker.

    Raises:
        PageError: more than `MOST_RECORDINGS`.
    """
    if len(paths) > MOST_RECORDINGS:
        raise PageError(f"{len(paths)} recordings of the speaker; this page takes {MOST_RECORDINGS}: remove some.")
    return [Path(path) for path in paths]


def voice_of(
    files: Iterable[Path], system: System, settings: Any, uploads: Path
) -> tuple[SpeakerStatistics, list[dict[str, Any]]]:
    """What recordings say of their speaker's voice: what `SpeechEmotionPipeline.adapt` learns of them, but under no
    name, so that no other visitor's can be mistaken for it and it is gone with the answer.

    Returns:
        The statistics, to be passed as `speaker=`, and a row per recording: file, seconds, and why it was left out.

    Raises:
        PageError: no recording can be used.
        ValueError: the system cannot be adapted.
    """
    reference = reference_of(system.classifier.model)
    rate = system.classifier.processor.sampling_rate
    rows: list[dict[str, Any]] = []
    read: list[dict[str, Any]] = []  # rows of those that could be read, in the order of their clips

    def waveforms() -> Iterator[dict[str, Any]]:
        for file in files:
            row: dict[str, Any] = {"file": file.name, "seconds": None, "left out": ""}
            rows.append(row)
            try:
                recording, row["seconds"] = read_limited(checked_upload(file, uploads), rate, settings.limits)
            except ITEM_ERRORS as error:
                row["left out"] = str(error)
                continue
            read.append(row)
            yield {"array": recording.waveform, "sampling_rate": rate}

    clips = list(system.classifier.encode(waveforms(), **system.options(settings.transcriber)))
    for row, clip in zip(read, clips, strict=True):
        row["left out"] = "" if clip.error is None else clip.message
    usable = [clip for clip in clips if clip.error is None]
    if not usable:
        reasons = "; ".join(row["left out"] for row in rows)
        raise PageError(f"None of the recordings of the speaker can be used: {reasons}")
    return reference.statistics(*recording_means(usable)), rows
