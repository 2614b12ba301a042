"""Exported systems in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sailer.inference.backends.base import BackendError, ExportedModel, import_extra, reason

FILES = {"float32": "model.onnx", "int8": "model_int8.onnx"}
PRECISIONS = tuple(FILES)


class OnnxModel(ExportedModel):
    """
    An exported system in onnxruntime, on as many threads as torch has.

    Args:
        folder: what export wrote.
        precision: "float32" or "int8"; the folder's file of it is read.

    Raises:
        ImportError: onnxruntime is not installed.
        BackendError: it cannot read the file, or lacks one of its operators.
    """

    backend = "onnx"

    def __init__(self, folder: str | Path, precision: str = "float32") -> None:
        runtime = import_runtime()
        super().__init__(folder, FILES[precision], precision)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors: what it finds it raises too
        try:
            self._session = runtime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes differ by release, and derive from none of its own
            raise BackendError(
                f"onnxruntime {runtime.__version__} cannot run {self.path}: {reason(error)} Take another backend, "
                "a newer onnxruntime, or export the system once more."
            ) from error
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.shapes = {
            entry.name: tuple(size if isinstance(size, int) else None for size in entry.shape)
            for entry in self._session.get_inputs()
        }

    def _run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            values = self._session.run(self._outputs, inputs)
        except Exception as error:
            raise BackendError(f"onnxruntime fails on this batch: {reason(error)}") from error
        return dict(zip(self._outputs, values, strict=True))


def import_runtime() -> Any:
    """The onnxruntime package.

    Raises:
        ImportError: it is not installed.
    """
    return import_extra("onnxruntime", "onnx")
