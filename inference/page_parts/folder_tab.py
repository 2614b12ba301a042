"""The folder tab: many recordings go in, a table with a row for each comes out, as `sailer predict` writes it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sailer.inference.outputs import RowFile, columns_of, row_of
from sailer.inference.page_parts import panels
from sailer.inference.page_parts.judging import PageError, System, hear_file
from sailer.inference.page_parts.recording_tab import checked_upload
from sailer.inference.recordings import AUDIO_SUFFIXES
from sailer.pipeline_sailer import PRIORS
from sailer.windows_sailer import ITEM_ERRORS

logger = logging.getLogger(__name__)

FOLDER_QUEUE = "folder"  # beside the single recordings, which need not wait for a whole folder


def add(gradio: Any, system: System, settings: Any, uploads: Path) -> None:
    """Lay out the tab and say what its events do; see `recording_tab.add`."""
    gradio.Markdown(f"Choose a folder: its recordings (up to {settings.max_files}) are judged one after the other.")
    untold = system.untold(settings.transcriber)
    if untold:
        gradio.HTML(panels.note(untold), elem_classes="sailer-untold")
    files = gradio.UploadButton("Choose a folder", file_count="directory", type="filepath", elem_id="sailer-folder")
    chosen = gradio.HTML(panels.note("No folder yet."), elem_id="sailer-folder-chosen")
    prior = gradio.Radio(list(PRIORS), value=PRIORS[0], label="Scores", elem_id="sailer-folder-prior")
    start = gradio.Button("Judge the folder", variant="primary", elem_id="sailer-folder-start")
    shown = gradio.HTML("", elem_id="sailer-folder-results")
    download = gradio.DownloadButton("CSV of the folder", interactive=False, elem_id="sailer-folder-download")

    bar = gradio.Progress()

    def judge_folder(paths: Sequence[str] | None, wanted: str, progress: Any = bar) -> tuple[str, Any]:
        try:
            found = recordings_of([Path(path) for path in paths or ()], settings.max_files)
            rows = []
            for file in progress.tqdm(found, desc="Recordings", unit="recordings"):
                rows.append(row_of_file(file, system, settings, wanted, uploads))
        except PageError as error:
            return panels.error(str(error)), gradio.update(interactive=False, value=None)
        columns = ["file", "seconds", *columns_of(system.classifier.model.config, settings.transcriber is not None)]
        columns += ["warning", "error"]
        path = Path(tempfile.mkdtemp(dir=uploads)) / "folder.csv"
        RowFile(path, columns, "csv").append(rows)
        failed = sum(bool(row.get("error")) for row in rows)
        caption = f"{len(rows)} recordings" + (f", {failed} could not be used: see the last column" if failed else "")
        return panels.table(rows, columns, caption), gradio.update(interactive=True, value=str(path))

    def told(paths: Sequence[str] | None) -> str:
        try:
            found = recordings_of([Path(path) for path in paths or ()], settings.max_files)
        except PageError as error:
            return panels.error(str(error))
        return panels.note(f"{len(found)} recordings among {len(paths or ())} files.")

    files.upload(told, files, chosen, api_visibility="private", queue=False)
    start.click(
        judge_folder,
        [files, prior],
        [shown, download],
        api_visibility="private",
        concurrency_limit=1,
        concurrency_id=FOLDER_QUEUE,
        show_progress_on=shown,
    )


def recordings_of(paths: Sequence[Path], most: int) -> list[Path]:
    """The audio files among what was uploaded, by name.

    Raises:
        PageError: none, or more than `most`.
    """
    audio = (path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES)
    chosen = sorted(audio, key=lambda path: path.name)  # each lies in a folder of its own
    if not chosen:
        raise PageError(f"No recordings among them: choose a folder with {', '.join(sorted(AUDIO_SUFFIXES))} files.")
    if len(chosen) > most:
        raise PageError(f"{len(chosen)} recordings; this page takes {most} at once. Use `sailer predict` for more.")
    return chosen


def row_of_file(file: Path, system: System, settings: Any, prior: str, uploads: Path) -> dict[str, Any]:
    """A recording's row as `sailer predict` has it; with its error, where it cannot be used."""
    row: dict[str, Any] = {"file": file.name}
    try:
        result, seconds, warning = hear_file(
            checked_upload(file, uploads), system, settings.limits, prior, settings.transcriber
        )
    except ITEM_ERRORS as error:
        return row | {"error": str(error)}
    except Exception as error:
        logger.exception("The page failed on a recording of a folder")
        return row | {"error": f"The system failed on it ({type(error).__name__})."}
    return row | {"seconds": round(seconds, 3), "warning": warning} | row_of(result, 0.0)
