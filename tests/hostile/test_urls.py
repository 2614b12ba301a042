"""URLs of a server that stalls, drips, lies about its length, redirects elsewhere or speaks no HTTP: errors, soon."""

import contextlib
import io
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sailer import SpeechEmotionPipeline
from sailer.inference.predict import PredictionSettings, load_classifier

RATE = 16000
STALL, WHOLE = 0.4, 1.2  # seconds


def wav() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, RATE), RATE, format="WAV")
    return file.getvalue()


WAV = wav()
Send = Callable[[bytes], None]


def answer(*lines: str, content: bytes = b"", status: str = "200 OK") -> Callable[[Send, threading.Event], None]:
    head = "\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode()
    return lambda send, stopped: send(head + content)


def stalls(after: bytes) -> Callable[[Send, threading.Event], None]:
    def serve(send: Send, stopped: threading.Event) -> None:
        send(after)
        stopped.wait()

    return serve


def drips(before: bytes, drop: bytes) -> Callable[[Send, threading.Event], None]:
    def serve(send: Send, stopped: threading.Event) -> None:
        send(before)
        while not stopped.wait(STALL / 4):
            send(drop)

    return serve


def floods(send: Send, stopped: threading.Event) -> None:
    send(b"HTTP/1.0 200 OK\r\n\r\n")
    while not stopped.is_set():
        send(bytes(2**16))


BAD: dict[str, tuple[Callable[[Send, threading.Event], None], str]] = {
    "missing": (answer(status="404 Not Found"), "HTTP Error 404"),
    "broken": (answer(status="500 Oops"), "HTTP Error 500"),
    "without-a-word": (lambda send, stopped: None, "closed connection|reset"),
    "no-http": (lambda send, stopped: send(b"SSH-2.0-OpenSSH\r\n"), "BadStatusLine"),
    "a-page": (answer("Content-Length: 13", content=b"<html></html>"), "is not readable audio"),
    "empty": (answer("Content-Length: 0"), "is not readable audio"),
    "cut-short": (answer(f"Content-Length: {len(WAV)}", content=WAV[:999]), r"ended after 999 of 32044 bytes"),
    "cut-in-a-chunk": (answer("Transfer-Encoding: chunked", content=b"800\r\n" + WAV[:999]), "IncompleteRead"),
    "chunks-of-garbage": (answer("Transfer-Encoding: chunked", content=b"zz\r\n"), "IncompleteRead|invalid literal"),
    "claims-a-petabyte": (answer("Content-Length: 1000000000000000"), "announces 1000000000000000 bytes"),
    "never-ends": (floods, "sends more than 1000000 bytes"),
    "stalls-at-once": (stalls(b""), "timed out"),
    "stalls-in-its-header": (stalls(b"HTTP/1.1 200 OK\r\nContent-"), "timed out"),
    "stalls-in-its-content": (stalls(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + WAV[:99]), "timed out"),
    "drips-its-status": (drips(b"HTTP/1.1 200 ", b"O"), r"more than 1\.2 s"),
    "drips-headers": (drips(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n"), r"more than 1\.2 s"),
    "drips-content": (drips(b"HTTP/1.0 200 OK\r\n\r\n" + WAV[:99], b"\0"), r"more than 1\.2 s"),
    "to-a-file": (answer("Location: file:///etc/passwd", status="302 Found"), "'file:///etc/passwd' is not allowed"),
    "to-ftp": (answer("Location: ftp://127.0.0.1/a.wav", status="302 Found"), "unknown url type: ftp"),
    "to-itself": (answer("Location: /to-itself", status="302 Found"), "infinite loop"),
    "to-nowhere": (answer("Location: http://[", status="302 Found"), "cannot be fetched"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server on this machine that answers by path."""
    stopped = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            asked = b""
            while b"\r\n\r\n" not in asked:
                piece = self.request.recv(4096)
                if not piece:
                    return
                asked += piece
            path = asked.split()[1].decode().strip("/")
            serve = BAD[path][0] if path in BAD else GOOD[path]
            with contextlib.suppress(OSError):  # the client has left
                serve(self.request.sendall, stopped)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as made:
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        stopped.set()
        made.shutdown()


@pytest.fixture(scope="module")
def speech(tiny_speech_sailer: Path) -> SpeechEmotionPipeline:
    return load_classifier(PredictionSettings(str(tiny_speech_sailer)))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sailer.audio_sailer.STALL_SECONDS", STALL)
    monkeypatch.setattr("sailer.audio_sailer.DOWNLOAD_SECONDS", WHOLE)
    monkeypatch.setattr("sailer.audio_sailer.MAXIMUM_DOWNLOAD", 1_000_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", BAD)
def test_a_bad_url_is_one_error_in_time(path: str, speech: SpeechEmotionPipeline, server: str) -> None:
    url, begun = f"{server}/{path}", time.monotonic()
    good, bad, again = speech([WAV, url, WAV], on_error="return", batch_size=4)
    assert re.search(BAD[path][1], bad["error"]) and bad["error"].startswith(url), bad
    assert good == again and len(good) == 9
    assert time.monotonic() - begun < 2 * WHOLE


GOOD = {
    "whole": answer(f"Content-Length: {len(WAV)}", content=WAV),
    "of-no-length": answer(content=WAV),
    "in-chunks": answer("Transfer-Encoding: chunked", content=f"{len(WAV):x}\r\n".encode() + WAV + b"\r\n0\r\n\r\n"),
    "elsewhere": answer("Location: /whole", status="301 Moved Permanently"),
}


@pytest.mark.parametrize("path", GOOD)
def test_a_good_url_is_heard(path: str, speech: SpeechEmotionPipeline, server: str) -> None:
    assert speech(f"{server}/{path}") == speech(WAV)
    assert speech(f"{server.upper()}/{path}") == speech(WAV)


def test_a_server_that_understates_its_length(
    speech: SpeechEmotionPipeline, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(GOOD, "less", answer("Content-Length: 16044", content=WAV))
    with caplog.at_level("WARNING", logger="sailer.pipeline_sailer"):
        assert len(speech(f"{server}/less")) == 9
    assert re.search(r"/less is cut short or damaged: the 0\.50 s", caplog.text)
