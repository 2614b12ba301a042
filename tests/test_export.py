"""sailer export: one file from the processor's inputs to every output, checked after writing, and what is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer

import sailer
from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.discriminant_sailer import set_discriminant
from sailer.inference.export import ExportError, export, file_digest, read_manifest
from sailer.training.tiny_backbones import make_tiny_wavlm

from .sounds import noise

HEADS = ["primary", "secondary", "attributes", "sex", "age"]
OUTPUTS = ["logits", "secondary_logits", "attributes", "sex_logits", "age", "embeddings"]


def save(folder: Path, audio: Path, text: Path | None = None, **options) -> Path:
    torch.manual_seed(0)
    model = SailerForAudioClassification.from_audio_text_pretrained(audio, text, heads=HEADS, **options)
    if model.config.discriminant_share:
        width, labels = model.discriminant.mean.numel(), len(model.config.labels)
        set_discriminant(model, torch.randn(width), torch.randn(labels, width) / width**0.5, torch.randn(labels))
    model.save_pretrained(folder)
    tokenizer = None if text is None else AutoTokenizer.from_pretrained(text)
    SailerProcessor(AutoFeatureExtractor.from_pretrained(audio), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., Path]:
    """Writes an exported folder whose file holds any bytes; options change its entries."""

    def write(**changes) -> Path:
        folder = tmp_path / "exported"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"a graph")
        entry = {"sha256": file_digest(folder / "model.onnx"), "bytes": 7, "precision": "float32", "checks": {}}
        content = {"format": "onnx", "sailer_version": sailer.__version__, "opset": 22, "files": {"model.onnx": entry}}
        content |= {"inputs": ["input_features"], "outputs": ["logits"]} | changes
        (folder / "export.json").write_text(json.dumps(content))
        return folder

    return write


def test_a_whole_folder_is_read(manifest: Callable[..., Path]) -> None:
    assert read_manifest(manifest())["files"]["model.onnx"]["bytes"] == 7


def test_a_file_of_another_version_is_refused(manifest: Callable[..., Path]) -> None:
    with pytest.raises(ExportError, match=r"was exported by sailer 0\.0\.9 and this is .*: sailer export"):
        read_manifest(manifest(sailer_version="0.0.9"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a grap", r"model\.onnx has 6 bytes where 7 were written"),
        (b"a grapj", r"model\.onnx is not the file that was written"),
        (None, r"model\.onnx is missing"),
    ],
)
def test_a_truncated_or_altered_file_is_refused(
    content: bytes | None, message: str, manifest: Callable[..., Path]
) -> None:
    folder = manifest()
    (folder / "model.onnx").unlink()
    if content is not None:
        (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=f"{message}.*; export the system again"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sailer_version": "1", "files": {"a": 3}}', "[1"])
def test_a_damaged_manifest_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ExportError, match=r"export\.json is damaged"):
        read_manifest(tmp_path)


def test_a_file_outside_the_folder_is_no_file_of_it(manifest: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"a graph")
    entry = {"sha256": file_digest(tmp_path / "other"), "bytes": 7}
    with pytest.raises(ExportError, match="is missing"):
        read_manifest(manifest(files={"../other": entry}))


def test_a_folder_without_a_manifest_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no exported system.*export\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "int4"}, r"precision is 'int4'; choose one of"), ({"format": "tflite"}, "format is 'tflite'")],
)
def test_options_that_cannot_be(options: dict, message: str, tiny_speech_sailer: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(tiny_speech_sailer, tmp_path / "exported", **options)
    assert not (tmp_path / "exported").exists()


def test_without_the_extra_it_is_named(
    tiny_speech_sailer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"needs onnx: pip install 'sailer\[onnx\]'"):
        export(tiny_speech_sailer, tmp_path / "exported")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["whisper", "wavlm"])
def test_the_file_gives_what_torch_gives(
    family: str, tiny_whisper: Path, tiny_wavlm: Path, tiny_text: Path, tmp_path: Path, capsys
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    audio = {"whisper": tiny_whisper, "wavlm": tiny_wavlm}[family]
    layers = {"whisper": "weighted_norm", "wavlm": "concat_norm"}[family]
    options = {"audio_layers": layers, "frame_pooling": 2, "frame_norm": True, "discriminant_share": 0.3}
    system = save(tmp_path / "system", audio, tiny_text, **options)
    (system / "README.md").write_text("# A card\n")
    for precision in ("float32", "int8"):
        assert main(["export", str(system), str(tmp_path / "exported"), "--precision", precision]) == 0
    folder, printed = tmp_path / "exported", capsys.readouterr().out
    content = read_manifest(folder)  # both files, each as it was written
    assert set(content["files"]) == {"model.onnx", "model_int8.onnx"} and content["outputs"] == OUTPUTS
    assert all(f"{name} " in printed for name in OUTPUTS)
    assert max(content["files"]["model.onnx"]["checks"].values()) < 1e-4
    assert 1e-4 < max(content["files"]["model_int8.onnx"]["checks"].values()) < 0.05
    assert content["files"]["model_int8.onnx"]["bytes"] < 0.7 * content["files"]["model.onnx"]["bytes"]
    assert (folder / "README.md").read_text() == "# A card\n" and not list(folder.glob("*.py"))

    # Clips of lengths that were not tried, through the folder alone.
    processor = SailerProcessor.from_pretrained(folder)
    config = SailerConfig.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = {value.name for value in session.get_inputs()}
    assert names == set(processor.model_input_names) and config.heads == HEADS
    assert [value.shape[0] for value in session.get_inputs()] == ["batch"] * 4
    model = SailerForAudioClassification.from_pretrained(system).eval()
    for seconds in ((5.03,), (0.1, 3.3, 0.77, 1.0)):
        clips = [noise(length, seed) for seed, length in enumerate(seconds)]
        inputs = processor(audio=clips, text=["so happy"] + [""] * (len(clips) - 1), sampling_rate=16000)
        with torch.no_grad():
            expected = model(**inputs)
        given = {name: value.numpy() for name, value in inputs.items()}
        for name, value in zip(OUTPUTS, session.run(OUTPUTS, given), strict=True):
            scale = 100 if name == "age" else 1
            np.testing.assert_allclose(value / scale, expected[name].numpy() / scale, atol=1e-5)


@pytest.mark.slow
def test_an_export_of_other_weights_takes_the_place_of_the_earlier_one(tiny_whisper: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    folder = tmp_path / "exported"
    system = save(tmp_path / "system", tiny_whisper)
    export(system, folder)
    model = SailerForAudioClassification.from_pretrained(system)
    with torch.no_grad():
        model.heads["primary"][2].bias.add_(1)
    model.save_pretrained(system)
    export(system, folder, precision="int8")
    assert set(read_manifest(folder)["files"]) == {"model_int8.onnx"}
    assert sorted(file.name for file in folder.glob("*.onnx")) == ["model_int8.onnx"]


def test_an_export_is_not_exported_once_more(manifest: Callable[..., Path], tmp_path: Path, capsys) -> None:
    assert main(["export", str(manifest()), str(tmp_path / "again")]) != 0
    assert f"{tmp_path / 'exported'} was exported already: name the trained folder" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("command", ["export", "predict", "listen"])
def test_a_system_that_is_not_there(command: str, tmp_path: Path, capsys) -> None:
    place = tmp_path / "outputs" / "misspelt"
    other = tmp_path / ("new" if command == "export" else "clip.wav")
    if command != "export":
        soundfile.write(other, noise(0.5), 16000)
    assert main([command, str(place), str(other)]) == 2
    assert f"error: {place} is neither a folder nor a Hub id" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_left_alone(tiny_speech_sailer: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds something else than an export: name a new or empty folder"):
        export(tiny_speech_sailer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_file_that_gives_something_else_is_not_kept(
    tiny_whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    system = save(tmp_path / "system", tiny_whisper)
    forward = SailerForAudioClassification.forward

    def unlike_in_the_graph(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        if torch.compiler.is_exporting():
            outputs["logits"] = outputs["logits"] + 0.001
        return outputs

    monkeypatch.setattr(SailerForAudioClassification, "forward", unlike_in_the_graph)
    with pytest.raises(ExportError, match=r"gives other logits than torch \(by 1\.0e-03, where 1e-04 is allowed\)"):
        export(system, tmp_path / "exported")
    assert not list((tmp_path / "exported").iterdir())


@pytest.mark.slow
def test_a_system_that_goes_by_length_is_refused_on_the_command_line(tmp_path: Path, capsys) -> None:
    pytest.importorskip("onnxscript")
    system = save(tmp_path / "system", make_tiny_wavlm(tmp_path / "wavlm", norm="group"))
    assert main(["export", str(system), str(tmp_path / "exported")]) == 2
    assert "A 'wavlm' encoder of this configuration is run on clips of one length at a time" in capsys.readouterr().err
