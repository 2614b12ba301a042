"""sailer.load: any system in any runtime, what that takes made once, and clear errors where it cannot be had."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import sailer
from sailer import SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline
from sailer.cli import main
from sailer.hub.conversion import convert
from sailer.hub.publishing import push
from sailer.inference import loading
from sailer.inference.backends.base import BackendError

from .hub_server import HubServer
from .sounds import noise


def write_noise(path: Path, seconds: float, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(path, noise(seconds, seed), 16000)
    return path


def scores(results: list) -> np.ndarray:
    """(clips, labels) in the order of the labels' names."""
    return np.array([[row["score"] for row in sorted(result, key=lambda row: row["label"])] for result in results])


@pytest.fixture
def system(tiny_speech_sailer: Path, tmp_path: Path) -> Path:
    """A trained folder that a test may change."""
    return Path(shutil.copytree(tiny_speech_sailer, tmp_path / "system"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAILER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def retrain(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["heads.primary.2.bias"][3] += 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_torch_is_the_pipeline_as_ever(system: Path, different_clips: list[np.ndarray]) -> None:
    classifier = sailer.load(system, batch_size=3, prior="balanced")
    plain = SpeechEmotionPipeline(
        model=SailerForAudioClassification.from_pretrained(system), processor=SailerProcessor.from_pretrained(system)
    )
    assert type(classifier) is SpeechEmotionPipeline and not list(system.glob("onnx*"))
    np.testing.assert_allclose(scores(classifier(different_clips)), scores(plain(different_clips)), atol=1e-5)


def test_torch_has_its_precisions(system: Path) -> None:
    assert sailer.load(system).model.dtype == torch.float32
    assert sailer.load(system, precision="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tensorflow"}, r"backend is 'tensorflow'; choose one of \['torch', 'onnx', 'openvino'\]"),
        ({"precision": "int8"}, r"precision is 'int8'; the backend 'torch' has \['auto', 'float32'"),
        ({"backend": "onnx", "precision": "bfloat16"}, r"the backend 'onnx' has \['float32', 'int8'\]"),
        ({"backend": "openvino", "precision": "float16"}, "the backend 'openvino' has"),
    ],
)
def test_what_there_is_not(options: dict, message: str, system: Path) -> None:
    with pytest.raises(BackendError, match=message):
        sailer.load(system, **options)


@pytest.mark.parametrize(("backend", "module"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_extra_is_named(
    backend: str, module: str, system: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    with pytest.raises(ImportError, match=rf"needs {module} .*: pip install 'sailer\[{backend}\]'"):
        sailer.load(system, backend=backend)
    clip = write_noise(tmp_path / "clip.wav", seconds=1)
    output = tmp_path / "out.csv"
    assert main(["predict", str(system), str(clip), "--backend", backend, "--output", str(output)]) == 2
    assert f"pip install 'sailer[{backend}]'" in capsys.readouterr().err
    assert not output.exists() and not list(system.glob("onnx*"))  # before an export, which would be vain


def test_a_released_checkpoint_is_converted_once(shared: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    source = shared / "reference" / "vox_profile" / "whisper_frozen"
    clip = noise(1.0, seed=1)
    first = sailer.load(source)(clip)
    (folder,) = (cache / "converted").iterdir()
    expected = sailer.load(convert(source, tmp_path / "by_hand"))(clip)
    np.testing.assert_allclose(scores([first]), scores([expected]), atol=1e-6)

    def twice(*_: object) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(loading, "convert", twice)
    assert sailer.load(source)(clip) == first
    assert list((cache / "converted").iterdir()) == [folder]


def test_a_released_checkpoint_of_the_hub_too(shared: Path, cache: Path, hub: HubServer, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    source = shared / "reference" / "vox_profile" / "whisper_dim"
    HfApi().create_repo("me/released")
    for name in ("config.json", "backbone_config.json", "model.safetensors"):
        HfApi().upload_file(path_or_fileobj=source / name, path_in_repo=name, repo_id="me/released")
    result = sailer.load("me/released")(noise(1.0, seed=1))
    assert result == sailer.load(source)(noise(1.0, seed=1))
    assert {row["label"] for row in result} == {"arousal", "valence", "dominance"}


# ---- with the extras


@pytest.mark.slow
def test_an_export_stays_beside_the_system_until_that_changes(system: Path, different_clips, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    made: list[Path] = []
    export = loading.export

    def counted(source: Path, folder: Path, precision: str) -> Path:
        made.append(source)
        return export(source, folder, precision=precision)

    monkeypatch.setattr(loading, "export", counted)
    first = scores(sailer.load(system, backend="onnx")(different_clips))
    np.testing.assert_allclose(first, scores(sailer.load(system)(different_clips)), atol=1e-4)
    assert (system / "onnx" / "model.onnx").is_file()
    np.testing.assert_array_equal(scores(sailer.load(system, backend="onnx")(different_clips)), first)
    assert made == [system]

    retrain(system)
    changed = scores(sailer.load(system, backend="onnx")(different_clips))
    assert made == [system] * 2 and np.abs(changed - first).max() > 0.05
    np.testing.assert_allclose(changed, scores(sailer.load(system)(different_clips)), atol=1e-4)

    config = json.loads((system / "config.json").read_text())
    config["max_seconds"] = 1.0
    (system / "config.json").write_text(json.dumps(config))
    windowed = scores(sailer.load(system, backend="onnx")(different_clips))
    assert len(made) == 3
    np.testing.assert_allclose(windowed, scores(sailer.load(system)(different_clips)), atol=1e-4)

    content = (system / "onnx" / "model.onnx").read_bytes()
    (system / "onnx" / "model.onnx").write_bytes(content[: len(content) // 2])  # its own, so it is made anew
    np.testing.assert_allclose(scores(sailer.load(system, backend="onnx")(different_clips)), windowed, atol=1e-5)
    assert len(made) == 4


@pytest.mark.slow
def test_an_export_of_a_folder_that_cannot_be_written_is_in_the_cache(
    system: Path, cache: Path, different_clips, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(loading.tempfile, "TemporaryFile", lambda **_: (_ for _ in ()).throw(OSError("read-only")))
    before = set(system.iterdir())
    results = scores(sailer.load(system, backend="onnx")(different_clips))
    assert set(system.iterdir()) == before and len(list(cache.rglob("model.onnx"))) == 1
    np.testing.assert_allclose(results, scores(sailer.load(system)(different_clips)), atol=1e-4)


@pytest.mark.slow
def test_a_system_of_the_hub(system: Path, cache: Path, hub: HubServer, different_clips) -> None:
    pytest.importorskip("onnxruntime")
    (system / "README.md").write_text("# A system\n")
    push(system, "me/system")
    plain = scores(sailer.load("me/system")(different_clips))
    np.testing.assert_allclose(scores(sailer.load("me/system", backend="onnx")(different_clips)), plain, atol=1e-4)
    assert len(list(cache.rglob("model.onnx"))) == 1
    # Pushed with its export, that is what is run.
    shutil.rmtree(cache)
    sailer.load(system, backend="onnx")
    push(system, "me/exported")
    np.testing.assert_allclose(scores(sailer.load("me/exported", backend="onnx")(different_clips)), plain, atol=1e-4)
    assert not list(cache.rglob("model.onnx"))


@pytest.mark.slow
def test_predict_keeps_to_its_backend(system: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("onnxruntime")
    for seed in range(3):
        write_noise(tmp_path / "clips" / f"{seed}.wav", seconds=1 + seed, seed=seed)
    tables = {}
    for backend in ("torch", "onnx"):
        output = tmp_path / f"{backend}.csv"
        command = ["predict", str(system), str(tmp_path / "clips"), "--output", str(output), "--backend", backend]
        assert main(command) == 0
        tables[backend] = [line.split(",")[3:12] for line in output.read_text().splitlines()]
    assert tables["torch"][0] == tables["onnx"][0]
    numbers = {name: np.array(rows[1:], float) for name, rows in tables.items()}
    np.testing.assert_allclose(numbers["torch"], numbers["onnx"], atol=1e-4)
    kept = json.loads((tmp_path / "onnx.csv.settings.json").read_text())
    assert kept["backend"] == "onnx" and kept["precision"] == "float32"
    assert main([*command[:-1], "torch"]) == 2
    assert "backend was 'onnx'" in capsys.readouterr().err
    assert main(command) == 0
