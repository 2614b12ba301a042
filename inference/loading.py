"""sailer.load: any system, in any of the runtimes, as the pipeline; what that takes is made once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

import sailer
from sailer.configuration_sailer import SailerConfig, SailerEnsembleConfig
from sailer.data.atomic import replacing_folder
from sailer.hub.conversion import convert
from sailer.inference.backends import onnx, openvino
from sailer.inference.backends.base import BackendError
from sailer.inference.backends.torch import PRECISIONS as TORCH_PRECISIONS
from sailer.inference.backends.torch import load_torch
from sailer.inference.export import check_place, export, read_manifest
from sailer.pipeline_sailer import SpeechEmotionPipeline
from sailer.processing_sailer import SailerProcessor

logger = logging.getLogger(__name__)

PRECISIONS = {"torch": TORCH_PRECISIONS, "onnx": onnx.PRECISIONS, "openvino": openvino.PRECISIONS}
BACKENDS = tuple(PRECISIONS)
# What a system is made of: a change of any of these is another system.
SOURCES = (
    *("*.safetensors", "*_adapter/*.safetensors", "*config.json", "tokenizer*", "vocab*", "merges.txt", "*.model"),
    *("special_tokens_map.json", "added_tokens.json"),
)
DOWNLOADED = ("*.json", "*.safetensors", "*.txt", "*.model")
SOURCE_FILE = "source.json"
# In a trained folder, and in the cache.
KEPT = {"float32": "onnx", "int8": "onnx_int8", "openvino_int8": "openvino_int8"}


def load(
    model: str | os.PathLike,
    backend: str = "torch",
    precision: str | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | None = None,
    **options: Any,
) -> SpeechEmotionPipeline:
    """A system as a pipeline, in the runtime that is wanted.

    ```python
    >>> import sailer

    >>> classifier = sailer.load("outputs/demo", backend="openvino")
    >>> classifier("clip.wav", top_k=1)
    [{'label': 'Happy', 'score': 0.71}]
    ```

    A trained system is exported for onnx and openvino once, into its own folder (`onnx/`, `onnx_int8/`,
    `openvino_int8/`), or into the cache where that cannot be written or it is of the Hub; when its weights or
    configuration have changed it is exported anew. A checkpoint that the paper's authors released is converted on the
    way, once, into the cache.

    Args:
        model: folder or Hub id of a system: trained, an ensemble (in torch), exported, or released by the authors.
        backend: "torch"; or, on the CPU, "onnx" (onnxruntime) or "openvino".
        precision: torch: "float32", "bfloat16", "float16" or "float64", as saved by default. onnx: "float32" (the
            default) or "int8". openvino: "float32", "bfloat16" (the default where the processor has it) or "int8"
            (of the weights).
        cache_dir: where conversions and exports stay; by default the folder that SAILER_CACHE names, else
            ~/.cache/sailer.
        revision, token: of a Hub id, as in transformers.
        options: of `SpeechEmotionPipeline` and its calls.

    Raises:
        ImportError: the backend is not installed (the message names the extra).
        OSError: there is no such system.
        ValueError: an unknown backend or precision, an exported folder of another version or with an altered file, a
            system that cannot be exported, or an option out of its range.
    """
    precision = check_precision(backend, precision)
    if backend != "torch":
        _check_installed(backend)
        options = _on_cpu(backend, options)
    source = str(model)
    check_place(source)
    places = {"revision": revision, "token": token}
    located: dict[str, Any] = {name: value for name, value in places.items() if value is not None}
    cache = cache_folder(cache_dir)
    settings = SailerConfig.get_config_dict(source, **located)[0]
    if "pretrain_model" in settings:
        source, located = str(_converted(source, cache, located)), {}
    if backend == "torch":
        if os.path.isfile(os.path.join(source, "export.json")):
            raise BackendError(
                f"{source} was exported and has no weights for torch: take backend='onnx' or 'openvino', or name the "
                "trained folder."
            )
        runs, processor = load_torch(source, precision, **located)
    else:
        folder = Path(source)
        if not folder.is_dir():
            wanted = [*DOWNLOADED, "*.onnx", "*.onnx.data"]
            folder = Path(snapshot_download(source, allow_patterns=wanted, **located))
        if settings.get("model_type") == SailerEnsembleConfig.model_type:
            raise BackendError(f"{source} is an ensemble, which the backend {backend!r} cannot run: take 'torch'.")
        runs = _exported(folder, backend, precision, cache)
        processor = SailerProcessor.from_pretrained(runs.folder)
    return SpeechEmotionPipeline(model=runs, processor=processor, **options)


def check_precision(backend: str, precision: str | None) -> str | None:
    """The precision that will be used; None for what a torch system was saved in.

    Raises:
        BackendError: an unknown backend, or a precision that it does not have.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend is {backend!r}; choose one of {list(BACKENDS)}.")
    if precision is not None and precision not in PRECISIONS[backend]:
        raise BackendError(
            f"precision is {precision!r}; the backend {backend!r} has {[*PRECISIONS[backend]]}, or leave it out."
        )
    if precision is None and backend != "torch":
        return "float32" if backend == "onnx" else openvino.default_precision()
    return precision


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """Where conversions and exports stay."""
    return Path(cache_dir or os.environ.get("SAILER_CACHE") or Path.home() / ".cache" / "sailer")


def _on_cpu(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    device = options.get("device")
    if device not in (None, -1, "cpu") and getattr(device, "type", None) != "cpu":
        raise BackendError(f"device is {device!r}; the backend {backend!r} runs on the CPU: leave device out.")
    return options | {"device": "cpu"}


def _check_installed(backend: str) -> None:
    """Before the work of an export, which a runtime that is missing would make vain."""
    runtime = onnx if backend == "onnx" else openvino
    runtime.import_runtime()


def _exported(folder: Path, backend: str, precision: str | None, cache: Path) -> Any:
    """A folder's system in another runtime than torch; what is made for that is kept."""
    name = KEPT["int8" if (backend, precision) == ("onnx", "int8") else "float32"]
    is_exported = (folder / "export.json").is_file()
    own, digest = folder, ""
    if not is_exported:
        digest = _digest(folder)
        own = _kept(folder, name, cache, digest, lambda beside: _export(folder, beside, name, digest))
    if backend == "onnx":
        return onnx.OnnxModel(own, precision or "float32")
    # Beside the export, also where that is a Hub's folder, in which nothing is written.
    place = _place(folder, KEPT["openvino_int8"], cache, digest or _digest(folder)) if precision == "int8" else None
    return openvino.OpenVINOModel(own, precision, place)


def _export(folder: Path, beside: Path, name: str, digest: str) -> None:
    precision = next(precision for precision, place in KEPT.items() if place == name)
    export(folder, beside, precision=precision)
    (beside / SOURCE_FILE).write_text(json.dumps({"sha256": digest}) + "\n", encoding="utf-8")


def _kept(folder: Path, name: str, cache: Path, digest: str, make: Callable[[Path], None]) -> Path:
    """What was made of a folder before, or is made now."""
    places = [folder / name, _in_cache(cache, name, digest)]
    for place in places:
        if _is_current(place, digest):
            return place
    place = _place(folder, name, cache, digest)
    logger.info("Exporting %s, once: it stays in %s.", folder, place)
    try:
        with replacing_folder(place) as beside:
            make(beside)
    except OSError:
        if not _is_current(place, digest):  # else another process was faster
            raise
    return place


def _place(folder: Path, name: str, cache: Path, digest: str) -> Path:
    return folder / name if _is_writable(folder) else _in_cache(cache, name, digest)


def _in_cache(cache: Path, name: str, digest: str) -> Path:
    return cache / "exported" / digest[:32] / name


def _is_current(folder: Path, digest: str) -> bool:
    """Whether the folder holds an export of just this system by this version."""
    try:
        if json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))["sha256"] != digest:
            return False
        read_manifest(folder)
        return True
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_writable(folder: Path) -> bool:
    if _is_snapshot(folder):  # the Hub's cache is not ours to add to
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots"


def _converted(source: str, cache: Path, located: dict[str, Any]) -> Path:
    """A checkpoint of the authors, converted once."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=list(DOWNLOADED), **located))
    # A commit says what the files are, which take long to read: those released have gigabytes.
    commit = f"{sailer.__version__} {folder.parent.parent.name} {folder.name}"
    digest = hashlib.sha256(commit.encode()).hexdigest() if _is_snapshot(folder) else _digest(folder)
    destination = cache / "converted" / digest[:32]
    if not (destination / "config.json").is_file():
        logger.info("Converting %s, once: it stays in %s.", source, destination)
        try:
            convert(folder, destination)
        except OSError:
            if not (destination / "config.json").is_file():  # else another process was faster
                raise
    return destination


def _digest(folder: Path) -> str:
    """SHA-256 over the files that a system is made of, and this package's version."""
    total = hashlib.sha256(sailer.__version__.encode())
    for path in sorted({path for pattern in SOURCES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
