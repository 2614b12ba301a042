"""The page as a process, asked through its API: its options for runtime and transcriber, and its load."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import soundfile

import sailer
from sailer.cli import main

from .page_server import running_page
from .sounds import RATE, noise

pytestmark = pytest.mark.slow
gradio_client = pytest.importorskip("gradio_client", reason="the extra page is not installed")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "page.py"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clips") / "five.wav"
    soundfile.write(file, noise(5.0, 3), RATE, subtype="FLOAT")
    return file


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("page_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def analysed(client: Any, clip: Path, *text: str) -> tuple[str, Any]:
    """The results as HTML, and the last output: what is said, of systems that read it."""
    answer = client.predict(gradio_client.handle_file(clip), "balanced", *text, api_name="/analyse")
    return next(str(part) for part in answer if "sailer-results" in str(part)), answer[-1]


def bars(shown: str) -> dict[str, float]:
    panel = shown.partition('data-panel="distribution"')[2].partition("</ul>")[0]
    return {
        label: float(value)
        for label, value in re.findall(r'"sailer-name">([^<]+)</span>.*?"sailer-value">([\d.]+)<', panel)
    }


def rounded(result: dict) -> dict[str, float]:
    return {row["label"]: pytest.approx(row["score"], abs=0.006) for row in result["primary"]}


def test_a_transcriber_says_what_is_said_where_nobody_types_it(
    tiny_sailer: Path, recognizer: Path, clip: Path, tmp_path: Path
) -> None:
    classifier = sailer.load(tiny_sailer)
    heard = classifier(str(clip), transcriber=str(recognizer), return_all=True)
    assert heard["transcript"]
    with running_page(tiny_sailer, "--transcriber", recognizer, cwd=tmp_path) as (address, _):
        client = gradio_client.Client(address, verbose=False, httpx_kwargs={"timeout": 120})
        shown, said = analysed(client, clip, "")
        assert said == heard["transcript"] and f"<blockquote>{said}</blockquote>" in shown
        assert bars(shown) == rounded(heard) and "only trained with transcripts" not in shown
        typed, said = analysed(client, clip, "leave me alone")
        assert said == "leave me alone" and f"<blockquote>{said}</blockquote>" in typed
        assert bars(typed) == rounded(classifier({"audio": str(clip), "text": said}, return_all=True)) != bars(shown)
        # The other tabs have what is said by it, and do not say that they lack it.
        assert "only trained with transcripts" not in str(client.config)


def test_an_exported_system_is_shown_by_its_own_runtime(tiny_speech_sailer: Path, clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    exported = tmp_path / "exported"
    assert main(["export", str(tiny_speech_sailer), str(exported)]) == 0
    expected = sailer.load(exported, "onnx")(str(clip), return_all=True)
    with running_page(exported, "--backend", "onnx", cwd=tmp_path) as (address, _):
        client = gradio_client.Client(address, verbose=False, httpx_kwargs={"timeout": 120})
        assert bars(analysed(client, clip)[0]) == rounded(expected)
        # It is that runtime indeed: in torch there would be nothing against a single system.
        assert "a single system in torch can" in str(client.config)
        assert not [one for one in client.config["dependencies"] if one["api_name"] == "adapt"]


def test_the_benchmark_of_the_load_finds_mixed_results(benchmark: ModuleType, tmp_path: Path) -> None:
    model = benchmark.make_system(tmp_path / "tiny")
    clips = benchmark.write_clips(tmp_path / "clips", 12)
    expected = benchmark.expectations(model, clips)
    assert len({scores for _, scores in expected}) == len({seconds for seconds, _ in expected}) == 12
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with benchmark.page(model, temporary, keep_minutes=0.4) as (address, process):
        answers = benchmark.visit_all(address, process, clips, expected, visitors=6, strangers=True)
        assert [answer.wrong for answer in answers] == [""] * 12
        assert max(max(answer.places) for answer in answers) >= 3  # some waited behind two others or more
        others = benchmark.visit_all(address, process, clips[:2], expected[1:3], visitors=2)
        assert all(answer.wrong.startswith("the result of a clip of") for answer in others)
        mixed = [(seconds, scores) for (seconds, _), (_, scores) in zip(expected[:2], expected[2:4], strict=True)]
        others = benchmark.visit_all(address, process, clips[:2], mixed, visitors=2)
        assert all(answer.wrong.startswith("scores") for answer in others)
        clips[0].write_bytes(b"no audio")
        (broken,) = benchmark.visit_all(address, process, clips[:1], expected[:1], visitors=1)
        assert broken.wrong.startswith("ValueError: 0.wav")
        assert benchmark.wait_for_sweep(temporary, keep_minutes=0.4) == []
    assert benchmark.files_in(temporary) == []
