"""Exported systems in onnxruntime and OpenVINO: the pipeline's results are torch's, and what cannot run says why."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sailer
from sailer.inference.backends.base import BackendError

from .conftest import DIFFERENT_TEXTS
from .sounds import noise

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
# What a run differs by from torch in float32: products rounded to bfloat16 or weights to int8 move tiny random
# systems, which were scaled to spread out, further than trained ones.
TOLERANCES = [("onnx", "float32", 1e-4), ("openvino", "float32", 1e-4)]
TOLERANCES += [("onnx", "int8", 0.2), ("openvino", "int8", 0.1), ("openvino", "bfloat16", 0.1)]
# What the docs' script may import; neither torch nor transformers is there.
WITHOUT_TORCH = (
    "numpy",
    "soundfile",
    "_soundfile",
    "cffi",
    "_cffi_backend",
    "pycparser",
    "onnxruntime",
    "flatbuffers",
)
WITHOUT_TORCH += ("google", "typing_extensions", "packaging", "numpy.libs", "onnxruntime.libs", "_soundfile_data")


@pytest.fixture(scope="module", autouse=True)
def extras() -> None:
    for module in ("onnx", "onnxruntime", "onnxscript", "openvino", "nncf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the extras onnx and openvino are not installed ({module} is missing)")


@pytest.fixture(scope="module")
def exported(tiny_speech_sailer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sailer.inference.export import export

    return export(tiny_speech_sailer, tmp_path_factory.mktemp("exported") / "system")


@pytest.fixture
def changed(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy whose ONNX graph was changed by someone who told its checksum."""
    import onnx

    def copy(change: Callable) -> Path:
        folder = Path(shutil.copytree(exported, tmp_path / "changed"))
        model = onnx.load(folder / "model.onnx")
        change(model)
        onnx.save(model, folder / "model.onnx")
        manifest = json.loads((folder / "export.json").read_text())
        content = (folder / "model.onnx").read_bytes()
        manifest["files"]["model.onnx"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (folder / "export.json").write_text(json.dumps(manifest))
        return folder

    return copy


def has(backend: str, precision: str) -> bool:
    from sailer.inference.backends.openvino import has_bfloat16

    return precision != "bfloat16" or has_bfloat16()


def numbers(results: list) -> np.ndarray:
    """Every score of results of `return_all`, in one order."""
    return np.array([_numbers(result) for result in results])


def _numbers(result: dict) -> list[float]:
    rows = [sorted(result[head], key=lambda row: row["label"]) for head in ("primary", "secondary", "sex")]
    return [row["score"] for head in rows for row in head] + list(result["attributes"].values())


@pytest.mark.parametrize(("backend", "precision", "tolerance"), TOLERANCES)
def test_the_pipeline_is_as_with_torch(
    backend: str,
    precision: str,
    tolerance: float,
    tiny_sailer: Path,
    different_clips: list[np.ndarray],
    tmp_path: Path,
) -> None:
    if not has(backend, precision):
        pytest.skip("this processor has no bfloat16")
    system = shutil.copytree(tiny_sailer, tmp_path / "system")
    plain = sailer.load(system)
    other = sailer.load(system, backend=backend, precision=precision)
    items = [
        {"audio": clip, "text": text or "nothing"} for clip, text in zip(different_clips, DIFFERENT_TEXTS, strict=True)
    ]
    items.append({"audio": noise(20.03, seed=5), "text": "the lazy dog"})  # two windows
    everything = {"return_all": True, "return_embedding": False}
    for options in ({}, {"batch_size": 4}, {"batch_size": 8, "num_workers": 2}, {"chunk_length_s": 0.6}):
        ours = numbers(other(items, **options, **everything))
        theirs = numbers(plain(items, **everything, **options))
        np.testing.assert_allclose(ours, theirs, atol=tolerance, err_msg=str(options))
    assert np.ptp(numbers(plain(items, **everything)), axis=0).max() > 0.3  # answers that differ
    timeline = {"return_timestamps": True, "chunk_length_s": 3, **everything}
    windows, expected = (classifier(items[-1], **timeline) for classifier in (other, plain))
    assert [window["timestamp"] for window in windows] == [window["timestamp"] for window in expected]
    np.testing.assert_allclose(numbers(windows), numbers(expected), atol=tolerance)
    ages, embeddings = ([classifier(items[0], return_all=True)[name] for classifier in (other, plain)]
                        for name in ("age", "embedding"))  # fmt: skip
    np.testing.assert_allclose(*ages, atol=100 * tolerance)
    if tolerance < 0.01:
        np.testing.assert_allclose(*embeddings, atol=1e-4)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_the_prior_and_the_logits(backend: str, exported: Path, tiny_speech_sailer: Path, different_clips) -> None:
    plain, other = sailer.load(tiny_speech_sailer), sailer.load(exported, backend=backend, precision="float32")
    for options in ({"prior": "natural"}, {"function_to_apply": "none"}):
        for one, two in zip(other(different_clips, **options), plain(different_clips, **options), strict=True):
            assert [row["label"] for row in one] == [row["label"] for row in two]
            np.testing.assert_allclose(
                [row["score"] for row in one], [row["score"] for row in two], atol=1e-3, err_msg=str(options)
            )


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_results_outlive_the_next_batch(backend: str, exported: Path, different_clips: list[np.ndarray]) -> None:
    model = sailer.load(exported, backend=backend, precision="float32").model
    processor = sailer.SailerProcessor.from_pretrained(exported)
    first, second = (processor(clip, sampling_rate=16000) for clip in different_clips[:2])
    outputs = model(**first)
    before = outputs.logits.clone()
    model(**second)
    assert outputs.logits.equal(before)


def test_int8_weights_are_compressed_once(exported: Path, tmp_path: Path, different_clips) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "parent" / "system"))
    first = sailer.load(folder, backend="openvino", precision="int8")(different_clips[0])
    (kept,) = folder.rglob("openvino_model.bin")
    assert kept.stat().st_size < 0.5 * (folder / "model.onnx").stat().st_size
    time = kept.stat().st_mtime_ns
    assert sailer.load(folder, backend="openvino", precision="int8")(different_clips[0]) == first
    assert kept.stat().st_mtime_ns == time
    kept.write_bytes(kept.read_bytes()[:-100])
    assert sailer.load(folder, backend="openvino", precision="int8")(different_clips[0]) == first
    assert kept.stat().st_mtime_ns != time


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_an_operator_that_a_backend_lacks(backend: str, changed: Callable[..., Path]) -> None:
    def unknown(model) -> None:
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Relumination"

    folder = changed(unknown)
    with pytest.raises(BackendError, match=r"(?s)cannot run .*model\.onnx: .*Relumination.* Take another backend"):
        sailer.load(folder, backend=backend, precision="float32")


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_batch_over_what_was_exported(backend: str, changed: Callable[..., Path], different_clips) -> None:
    def for_one_clip(model) -> None:
        for entry in (*model.graph.input, *model.graph.output):
            entry.type.tensor_type.shape.dim[0].dim_value = 1

    classifier = sailer.load(changed(for_one_clip), backend=backend, precision="float32")
    assert classifier.model(**classifier.processor(different_clips[0], sampling_rate=16000)).logits.shape == (1, 9)
    inputs = classifier.processor(different_clips[:3], sampling_rate=16000)
    with pytest.raises(BackendError, match=r"exported for a batch of 1 and input_features has 3: use batch_size=1"):
        classifier.model(**inputs)
    assert len(classifier(different_clips[:3])) == 3


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_what_an_exported_folder_cannot_do(
    backend: str, exported: Path, tmp_path: Path, different_clips: list[np.ndarray]
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "system"))
    with pytest.raises(BackendError, match="was exported and has no weights for torch: take backend='onnx'"):
        sailer.load(folder)
    with pytest.raises(BackendError, match=r"device is 'cuda'; the backend .* runs on the CPU"):
        sailer.load(folder, backend=backend, device="cuda")
    with pytest.raises(BackendError, match=r"holds \['model.onnx'\] and no model_int8.onnx"):
        sailer.load(folder, backend="onnx", precision="int8")
    model = sailer.load(folder, backend=backend, precision="float32", device="cpu").model
    inputs = sailer.SailerProcessor.from_pretrained(folder)(different_clips[0], sampling_rate=16000)
    with pytest.raises(BackendError, match="gives no hidden states"):
        model(**inputs, output_hidden_states=True)
    with pytest.raises(BackendError, match="needs attention_mask"):
        model(input_features=inputs["input_features"])
    long = sailer.SailerProcessor.from_pretrained(folder)(noise(31, seed=1), sampling_rate=16000)
    with pytest.raises(BackendError, match=r"takes 3100 frames and this encoder has \d+"):
        model(**long)
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model\.onnx"):
        sailer.load(folder, backend=backend)


UNREPORTED = """
import socket, sys
asked = []
def told(name, original):
    def call(*arguments, **options):
        asked.append((name, str(arguments)[:200]))
        raise OSError("no network here")
    return call
socket.getaddrinfo = told("getaddrinfo", socket.getaddrinfo)
socket.create_connection = told("create_connection", socket.create_connection)
socket.socket.connect = told("connect", socket.socket.connect)
import numpy as np
import sailer
for precision in ("float32", "int8"):
    sailer.load(sys.argv[1], backend="openvino", precision=precision)(np.zeros(16000, np.float32))
import time
time.sleep(2)
print("ASKED", asked)
"""


def test_nothing_is_reported_to_the_makers(exported: Path, tmp_path: Path) -> None:
    """OpenVINO reports each import, and NNCF each use, unless told otherwise."""
    folder = shutil.copytree(exported, tmp_path / "parent" / "system")
    environment = {name: value for name, value in os.environ.items() if name != "CI" and "PYTEST" not in name}
    environment |= {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", UNREPORTED, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["ASKED []"]
    assert list((folder).rglob("openvino_model.bin"))


@pytest.mark.parametrize("system", ["tiny", "padded"])
def test_the_script_without_torch(
    system: str, exported: Path, request: pytest.FixtureRequest, tmp_path: Path, different_clips: list[np.ndarray]
) -> None:
    folder = exported
    if system == "padded":  # as the authors' models are
        from sailer.hub.conversion import convert
        from sailer.inference.export import export

        released = request.getfixturevalue("shared") / "reference" / "vox_profile" / "whisper_frozen"
        folder = export(convert(released, tmp_path / "converted"), tmp_path / "exported")
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(np.__file__).parents[1].iterdir():
        if entry.name.split(".")[0] in WITHOUT_TORCH or entry.name in WITHOUT_TORCH:
            (packages / entry.name).symlink_to(entry)
    clips = [tmp_path / f"{index}.wav" for index in range(len(different_clips))]
    for clip, wave in zip(clips, different_clips, strict=True):
        soundfile.write(clip, wave, 16000, subtype="FLOAT")

    def run(*words: object) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(packages)}
        command = [sys.executable, "-S", *map(str, words)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    for module in ("torch", "transformers", "sailer"):
        assert "ModuleNotFoundError" in run("-c", f"import {module}").stderr
    script = ROOT / "docs" / "run_onnx.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 60
    done = run(script, folder, *clips)
    assert done.returncode == 0, done.stderr
    classifier = sailer.load(folder, backend="onnx")
    for line, clip in zip(done.stdout.splitlines(), clips, strict=True):
        name, *words = line.split()
        expected = {row["label"]: row["score"] for row in classifier(str(clip))}
        told = dict(zip(words[::2], map(float, words[1::2]), strict=True))
        assert name == str(clip) and told == pytest.approx(expected, abs=1e-4)
    soundfile.write(tmp_path / "slow.wav", different_clips[0], 8000)
    done = run(script, folder, tmp_path / "slow.wav")
    assert done.returncode == 1 and "at 16000 Hz" in done.stderr
