"""Text -> 16-bit speech through the eSpeak NG library that PyPI's `espeakng-loader` carries (GPL, hence optional)."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8, _BY_CHARACTER = 2, 0x8000, 1, 1
_PARAMETERS = {"rate": (1, 80, 450), "volume": (2, 0, 200), "pitch": (3, 0, 99), "pitch_range": (4, 0, 99)}
_ENGLISH_DATA = ("phontab", "phonindex", "phondata", "intonations", "en_dict")
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class Voice:
    """A speaker: accent (en-us, en-us-nyc, en-gb-x-rp or en-029), sex, pitch in Hz, formant frequencies in percent."""

    accent: str = "en-us"
    sex: str = "male"
    pitch: int = 90
    formants: tuple[int, ...] = (100, 100, 100, 100, 100)

    def definition(self) -> str:
        """eSpeak's description of the voice.

        Flutter and roughness are off: eSpeak never rewinds the table that flutter walks through, so with it the same
        text gives other samples each time.
        """
        lines = ["language variant", f"gender {self.sex}", f"pitch {self.pitch} {round(self.pitch * 1.45)}"]
        lines += [f"formant {number} {percent} 100 100" for number, percent in enumerate(self.formants)]
        return "\n".join([*lines, "flutter 0", "roughness 0", ""])


class Espeak:
    """The library, which has one global state per process: use the instance that `espeak()` keeps.

    Raises:
        ImportError: `espeakng-loader` is not installed, or its library does not load here.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader

            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except (ImportError, OSError) as error:
            raise ImportError(
                f"Synthetic speech needs the eSpeak NG library of espeakng-loader ({error}): pip install sailer[demo]"
            ) from error
        # A copy of the English data: voices can be added to it, and its path is short (eSpeak takes 160 characters).
        self._folder = tempfile.TemporaryDirectory(prefix="espeak")
        source, target = Path(espeakng_loader.get_data_path()), Path(self._folder.name, "espeak-ng-data")
        shutil.copytree(source / "lang" / "gmw", target / "lang" / "gmw")
        for name in _ENGLISH_DATA:
            shutil.copy(source / name, target)
        self._variants = target / "voices" / "!v"
        self._variants.mkdir(parents=True)

        self.sampling_rate: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, str(target).encode(), _DO_NOT_EXIT)
        if self.sampling_rate <= 0:
            raise ImportError(f"eSpeak NG did not start from {target}: pip install --force-reinstall espeakng-loader")
        self._chunks: list[bytes] = []
        self._callback = _Callback(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        self._names: dict[Voice, str] = {}
        self._lock = threading.Lock()

    def speak(
        self,
        text: str,
        voice: Voice,
        *,
        rate: float = 175,
        volume: float = 100,
        pitch: float = 50,
        pitch_range: float = 50,
    ) -> np.ndarray:
        """Say `text`: (samples,) int16 at `sampling_rate`, the same for the same arguments whatever was said before.

        Args:
            text: English.
            voice: the speaker.
            rate: words per minute, 80 to 450.
            volume: 100 is normal; above 150 loud voices clip.
            pitch: 0 to 99 around the voice's own pitch at 50.
            pitch_range: 0 (monotone) to 99.
        """
        values = {"rate": rate, "volume": volume, "pitch": pitch, "pitch_range": pitch_range}
        with self._lock:
            self._set_voice(voice)
            # The filters still ring from the last utterance; after a fixed word they ring the same way every time.
            self._synthesize("Oh.", dict.fromkeys(values, 50) | {"rate": 175})
            return self._synthesize(text, values)

    def _set_voice(self, voice: Voice) -> None:
        if voice not in self._names:
            self._names[voice] = f"voice{len(self._names)}"
            (self._variants / self._names[voice]).write_text(voice.definition())
        self._check(
            self._library.espeak_SetVoiceByName(f"{voice.accent}+{self._names[voice]}".encode()), f"the voice {voice}"
        )

    def _synthesize(self, text: str, values: Mapping[str, float]) -> np.ndarray:
        for name, value in values.items():
            number, lowest, highest = _PARAMETERS[name]
            bounded = min(max(round(value), lowest), highest)
            self._check(self._library.espeak_SetParameter(number, bounded, 0), f"{name}={bounded}")
        self._chunks.clear()
        encoded = text.encode() + b"\0"
        size = ctypes.c_size_t(len(encoded))
        status = self._library.espeak_Synth(encoded, size, 0, _BY_CHARACTER, 0, _UTF8, None, None)
        self._check(status, f"the text {text!r}")
        return np.frombuffer(b"".join(self._chunks), dtype=np.int16)

    def _collect(self, samples: int | None, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status != 0:
            raise ValueError(f"eSpeak NG refused {what} (status {status}).")


@cache
def espeak() -> Espeak:
    """The process's one eSpeak, started on first use."""
    return Espeak()
