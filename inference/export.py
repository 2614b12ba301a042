"""A system in, a folder out that runs without torch: one ONNX file of any batch and length, checked after writing."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import cached_file

import sailer
from sailer.data.atomic import adding_to_folder
from sailer.encoders_emotion2vec import Emotion2VecConfig, Emotion2VecForAudioClassification
from sailer.encoders_sailer import VariableLengthWhisperEncoder, masks_padding
from sailer.modeling_sailer import SailerForAudioClassification
from sailer.processing_sailer import SailerProcessor

logger = logging.getLogger(__name__)

FORMATS = ("onnx",)
FILES = {"float32": "model.onnx", "int8": "model_int8.onnx"}
MANIFEST = "export.json"
# The newest whose operators onnxruntime runs with a mask over a batch: from 23 on there is an Attention of its own.
OPSET = 22
# Largest difference from torch that a float32 file may have; int8 is another model, whose difference is only told.
TOLERANCE = 1e-4
# Seconds of the batches that a file is checked with.
CHECKED = ((1.3,), (0.4, 2.9), (0.9, 2.0, 4.1))
LARGEST_FILE = 2_000_000_000  # bytes of weights, which one file of protobuf can hold
OUTPUTS = ("logits", "secondary_logits", "attributes", "sex_logits", "age", "embeddings")


class ExportError(ValueError):
    """A system that cannot be exported, or an exported folder that cannot be used; the message says what to do."""


class SystemGraph(nn.Module):
    """A system as a function from the processor's inputs to its outputs, both by name: what a graph is made of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs = self.model(**inputs, output_hidden_states=False, return_dict=True)
        return {name: value for name, value in outputs.items() if name != "speech_means"}


def trace(model: nn.Module, example: Mapping[str, torch.Tensor]) -> torch.export.ExportedProgram:
    """The graph of a system for any batch and length (and number of tokens).

    Args:
        model: a `SailerForAudioClassification` in eval mode, on any device (the meta device too).
        example: inputs by name, of at least two clips.

    Raises:
        ExportError: its encoder takes clips of one length at a time, which is not one graph.
    """
    config = getattr(model, "config", None)
    audio_config = getattr(config, "audio_config", None)
    if audio_config is not None and not masks_padding(audio_config):
        raise ExportError(
            f"A {audio_config.model_type!r} encoder of this configuration is run on clips of one length at a time, "
            "because padding would change what it says: there is no one graph of it. Whisper, WavLM-large, "
            "wav2vec2-large and HuBERT-large are exported."
        )
    free = torch.export.Dim.DYNAMIC
    shapes = {name: {0: free, 2 if name == "input_features" and is_whisper(model) else 1: free} for name in example}
    with torch.no_grad():
        return torch.export.export(SystemGraph(model), (dict(example),), dynamic_shapes=(shapes,), strict=False)


def is_whisper(model: nn.Module) -> bool:
    """Whether a system's speech encoder is Whisper's, whose features have their frames last."""
    return any(isinstance(module, VariableLengthWhisperEncoder) for module in model.modules())


def export(model: str | Path, folder: str | Path, precision: str = "float32", format: str = "onnx") -> Path:
    """Write a system as an ONNX file, with what its pipeline needs beside it.

    The file takes the processor's inputs and gives every output of the system and its embedding, by name, for any
    number of clips of any length that the encoder hears. After writing it is run by onnxruntime beside torch on clips
    of several lengths; the largest difference of each output is printed and kept in export.json.

    Args:
        model: folder or Hub id of a SAILER system.
        folder: where to write; an earlier export of the same system in another precision stays beside.
        precision: "float32", or "int8": the weights of the encoders' linear layers as 8-bit integers.
        format: "onnx".

    Returns:
        The folder.

    Raises:
        ExportError: a system that cannot be exported, a folder that holds something else, or a file that does not
            give what torch gives.
        ImportError: the extra `onnx` is not installed.
        FileNotFoundError: no such folder.
    """
    if format not in FORMATS:
        raise ExportError(f"format is {format!r}; choose one of {list(FORMATS)}.")
    if precision not in FILES:
        raise ExportError(f"precision is {precision!r}; choose one of {list(FILES)}.")
    check_place(model)
    if (Path(model) / MANIFEST).is_file():
        raise ExportError(f"{model} was exported already: name the trained folder that it was made of.")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ExportError(f"{folder} holds something else than an export: name a new or empty folder.")
    system = system_class(model).from_pretrained(str(model), dtype=torch.float32).eval()
    if isinstance(system, SailerForAudioClassification):
        system.merge_lora()
    processor = SailerProcessor.from_pretrained(str(model))
    started = time.perf_counter()
    example = _example(processor, (1.0, 0.7))
    program = trace(system, example)
    digest = weights_digest(system)
    with adding_to_folder(folder) as staging:
        files = _write(program, list(example), system, staging, precision)
        seconds = time.perf_counter() - started
        checks = _check(system, processor, staging / FILES[precision], precision)
        kept = _kept_files(folder, digest)
        for name in files:
            entry = {"sha256": file_digest(staging / name), "bytes": (staging / name).stat().st_size}
            kept[name] = entry | ({"precision": precision, "checks": checks} if name == FILES[precision] else {})
        manifest = {
            "format": format,
            "sailer_version": sailer.__version__,
            "opset": OPSET,
            "weights_sha256": digest,
            "files": kept,
            "inputs": list(example),
            "outputs": list(checks),
        }
        _write_companions(str(model), system, processor, staging)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in folder.glob("*.onnx*"):  # of other weights
        if file.name not in kept:
            file.unlink()
    size = sum(kept[name]["bytes"] for name in files) / 1e6
    print(f"{FILES[precision]}: {size:.1f} MB, made in {seconds:.0f} s; largest difference from torch by output:")
    for name, difference in checks.items():
        print(f"  {name:16} {difference:.1e}")
    return folder


def check_place(source: str | os.PathLike) -> None:
    """Raises FileNotFoundError for a system's place that is neither a folder nor in the form of a Hub id."""
    if not os.path.isdir(source):
        try:
            validate_repo_id(os.fspath(source))
        except HFValidationError:
            raise FileNotFoundError(f"{source} is neither a folder nor a Hub id (owner/name).") from None


def system_class(source: str | os.PathLike, **located: Any) -> Any:
    """The class of a system at a folder or Hub id: ours, or emotion2vec's own classifier.

    Args:
        source: folder or Hub id.
        located: options of `from_pretrained` that say where it is.
    """
    settings = PretrainedConfig.get_config_dict(source, **located)[0]
    is_emotion2vec = settings.get("model_type") == Emotion2VecConfig.model_type
    return Emotion2VecForAudioClassification if is_emotion2vec else SailerForAudioClassification


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What an exported folder holds, once its files are seen to be those that were written.

    Raises:
        ExportError: it is no export, was written by another version, or a file is missing, truncated or altered.
    """
    folder = Path(folder)
    again = "export the system again: sailer export MODEL FOLDER"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["sailer_version"], manifest["files"]
        expected = {name: (entry["sha256"], entry["bytes"]) for name, entry in files.items()}
    except OSError as error:
        raise ExportError(f"{folder} is no exported system ({error.strerror}: {MANIFEST}); {again}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(f"{folder / MANIFEST} is damaged; {again}") from error
    if version != sailer.__version__:
        raise ExportError(f"{folder} was exported by sailer {version} and this is {sailer.__version__}; {again}")
    for name, (digest, size) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ExportError(f"{path} is missing; {again}")
        if path.stat().st_size != size:
            raise ExportError(f"{path} has {path.stat().st_size} bytes where {size} were written; {again}")
        if file_digest(path) != digest:
            raise ExportError(f"{path} is not the file that was written (its checksum differs); {again}")
    return manifest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's tensors and their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def require(package: str, extra: str = "onnx") -> Any:
    """An optional package.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"This needs {package}: pip install 'sailer[{extra}]'") from error


def _example(processor: SailerProcessor, seconds: Iterable[float]) -> dict[str, torch.Tensor]:
    """The inputs of noisy clips, of which the last has no transcript."""
    generator = np.random.default_rng(0)
    rate = processor.sampling_rate
    clips = [generator.uniform(-0.1, 0.1, round(length * rate)).astype(np.float32) for length in seconds]
    texts = None
    if processor.tokenizer is not None:
        texts = ["some words that were spoken", "other words", ""][-len(clips) :]
    return dict(processor(audio=clips, text=texts, sampling_rate=rate))


def _write(
    program: torch.export.ExportedProgram, inputs: list[str], system: nn.Module, folder: Path, precision: str
) -> list[str]:
    """Write the graph; the names of its files, the first that which is loaded."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in system.state_dict().values())
    path = folder / FILES["float32"]
    names = [name for name in OUTPUTS if name in _outputs(program)]
    made = _quietly(
        lambda: torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=inputs, output_names=names, verbose=False
        )
    )
    assert made is not None
    _name_dimensions(made.model)
    made.save(path, external_data=weights > LARGEST_FILE)
    if precision == "int8":
        path = _quantize(path, folder / FILES["int8"], weights > LARGEST_FILE)
    return [path.name, *(file.name for file in folder.iterdir() if file != path)]


def _outputs(program: torch.export.ExportedProgram) -> list[str]:
    spec = program.call_spec.out_spec
    assert spec is not None
    names = list(spec.context)
    assert names == [name for name in OUTPUTS if name in names], "outputs are in the order of OUTPUTS"
    return names


def _name_dimensions(model: Any) -> None:
    """Call the graph's free dimensions what they are, instead of what tracing called them."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                what = "tokens" if value.name in ("input_ids", "text_attention_mask") else "length"
                names.setdefault(str(size), "batch" if axis == 0 else what)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = type(value.shape)(
            size if isinstance(size, int) else names.get(str(size), str(size)) for size in value.shape
        )


def _quantize(source: Path, target: Path, large: bool) -> Path:
    """The encoders' matrix products with 8-bit weights, each output channel with its own scale; what they multiply is
    made 8-bit as it comes. Convolutions, heads and the fusion stay as they are: they are small and last."""
    quantization, onnx = require("onnxruntime.quantization"), require("onnx")
    graph = onnx.load(str(source), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    # Of attention, both factors are computed.
    kept = [node.name for node in products if node.op_type == "Gemm" or not weights & set(node.input)]
    _quietly(
        lambda: quantization.quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=kept,
            use_external_data_format=large,
        )
    )
    for file in [source, *source.parent.glob(f"{source.name}.data")]:
        file.unlink()
    return target


def _check(system: nn.Module, processor: SailerProcessor, path: Path, precision: str) -> dict[str, float]:
    """Largest difference of each output between torch and onnxruntime, over batches of clips of several lengths."""
    onnxruntime = require("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    differences = dict.fromkeys(names, 0.0)
    for seconds in CHECKED:
        inputs = _example(processor, seconds)
        with torch.inference_mode():
            expected = system(**inputs, output_hidden_states=False, return_dict=True)
        given = {name: value.numpy() for name, value in inputs.items()}
        for name, value in zip(names, session.run(names, given), strict=True):
            difference = np.abs(value - expected[name].numpy()).max() / (100 if name == "age" else 1)
            # Not max(), which would overlook NaN.
            differences[name] = float(np.maximum(differences[name], difference))
    worst = max(differences, key=lambda name: np.nan_to_num(differences[name], nan=np.inf))
    if not np.isfinite(differences[worst]) or (precision == "float32" and differences[worst] > TOLERANCE):
        raise ExportError(
            f"The exported file gives other {worst} than torch (by {differences[worst]:.1e}, where {TOLERANCE:.0e} is "
            "allowed): nothing was written. Please report it, with the system's config.json."
        )
    return differences


def _kept_files(folder: Path, digest: str) -> dict[str, Any]:
    """The files of an earlier export of the same weights, which stay."""
    if not (folder / MANIFEST).is_file():
        return {}
    try:
        manifest = read_manifest(folder)
    except ExportError as error:
        logger.warning("%s It is replaced.", error)
        return {}
    return manifest["files"] if manifest.get("weights_sha256") == digest else {}


def _write_companions(
    model: str, system: SailerForAudioClassification, processor: SailerProcessor, folder: Path
) -> None:
    """Configuration, processor, tokenizer and card; no code, which an exported folder does without."""
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    configuration = {
        name: value for name, value in system.config.to_dict().items() if name not in ("auto_map", "custom_pipelines")
    }
    (folder / "config.json").write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
    card = cached_file(model, "README.md", _raise_exceptions_for_missing_entries=False)
    if card is not None:
        shutil.copyfile(card, folder / "README.md")
    else:
        (folder / "README.md").write_text(f"# {Path(model).name}, exported\n\nA SAILER system as ONNX.\n")


def _quietly(work: Callable[[], Any]) -> Any:
    """Without what exporters tell of other packages that are not there, and of their own steps."""
    names = ("torch.onnx", "onnxscript", "onnx_ir", "root")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        return work()
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
