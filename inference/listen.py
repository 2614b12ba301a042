"""`sailer listen`: emotions as they are heard, from a file, standard input or a microphone, shown in a terminal."""

from __future__ import annotations

import json
import logging
import queue
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

import numpy as np

from sailer.audio_sailer import RATES, load_audio
from sailer.inference.loading import load
from sailer.inference.streaming import EmotionStream
from sailer.windows_sailer import at_least, count_of

if TYPE_CHECKING:
    import argparse

logger = logging.getLogger(__name__)

SAMPLE_FORMATS = {"int16": "<i2", "int32": "<i4", "float32": "<f4"}
# A WAV header's format and bits per sample -> samples as they lie in the file.
WAV_FORMATS = {(1, 8): "u1", (1, 16): "<i2", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}
EXTENSIBLE = 0xFFFE  # the format stands further on
UNKNOWN_BYTES = 0x7FFFF000  # from here on a header's length is that of a stream, which nobody knew
BLOCKS_A_SECOND = 10
BEHIND_S = 30  # what a microphone may be ahead of the model
EIGHTHS = " ▏▎▍▌▋▊▉█"


class ListenError(ValueError):
    """The audio that is listened to cannot be used, or ended where it cannot."""


class Heard(NamedTuple):
    """What is listened to: blocks of shape (samples,) or (samples, channels), at a rate in Hz."""

    blocks: Iterator[np.ndarray]
    rate: float


def main(command: argparse.Namespace) -> int:
    """`sailer listen`. An interruption is how a microphone's listener ends it, and no error."""
    given = {"device": command.device, "transcriber": command.transcriber, "prior": command.prior}
    options = {name: value for name, value in given.items() if value is not None}
    classifier = load(command.model, command.backend, command.precision, **options)
    stream = EmotionStream(
        classifier, command.chunk_s, command.hop_s, command.smooth_s, return_all=True, return_embedding=False
    )
    if command.source is None:
        heard = microphone(command.microphone)
    elif command.source == "-":
        heard = standard_input(sys.stdin.buffer, command.rate, command.channels, command.sample_format)
    else:
        waveform = load_audio(command.source, stream.rate)
        blocks = (waveform[start : start + stream.hop] for start in range(0, len(waveform), stream.hop))
        heard = Heard(blocks, stream.rate)
    style = command.style or ("bars" if sys.stdout.isatty() else "lines")
    show(results(stream, heard), style, sys.stdout)
    return 0


def results(stream: EmotionStream, heard: Heard) -> Iterator[dict[str, Any]]:
    """The stream's results, the last one too where the audio breaks off or is interrupted."""
    broken: ListenError | None = None
    try:
        for block in heard.blocks:
            yield from stream.feed(block, heard.rate)
    except KeyboardInterrupt:
        pass
    except ListenError as error:
        broken = error
    yield from stream.close()
    if stream.seconds == 0 and broken is None:
        broken = ListenError("There was no audio to listen to.")
    if broken is not None:
        raise broken


def standard_input(
    file: BinaryIO, rate: float | None = None, channels: int | None = None, sample_format: str | None = None
) -> Heard:
    """Blocks of a tenth of a second from a pipe that has a WAV file, or raw samples without a header.

    Args:
        file: binary, read from where it is; it need not be seekable, and may never end.
        rate, channels, sample_format: of raw samples: in Hz, 1 by default, and a name of `SAMPLE_FORMATS`, int16 by
            default, little-endian. A WAV file says so itself.

    Raises:
        ListenError: neither WAV nor raw samples of a given rate, a WAV file of another kind, options that contradict
            its header; and from the blocks, behind the last whole sample, where the pipe ends within one.
    """
    start = file.read(4)
    if start in (b"RIFF", b"RF64"):
        wav_rate, wav_channels, kind, size = _wav_header(file)
        for option, told, own in (("rate", rate, wav_rate), ("channels", channels, wav_channels)):
            if told is not None and told != own:
                raise ListenError(f"--{option} is {told:g}, but the piped WAV file has {own}: leave it out.")
        return Heard(_blocks(file, b"", size, wav_rate, wav_channels, kind), wav_rate)
    if rate is None:
        raise ListenError(
            "Standard input has no WAV file. For raw samples give their --rate in Hz (and --channels, "
            "--sample_format); have anything else decoded first, for instance by ffmpeg -i FILE -f wav -."
        )
    at_least("--rate", rate, RATES[0])
    count_of("--channels", 1 if channels is None else channels, 1)
    kind = SAMPLE_FORMATS[sample_format or "int16"]
    return Heard(_blocks(file, start, None, rate, channels or 1, kind), rate)


def microphone(name: str | None = None) -> Heard:
    """Blocks of a tenth of a second from a microphone, at its own rate, until interrupted.

    Args:
        name: number, or part of the name, of an input device of sounddevice; the system's own by default.

    Raises:
        ImportError: sounddevice, or the PortAudio library beneath it, is not installed.
        ListenError: there is no such device; and from the blocks, where the model is left far behind.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: it is there, and PortAudio is not
        raise ImportError(
            f"A microphone needs the sounddevice package (pip install 'sailer[microphone]') and PortAudio: {error}. "
            "Or name a file to listen to, or - for standard input."
        ) from error
    device = int(name) if name is not None and name.isdigit() else name
    try:
        rate = float(sounddevice.query_devices(device, "input")["default_samplerate"])
    except (ValueError, sounddevice.PortAudioError) as error:
        raise ListenError(f"There is no microphone {'' if name is None else repr(name)} here: {error}") from error
    return Heard(_recorded(sounddevice, device, rate), rate)


def show(shown: Iterable[Mapping[str, Any]], style: str, file: TextIO) -> None:
    """Write results as they come: "bars" redraws a chart in its place, "lines" and "json" have a line each."""
    drawn = 0
    for result in shown:
        if style == "json":
            print(json.dumps(result), file=file, flush=True)
        elif style == "lines":
            print(line_of(result), file=file, flush=True)
        else:
            lines = bars_of(result, shutil.get_terminal_size().columns, can_draw(file))
            back = f"\x1b[{drawn}A" if drawn else ""
            print(back + "\n".join(f"{line}\x1b[K" for line in lines), file=file, flush=True)
            drawn = len(lines)


def line_of(result: Mapping[str, Any]) -> str:
    """`    1.00 -    4.00 s  Happy     Happy 0.71  Neutral 0.20  Sad 0.05  arousal 0.61  ...`"""
    start, end = result["timestamp"]
    cells = [f"{start:8.2f} - {end:8.2f} s", f"{result['label']:<9}"] if "label" in result else []
    cells = cells or [f"{start:8.2f} - {end:8.2f} s"]
    cells += [f"{name} {score:.2f}" for name, score in _scores(result, ranked=True)]
    return "  ".join(cells)


def bars_of(result: Mapping[str, Any], width: int = 80, fine: bool = True) -> list[str]:
    """The time and the decision, then a bar per emotion and attribute, always in the same places.

    Args:
        result: of the stream, with `return_all`.
        width: of the terminal, in characters.
        fine: draw with block characters, in eighths; else with #.
    """
    start, end = result["timestamp"]
    rows = _scores(result, ranked=False)
    name_width = max((len(name) for name, _ in rows), default=0)
    longest = max(8, width - name_width - 8)
    lines = [f"{start:.2f} - {end:.2f} s   {result.get('label', '')}".rstrip()]
    for name, score in rows:
        eighths = round(8 * longest * min(max(score, 0), 1))
        full = EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
        bar = full if fine else "#" * round(eighths / 8)
        lines.append(f"{name:<{name_width}} {bar:<{longest}} {score:.2f}")
    return lines


def can_draw(file: TextIO) -> bool:
    """Whether what is written to this file may hold block characters."""
    try:
        EIGHTHS.encode(file.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _scores(result: Mapping[str, Any], ranked: bool) -> list[tuple[str, float]]:
    emotions = [(row["label"], row["score"]) for row in result.get("primary", ())]
    return (emotions if ranked else sorted(emotions)) + list(result.get("attributes", {}).items())


def _wav_header(file: BinaryIO) -> tuple[int, int, str, int | None]:
    """Rate, channels, kind of sample, and bytes of samples where known, of a WAV file behind its first word."""
    kind, rate, channels = None, 0, 0
    _exactly(file, 8)
    while True:
        name, size = struct.unpack("<4sI", _exactly(file, 8))
        if name == b"data":
            break
        if size > 2**20:
            raise ListenError(f"The WAV file on standard input has {size} bytes of {name!r} before its samples.")
        content = _exactly(file, size + size % 2)
        if name == b"fmt " and size >= 16:
            code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", content[:16])
            if code == EXTENSIBLE and size >= 26:
                code = struct.unpack("<H", content[24:26])[0]
            if (code, bits) not in WAV_FORMATS:
                raise ListenError(
                    f"The WAV file on standard input has samples of format {code} with {bits} bits; convert it to 16 "
                    "bits, for instance by ffmpeg -i FILE -f wav -."
                )
            kind = WAV_FORMATS[code, bits]
    if kind is None or channels < 1:
        raise ListenError("The WAV file on standard input does not say what its samples are: its header is damaged.")
    return rate, channels, kind, size if 0 < size < UNKNOWN_BYTES else None


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise ListenError("Standard input ended within the header of its WAV file.")
    return content


def _blocks(
    file: BinaryIO, start: bytes, size: int | None, rate: float, channels: int, kind: str
) -> Iterator[np.ndarray]:
    """Whole frames (a sample of each channel) as they come; what is promised of a WAV file and missing is told."""
    frame = np.dtype(kind).itemsize * channels
    wanted = max(1, round(rate / BLOCKS_A_SECOND)) * frame
    rest, heard = start, 0
    while True:
        asked = wanted - len(rest)
        content = file.read(asked if size is None else min(asked, size - heard - len(rest)))
        rest += content
        whole = len(rest) // frame * frame
        if whole:
            yield np.frombuffer(rest[:whole], kind).reshape(-1, channels)
        heard, rest = heard + whole, rest[whole:]
        if not content:
            break
    seconds = heard / frame / rate
    if rest:
        raise ListenError(
            f"Standard input stopped in mid-sample, {len(rest)} bytes into the {frame} of a frame ({channels} x "
            f"{np.dtype(kind).name}), after {seconds:.2f} s: was it cut off, or are --channels and --sample_format "
            "others?"
        )
    if size is not None and heard < size:
        logger.warning("Standard input ended after %.2f s; its header promises %.2f s.", seconds, size / frame / rate)


def _recorded(sounddevice: Any, device: int | str | None, rate: float) -> Iterator[np.ndarray]:
    waiting: queue.Queue[np.ndarray] = queue.Queue(BEHIND_S * BLOCKS_A_SECOND)
    lost: list[str] = []

    def keep(block: np.ndarray, frames: int, time: Any, status: Any) -> None:
        if status:
            logger.warning("The microphone: %s", status)
        try:
            waiting.put_nowait(block.copy())
        except queue.Full:
            lost.append("")

    size = round(rate / BLOCKS_A_SECOND)
    with sounddevice.InputStream(rate, size, device, channels=1, dtype="float32", callback=keep):
        while not lost:
            try:
                yield waiting.get(timeout=0.1)
            except queue.Empty:
                continue
    raise ListenError(
        f"The model is {BEHIND_S} s behind the microphone: it takes longer for a window than --hop_s. Choose a longer "
        "hop_s, a shorter chunk_s, or a faster --backend."
    )


__all__ = ["ListenError", "main", "microphone", "results", "show", "standard_input"]
