"""Exported systems in OpenVINO, which reads the same ONNX file; int8 weights by NNCF are kept beside it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sailer.data.atomic import replacing_folder
from sailer.inference.backends.base import BackendError, ExportedModel, import_extra, reason

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "int8")
# What the products are rounded to; int8 is the weights', whose products are in what is fastest here.
HINTS = {"float32": "f32", "bfloat16": "bf16"}
ONNX_FILE = "model.onnx"
MODEL_FILE, MANIFEST = "openvino_model.xml", "openvino.json"


class OpenVINOModel(ExportedModel):
    """
    An exported system in OpenVINO, on as many threads as torch has.

    Args:
        folder: what export wrote, with the float32 file.
        precision: "float32", "bfloat16" or "int8" weights (NNCF); by default bfloat16 where the processor has it.
        compressed: folder that keeps the int8 weights; beside `folder` by default.

    Raises:
        ImportError: OpenVINO, or for int8 weights that are not kept yet NNCF, is not installed.
        BackendError: it lacks an operator of the file, or the processor has no bfloat16.
    """

    backend = "openvino"

    def __init__(self, folder: str | Path, precision: str | None = None, compressed: str | Path | None = None) -> None:
        runtime = import_runtime()
        precision = default_precision() if precision is None else precision
        super().__init__(folder, ONNX_FILE, precision)
        if precision == "bfloat16" and not has_bfloat16():
            raise BackendError("This processor has no bfloat16: take precision='float32' or 'int8'.")
        core = runtime.Core()
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": HINTS[precision if precision in HINTS else default_precision()],
        }
        try:
            model = core.read_model(self.path)
            if precision == "int8":
                model = self._compressed(core, model, Path(compressed or self.folder.with_name("openvino_int8")))
            self._compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            version = runtime.__version__.split("-")[0]
            raise BackendError(
                f"OpenVINO {version} cannot run {self.path}: {reason(error)} Take another backend, a newer openvino, "
                "or export the system once more."
            ) from error
        # An output may have several names, of which ours is one.
        ours = self.manifest["outputs"]
        self._names = [next(name for name in ours if name in output.names) for output in self._compiled.outputs]
        self.shapes = {
            entry.any_name: tuple(None if size.is_dynamic else size.get_length() for size in entry.get_partial_shape())
            for entry in self._compiled.inputs
        }
        self._local = threading.local()

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        request = getattr(self._local, "request", None)
        if request is None:  # one a thread: a request has one state
            request = self._local.request = self._compiled.create_infer_request()
        try:
            outputs = request.infer(inputs, share_inputs=True)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO fails on this batch: {reason(error)}") from error
        return dict(zip(self._names, (outputs[index] for index in range(len(self._names))), strict=True))

    def _compressed(self, core: Any, model: Any, folder: Path) -> Any:
        """The model with int8 weights, made once for each state of the ONNX file."""
        source = self.manifest["files"][ONNX_FILE]["sha256"]
        if _is_kept(folder, source):
            return core.read_model(folder / MODEL_FILE)
        logger.info("Compressing the weights of %s to int8, once: they stay in %s.", self.path, folder)
        nncf = import_extra("nncf", "openvino")
        runtime = import_runtime()
        logging.getLogger("nncf").setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # its table and progress
            model = nncf.compress_weights(model)
        with replacing_folder(folder) as beside:
            runtime.save_model(model, beside / MODEL_FILE, compress_to_fp16=False)
            files = {path.name: _digest(path) for path in beside.iterdir()}
            (beside / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n")
        return core.read_model(folder / MODEL_FILE)


def import_runtime() -> Any:
    """The openvino package.

    Raises:
        ImportError: it is not installed.
    """
    return import_extra("openvino", "openvino")


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    return "BF16" in import_runtime().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def default_precision() -> str:
    """bfloat16 where the processor has it, else float32."""
    return "bfloat16" if has_bfloat16() else "float32"


def _is_kept(folder: Path, source: str) -> bool:
    """Whether whole int8 weights of this ONNX file are there."""
    try:
        kept = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return kept["source"] == source and all(
            _digest(folder / name) == digest for name, digest in kept["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # not there, or of a run that was stopped: made anew


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
