"""The first tab: a recording goes in by upload, microphone or example; its panels and downloads come out."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import soundfile

from sailer.audio_sailer import load_audio
from sailer.data.atomic import replacing
from sailer.inference.page_parts import panels
from sailer.inference.page_parts.judging import Judged, PageError, System, judge
from sailer.pipeline_sailer import PRIORS
from sailer.windows_sailer import ITEM_ERRORS

logger = logging.getLogger(__name__)

# What browsers play; of other formats a WAV file is made for them.
PLAYABLE = {".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".webm"}
MODEL_QUEUE = "model"  # one at a time: two would share the same cores
STATE_S = 3600  # how long a visitor's result is kept
# What the hidden download button is clicked by, once its file is there.
CLICK = "() => document.querySelector('#sailer-download')?.click()"


def add(gradio: Any, systems: Sequence[System], settings: Any, uploads: Path, examples: Mapping[Path, str]) -> None:
    """Lay out the tab and say what its events do.

    Args:
        gradio: the module.
        systems: one or two.
        settings: `PageSettings`.
        uploads: the folder of what visitors sent; nothing else is read.
        examples: clips to try, and what is said in each.
    """
    reads_text = any(system.reads_text for system in systems)
    kept = gradio.State(None, time_to_live=STATE_S)
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            audio = gradio.Audio(
                sources=["upload", "microphone"],
                type="filepath",
                label=f"Recording (up to {settings.max_minutes:g} minutes and {settings.max_megabytes} MB)",
                elem_id="sailer-audio",
                buttons=[],
            )
            transcript = None
            if reads_text:
                about = "Left empty, it is recognised." if settings.transcriber else "Read beside the voice."
                transcript = gradio.Textbox(label="What is said", info=about, lines=2, elem_id="sailer-transcript")
            analyse = gradio.Button("Analyse", variant="primary", elem_id="sailer-analyse")
            prior = gradio.Radio(
                list(PRIORS),
                value=PRIORS[0],
                label="Scores",
                info="balanced: as if each emotion were equally common; natural: as annotators would vote",
                elem_id="sailer-prior",
            )
            chosen = None
            if examples:
                columns = [audio] if transcript is None else [audio, transcript]
                chosen = gradio.Examples(
                    [[str(path), said][: len(columns)] for path, said in examples.items()],
                    columns,
                    label="Examples (synthetic voices)" if settings.examples is None else "Examples",
                    example_labels=[path.stem for path in examples],
                    cache_examples=False,
                    api_visibility="private",
                    elem_id="sailer-examples",
                )
        with gradio.Column(scale=3, min_width=320):
            player = gradio.HTML("", elem_id="sailer-player-place")
            results = gradio.HTML(panels.note("Upload or record something."), elem_id="sailer-results")
            with gradio.Row(elem_id="sailer-downloads"):
                buttons = {
                    kind: gradio.Button(label, size="sm", interactive=False, min_width=90)
                    for kind, label in (
                        ("csv", "CSV"),
                        ("windows", "CSV over time"),
                        ("json", "JSON"),
                        ("png", "PNG"),
                    )
                }
            download = gradio.DownloadButton("Download", visible="hidden", elem_id="sailer-download")

    def heard(path: str | None, wanted: str, text: str | None = None) -> list[Any]:
        shown = _analysed(path, wanted, text)
        spoken = [shown[0].opinions[0].whole[wanted].get("transcript", text)] if shown[0] else [text]
        enabled = [gradio.update(interactive=shown[0] is not None) for _ in buttons]
        return [*shown, *enabled, *(spoken if transcript is not None else [])]

    def heard_anew(path: str | None, wanted: str) -> list[Any]:
        return heard(path, wanted, "")  # what is said in the recording before is not said in this one

    def _analysed(path: str | None, wanted: str, text: str | None) -> tuple[Judged | None, str, str]:
        if not path:
            return None, "", panels.note("Upload or record something.")
        try:
            file = checked_upload(path, uploads, examples)
            judged = judge(file, systems, settings.limits, text, settings.transcriber)
            return judged, panels.player(playable(file, uploads)), panels.results(judged, wanted)
        except ITEM_ERRORS as error:
            return None, "", panels.error(str(error))
        except Exception as error:
            logger.exception("The page failed on a recording")
            return None, "", panels.error(f"The system failed on this recording ({type(error).__name__}).")

    words = [] if transcript is None else [transcript]
    outputs = [kept, player, results, *buttons.values(), *words]
    options: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": MODEL_QUEUE, "show_progress_on": results}
    analyse.click(heard, [audio, prior, *words], outputs, api_name="analyse", **options)
    new = [audio.upload, audio.stop_recording, audio.clear]
    gradio.on(new, heard_anew, [audio, prior], outputs, api_visibility="private", **options)
    if chosen is not None:
        chosen.load_input_event.then(heard, [audio, prior, *words], outputs, api_visibility="private", **options)

    def shown_by(judged: Judged | None, wanted: str) -> Any:
        return gradio.skip() if judged is None else panels.results(judged, wanted)

    prior.change(shown_by, [kept, prior], results, api_visibility="private", queue=False)
    for kind, button in buttons.items():
        button.click(
            _download(kind, uploads, gradio), [kept, prior], download, api_visibility="private", show_progress="hidden"
        ).success(None, js=CLICK)


def _download(kind: str, uploads: Path, gradio: Any) -> Callable[[Judged | None, str], Any]:
    def write(judged: Judged | None, prior: str) -> str:
        if judged is None:
            raise gradio.Error("This result is no longer kept: analyse again.", print_exception=False)
        return str(written(judged, kind, prior, Path(tempfile.mkdtemp(dir=uploads))))

    return write


def written(judged: Judged, kind: str, prior: str, folder: Path) -> Path:
    """A download: "csv" (a row per system), "windows" (a row per window), "json" or "png".

    Raises:
        PageError: a picture of a system that has nothing to draw.
    """
    stem = Path(judged.name).stem
    if kind in ("csv", "windows"):
        name = f"{stem}.csv" if kind == "csv" else f"{stem}_timeline.csv"
        return judged.write_rows(folder / name, prior, windows=kind == "windows")
    path = folder / f"{stem}.{kind}"
    if kind == "json":
        with replacing(path) as beside:
            beside.write_text(json.dumps(judged.as_json(prior), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return path
    pictures = judged.draw(folder, prior)
    if not pictures:
        raise PageError("This system has no emotions or attributes to draw over time.")
    _below_each_other(pictures, path)
    return path


def checked_upload(path: str | os.PathLike, uploads: Path, examples: Iterable[Path] = ()) -> Path:
    """A file that a visitor sent, or an example.

    Raises:
        PageError: it is neither (links are followed before that is looked at), or has been removed.
    """
    file = Path(path).resolve()
    if not (file.is_relative_to(uploads.resolve()) or file in {example.resolve() for example in examples}):
        raise PageError("That file was not uploaded to this page: upload it.")
    if not file.is_file():
        raise PageError("That file is no longer here, because nobody used it for a while: upload it again.")
    os.utime(file)  # used now: it stays
    return file


def playable(file: Path, uploads: Path) -> str:
    """The address, relative to the page's, of what the browser plays."""
    if file.suffix.lower() not in PLAYABLE or not file.is_relative_to(uploads.resolve()):
        rate = 16000
        waveform = load_audio(str(file), rate)
        file = Path(tempfile.mkdtemp(dir=uploads.resolve())) / f"{file.stem}.wav"
        soundfile.write(file, waveform.clip(-1, 1), rate)
    return f"gradio_api/file={quote(str(file))}"


def _below_each_other(pictures: Sequence[Path], path: Path) -> None:
    from PIL import Image

    images = [Image.open(picture).convert("RGB") for picture in pictures]
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    whole.save(path)
    for picture in pictures:
        picture.unlink()
