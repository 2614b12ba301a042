"""A trained system in, a folder with one ONNX file out, checked against torch; and how such a folder is read."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sailer
from sailer.atomic import replacing_folder
from sailer.encoders_sailer import masks_padding
from sailer.modeling_sailer import SailerForAudioClassification
from sailer.processing_sailer import SailerProcessor

logger = logging.getLogger(__name__)

MANIFEST = "export.json"
FILES = {"float32": "model.onnx", "int8": "model_int8.onnx"}
OPSET = 20
# A message of protobuf holds no more.
ONE_FILE = 2 * 2**30 - 2**20
TOLERANCE = 1e-4


class ExportError(ValueError):
    """A system that cannot be exported, or an exported folder that cannot be read; the message says what to do."""


def export(model: str | os.PathLike, folder: str | os.PathLike, precision: str = "float32") -> Path:
    """Write a system as one ONNX file, from the processor's tensors to every head and the embedding.

    Batch and length are dynamic. Beside the file are the configuration, the processor's files, the card, and
    `export.json`, which says what was written and how far each output is from torch's.

    Args:
        model: folder or Hub id of a trained system.
        folder: to write; what is there is replaced.
        precision: "float32", or "int8" (onnxruntime's dynamic quantisation of the weights).

    Raises:
        ExportError: another precision, an encoder whose clips must be encoded by equal length, or in float32 an
            output that differs from torch's by more than 1e-4.
        ImportError: the extra onnx is not installed.
    """
    if precision not in FILES:
        raise ExportError(f"precision is {precision!r}; an export is in one of {list(FILES)}.")
    system = SailerForAudioClassification.from_pretrained(model, dtype=torch.float32).eval()
    processor = SailerProcessor.from_pretrained(model)
    tower: Any = system.config.audio_config
    if not masks_padding(tower):
        raise ExportError(
            f"{model}: a {tower.model_type!r} encoder of this kind is run on clips of equal length only, which one "
            "graph cannot do; use backend='torch'."
        )
    for module in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"An export needs {module} ({error}): pip install 'sailer[onnx]'") from error
    inputs = _example(system, processor)
    with torch.no_grad():
        expected = dict(system(**inputs, return_dict=True, output_hidden_states=False))
    with replacing_folder(Path(folder)) as beside:
        file = beside / FILES[precision]
        with _quietly():
            _write(system, inputs, list(expected), file, precision)
        system.config.save_pretrained(beside)
        processor.save_pretrained(beside)
        card = Path(model) / "README.md"
        if card.is_file():
            (beside / "README.md").write_bytes(card.read_bytes())
        checks = _check(file, inputs, expected)
        worst = max(checks.values())
        if precision == "float32" and worst > TOLERANCE:
            raise ExportError(f"{model}: the graph's outputs are not torch's (largest difference {worst:.1e}).")
        logger.info("Largest difference from torch: %s", ", ".join(f"{name} {d:.1e}" for name, d in checks.items()))
        manifest = {
            "format": "onnx",
            "sailer_version": sailer.__version__,
            "opset": OPSET,
            "files": {file.name: _described(file) | {"precision": precision, "checks": checks}},
            "inputs": list(inputs),
            "outputs": list(expected),
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def read_manifest(folder: str | os.PathLike) -> dict[str, Any]:
    """What `export.json` of an exported folder says, after its files were found to be those that were written.

    Raises:
        ExportError: no such file, or of another version, or a file that is missing, truncated or altered.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["sailer_version"]
        told = {name: (entry["sha256"], entry["bytes"]) for name, entry in files.items()}
        if not manifest["inputs"] or not manifest["outputs"]:
            raise ValueError("no inputs or outputs")
    except FileNotFoundError:
        raise ExportError(f"{path} is not there: this is no folder that `sailer export` wrote.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} cannot be read ({error}): export the system once more.") from error
    if version != sailer.__version__:
        raise ExportError(
            f"{path} was written by sailer {version} and this is {sailer.__version__}: export the system once more."
        )
    for name, (digest, size) in told.items():
        file = Path(folder) / name
        if not file.is_file() or file.stat().st_size != size or _described(file)["sha256"] != digest:
            raise ExportError(
                f"{file} is missing, truncated or altered: copy it again, or export the system once more."
            )
    return manifest


class _Graph(nn.Module):
    """The system with inputs by position and outputs as a tuple, as an exporter wants them."""

    def __init__(self, system: SailerForAudioClassification, names: list[str]) -> None:
        super().__init__()
        self.system, self.names = system, names

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        return self.system(**given, return_dict=True, output_hidden_states=False).to_tuple()


def _example(system: SailerForAudioClassification, processor: SailerProcessor) -> dict[str, torch.Tensor]:
    """Three clips of different length, one of them without a transcript; an even number of frames."""
    generator = torch.Generator().manual_seed(0)
    rate = processor.sampling_rate
    clips = [torch.randn(round(rate * seconds), generator=generator).mul(0.1).numpy() for seconds in (1.3, 0.7, 2.2)]
    text = ["a transcript of some words", "", "another"] if processor.tokenizer is not None else None
    inputs = dict(processor(audio=clips, text=text, sampling_rate=rate))
    if system.main_input_name == "input_features" and inputs["input_features"].shape[-1] % 2:
        inputs |= {name: nn.functional.pad(inputs[name], (0, 1)) for name in ("input_features", "attention_mask")}
    return inputs


def _write(
    system: SailerForAudioClassification,
    inputs: dict[str, torch.Tensor],
    outputs: list[str],
    file: Path,
    precision: str,
) -> None:
    batch = torch.export.Dim("batch", min=1, max=4096)
    tower: Any = system.config.audio_config
    is_whisper = tower.model_type == "whisper"
    if not is_whisper:
        length: Any = torch.export.Dim("samples", min=400, max=2**26)
    elif system.config.attend_to_padding:
        length = None
    else:
        length = 2 * torch.export.Dim("positions", min=2, max=tower.max_source_positions)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    shapes = {
        name: {0: batch, value.ndim - 1: length if name in (system.main_input_name, "attention_mask") else tokens}
        for name, value in inputs.items()
    }
    program = torch.onnx.export(
        _Graph(system, list(inputs)),
        tuple(inputs.values()),
        dynamo=True,
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes=(tuple(shapes.values()),),
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    size = sum(parameter.nbytes for parameter in system.parameters())
    if precision == "float32":
        program.save(file, external_data=size > ONE_FILE)
        return
    whole = file.with_name("float32.onnx")
    program.save(whole, external_data=size > ONE_FILE)
    quantization = importlib.import_module("onnxruntime.quantization")
    weights = {"op_types_to_quantize": ["MatMul", "Gemm"], "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_dynamic(whole, file, **weights)
    for path in file.parent.glob("float32.onnx*"):
        path.unlink()


def _check(file: Path, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference from torch by output, on the clips that it was traced with and on each alone."""
    session = importlib.import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
    worst = dict.fromkeys(expected, 0.0)
    rows = [slice(None), *(slice(row, row + 1) for row in range(len(next(iter(inputs.values())))))]
    for row in rows:
        given = {name: value[row].numpy() for name, value in inputs.items()}
        for name, value in zip(expected, session.run(list(expected), given), strict=True):
            difference = (torch.from_numpy(value) - expected[name][row]).abs().max().item()
            worst[name] = max(worst[name], difference)
    return worst


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what exporter and quantiser print and warn of, which asks nothing of the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root", "")]
    levels = [one.level for one in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for one, level in zip(loggers, levels, strict=True):
                one.setLevel(level)


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"sha256": hashlib.file_digest(content, "sha256").hexdigest(), "bytes": file.stat().st_size}
