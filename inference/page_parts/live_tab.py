"""The live tab: blocks of a microphone go in, the emotions of the last seconds come out as they are heard."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import numpy as np

from sailer.inference.outputs import by_label
from sailer.inference.page_parts import panels
from sailer.inference.page_parts.judging import System
from sailer.inference.streaming import EmotionStream
from sailer.windows_sailer import ITEM_ERRORS

logger = logging.getLogger(__name__)

SHOWN = 60  # results
BLOCK_S = 0.5  # of the microphone, sent at once
LISTENERS = 4  # heard at the same time
LONGEST_S = 600  # of one visitor's listening
READY = "Press record and speak: a result comes each second."


class Listening:
    """One visitor's stream, and its last results."""

    def __init__(self, system: System, chunk_s: float, hop_s: float, transcriber: Any = None) -> None:
        options = {"return_all": True, "return_embedding": False} | system.options(transcriber)
        self.stream = EmotionStream(system.classifier, chunk_s, hop_s, **options)
        self.results: deque[dict[str, Any]] = deque(maxlen=SHOWN)
        self._lock = threading.Lock()  # the blocks of one microphone come one after the other

    def hear(self, rate: int, block: np.ndarray) -> None:
        with self._lock:
            self.results.extend(self.stream.feed(block, rate))

    def shown(self) -> str:
        if not self.results:
            return panels.note(f"Listening: {self.stream.seconds:.1f} s heard.")
        last = self.results[-1]
        parts = [f'<p role="status" class="sailer-note">{self.stream.seconds:.1f} s heard.</p>']
        if "label" in last:
            scores = by_label(last["primary"])
            parts.append(panels.decision(last))
            parts.append(panels.bars({label: scores[label] for label in sorted(scores)}))
        elif "attributes" in last:
            parts.append(panels.bars(last["attributes"]))
        if {"primary", "attributes"} & last.keys():
            parts.append(panels.timeline(list(self.results), [result["timestamp"] for result in self.results]))
        return f'<div class="sailer-results">{"".join(parts)}</div>'


def add(gradio: Any, system: System, settings: Any) -> None:
    """Lay out the tab and say what its events do; see `recording_tab.add`."""
    kept = gradio.State(None, time_to_live=LONGEST_S)
    untold = system.untold(settings.transcriber)
    if untold:
        gradio.HTML(panels.note(untold), elem_classes="sailer-untold")
    microphone = gradio.Audio(
        sources=["microphone"], type="numpy", streaming=True, label="Microphone", elem_id="sailer-live", buttons=[]
    )
    shown = gradio.HTML(panels.note(READY), elem_id="sailer-live-results")
    chunk, hop = settings.window_s, settings.hop_s

    def begin() -> tuple[Any, str]:
        try:
            return Listening(system, chunk, hop, settings.transcriber), panels.note(READY)
        except ITEM_ERRORS as error:
            return None, panels.error(str(error))

    def hear(block: tuple[int, np.ndarray] | None, listening: Listening | None) -> tuple[Any, str]:
        if block is None or not len(block[1]):
            return listening, gradio.skip()
        try:
            listening = listening or Listening(system, chunk, hop, settings.transcriber)
            listening.hear(*block)
            return listening, listening.shown()
        except ITEM_ERRORS as error:
            return None, panels.error(str(error))

    options: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "live", "concurrency_limit": LISTENERS}
    microphone.start_recording(begin, None, [kept, shown], show_progress="hidden", **options)
    microphone.stream(
        hear,
        [microphone, kept],
        [kept, shown],
        stream_every=BLOCK_S,
        time_limit=LONGEST_S,
        show_progress="hidden",
        **options,
    )
