"""`sailer page`: a page on this machine where anyone can hear and see what a system says of a recording."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailer.inference.loading import load
from sailer.inference.page_parts import folder_tab, live_tab, recording_tab, speaker_tab
from sailer.inference.page_parts.examples import make_examples
from sailer.inference.page_parts.judging import Limits, PageError, System

if TYPE_CHECKING:
    import argparse

logger = logging.getLogger(__name__)

PARTS = Path(__file__).parent / "page_parts"
SWEEP_S = 60.0  # from one removal of old files to the next
MOST_SESSIONS = 200  # whose results are kept
NOTE = (
    "It judges how speech sounds to others, from acted or annotated recordings, and is often wrong. It is not for "
    "decisions about people: not for hiring, policing, schools, insurance, health or lie detection, and it does not "
    "know what anyone feels. Ask before you judge the voice of others. Recordings are heard on the machine that "
    "serves this page and sent nowhere else; uploads are removed {keep} minutes after their last use, and when the "
    "page ends."
)


@dataclass
class PageSettings:
    """What the page shows and how much it takes.

    Args:
        models: one or two folders or Hub ids; two stand side by side.
        backend, precision, device: the runtime, see `sailer.load`.
        transcriber: speech-recognition model for systems that read transcripts.
        examples: folder of clips to try; by default some are made, where eSpeak NG is installed.
        host, port: where the page is; "127.0.0.1" is this machine alone.
        max_minutes, max_megabytes: longest and largest recording.
        max_files: of the folder's tab.
        max_waiting: visitors who wait for their result; more are told to come again.
        keep_minutes: how long an upload stays after its last use.
        window_s, hop_s: of the results over time.

    Raises:
        PageError: no model, more than two, or a limit out of its range.
    """

    models: Sequence[str]
    backend: str = "torch"
    precision: str | None = None
    device: str | None = None
    transcriber: str | None = None
    examples: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    max_minutes: float = 60.0
    max_megabytes: int = 200
    max_files: int = 200
    max_waiting: int = 100
    keep_minutes: float = 30.0
    window_s: float = 3.0
    hop_s: float = 1.0
    limits: Limits = field(init=False)

    def __post_init__(self) -> None:
        if not self.models:
            raise PageError(
                "No system to show: name a folder or Hub id. `make demo` makes one in some minutes; then: "
                "sailer page outputs/demo"
            )
        if len(self.models) > 2:
            raise PageError(f"{len(self.models)} systems: the page shows one, or two side by side.")
        for name in ("max_minutes", "max_megabytes", "max_files", "max_waiting", "keep_minutes"):
            if getattr(self, name) <= 0:
                raise PageError(f"{name} is {getattr(self, name)}; it must be above 0.")
        self.limits = Limits(60 * self.max_minutes, self.window_s, self.hop_s)


def main(command: argparse.Namespace) -> int:
    """`sailer page`: serve until interrupted."""
    names = {item.name for item in dataclasses.fields(PageSettings) if item.init}
    settings = PageSettings(**{name: value for name, value in vars(command).items() if name in names})
    with served(settings) as address:
        print(f"The page is at {address} (Ctrl+C ends it)", flush=True)
        threading.Event().wait()
    return 0


@contextmanager
def served(settings: PageSettings) -> Iterator[str]:
    """The page while the block runs; its address. Temporary files are gone when it ends.

    Raises:
        ImportError: Gradio is not installed (the message names the extra).
        PageError: a system that is nowhere, or a port in use.
        ValueError: see `sailer.load`.
    """
    import_gradio()
    systems = load_systems(settings)
    with tempfile.TemporaryDirectory(prefix="sailer-page-") as folder:
        uploads = Path(folder, "uploads")
        uploads.mkdir()
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # read while the page is built and whenever a file is asked for
        ended = threading.Event()
        sweeper = threading.Thread(target=_sweep_until, args=(ended, uploads, 60 * settings.keep_minutes), daemon=True)
        blocks = build(settings, systems, uploads, _examples(settings, Path(folder)))
        try:
            address = _launch(blocks, settings)
            sweeper.start()
            yield address
        finally:
            ended.set()
            blocks.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def build(settings: PageSettings, systems: Sequence[System], uploads: Path, examples: Mapping[Path, str]) -> Any:
    """The page, not yet served: its tabs, and the queue in which visitors wait."""
    gradio = import_gradio()
    with gradio.Blocks(title="sailer: emotions in speech", analytics_enabled=False) as blocks:
        gradio.Markdown("# Emotions in speech")
        named = ", ".join(system.name for system in systems)
        gradio.Markdown(f"What {named} hears in a recording, how it moves, and how sure the system is.")
        with gradio.Tabs():
            with gradio.Tab("A recording"):
                recording_tab.add(gradio, systems, settings, uploads, examples)
            with gradio.Tab("Live"):
                live_tab.add(gradio, systems[0], settings)
            with gradio.Tab("A folder"):
                folder_tab.add(gradio, systems[0], settings, uploads)
            with gradio.Tab("A speaker"):
                speaker_tab.add(gradio, systems[0], settings, uploads)
        gradio.Markdown(NOTE.format(keep=f"{settings.keep_minutes:g}"), elem_id="sailer-note")
    return blocks.queue(default_concurrency_limit=1, max_size=settings.max_waiting, api_open=False)


def load_systems(settings: PageSettings) -> list[System]:
    """The systems, each under a name of its own.

    Raises:
        PageError: there is no such system.
        ValueError, ImportError: see `sailer.load`.
    """
    systems: list[System] = []
    for model in settings.models:
        options = {"device": settings.device} if settings.device else {}
        try:
            classifier = load(model, settings.backend, settings.precision, batch_size=8, **options)
        except OSError as error:
            raise PageError(
                f"{model}: no system there ({str(error).splitlines()[0][:200]}). `make demo` makes one in some "
                "minutes; then: sailer page outputs/demo"
            ) from error
        name = Path(model).name or str(model)
        taken = {system.name for system in systems}
        systems.append(System(name if name not in taken else f"{name} (2)", classifier))
    return systems


def sweep(folder: Path, age: float) -> int:
    """Remove files that were last used over `age` seconds ago, and folders that are empty; how many files went."""
    removed = 0
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder holds comes before it
        try:
            if path.is_dir():
                if time.time() - path.stat().st_mtime > age:
                    path.rmdir()
            elif time.time() - path.stat().st_mtime > age:
                path.unlink()
                removed += 1
        except OSError:  # a folder that is not empty, or a file that has gone
            continue
    return removed


def free_port(host: str) -> int:
    """A port that nothing uses now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def import_gradio() -> Any:
    """Gradio, which sends nothing home.

    Raises:
        ImportError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"The page needs Gradio ({error}): pip install sailer[page]") from error
    return gradio


def _launch(blocks: Any, settings: PageSettings) -> str:
    """Serve the page from a thread; its address."""
    gradio = import_gradio()
    port = settings.port or free_port(settings.host)
    try:
        _, address, _ = blocks.launch(
            server_name=settings.host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            inbrowser=False,
            max_file_size=settings.max_megabytes * gradio.FileSize.MB,
            state_session_capacity=MOST_SESSIONS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            pwa=False,
            ssr_mode=False,
            mcp_server=False,
            theme=_theme(gradio),
            css=(PARTS / "page.css").read_text(encoding="utf-8"),
            head=f"<script>{(PARTS / 'page.js').read_text(encoding='utf-8')}</script>",
        )
    except OSError as error:
        raise PageError(f"{settings.host} port {port} cannot be served ({error}): try --port 0.") from error
    return str(address)


def _sweep_until(ended: threading.Event, folder: Path, age: float) -> None:
    while not ended.wait(min(SWEEP_S, age)):
        sweep(folder, age)


def _examples(settings: PageSettings, folder: Path) -> dict[Path, str]:
    """Clips to try, and what is said in them where that is known: in a .txt file beside a clip."""
    from sailer.inference.recordings import find_recordings

    if settings.examples is not None:
        files = [Path(file).resolve() for file in find_recordings([str(settings.examples)])]
        beside = {file: file.with_suffix(".txt") for file in files}
        return {
            file: text.read_text(encoding="utf-8").strip() if text.is_file() else "" for file, text in beside.items()
        }
    try:
        return make_examples(folder / "examples")
    except ImportError as error:
        logger.info("The page has no example clips: %s", error)
        return {}


def _theme(gradio: Any) -> Any:
    """Fonts of the machine: none is fetched."""
    theme = gradio.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    # Gradio's own are too pale to be read by all (WCAG wants a contrast of 4.5).
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


__all__ = ["PageSettings", "build", "main", "served", "sweep"]
