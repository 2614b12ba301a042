"""What the runtimes share: an exported system that is called as a SailerForAudioClassification is."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from sailer.inference.export import read_manifest, system_class
from sailer.layers_sailer import SailerClassifierOutput


class BackendError(ValueError):
    """A backend that cannot run a system here; the message names the file or option and the way out."""


def import_extra(module: str, extra: str) -> Any:
    """A runtime's module.

    Raises:
        ImportError: it is not installed, or cannot be used here; the message names the extra of sailer that brings it.
    """
    try:
        with _unreported():
            return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"The backend {extra!r} needs {module} ({error}): pip install 'sailer[{extra}]'") from error


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """OpenVINO and NNCF report each import and use to their makers, but for what runs in continuous integration."""
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        del os.environ["CI"]
        if before is not None:
            os.environ["CI"] = before


def reason(error: Exception) -> str:
    """What a runtime's error says, without where in its sources, and not its pages."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '")))
    return (told or str(error) or type(error).__name__)[:500]


class ExportedModel:
    """
    A system that `sailer.inference.export` wrote, run by another runtime on the CPU.

    It has what `SpeechEmotionPipeline` asks of a model: a configuration, a device, `probabilities`, and a call that
    takes the processor's tensors and returns a `SailerClassifierOutput`. It has no gradients.

    Args:
        folder: what export wrote.
        file: the ONNX file in it, by name.
        precision: of the products, for `repr` and the tests.

    Raises:
        ValueError: a folder of another version, or a file that is truncated or altered (see `read_manifest`).
    """

    backend = ""

    def __init__(self, folder: str | Path, file: str, precision: str) -> None:
        self.folder, self.precision = Path(folder), precision
        self.manifest = read_manifest(self.folder)
        if file not in self.manifest["files"]:
            raise BackendError(
                f"{self.folder} holds {sorted(self.manifest['files'])} and no {file}, which precision {precision!r} "
                "reads: give another one, or export the system so."
            )
        self.path = self.folder / file
        self._class = system_class(self.folder)
        self.config = self._class.config_class.from_pretrained(self.folder)
        self.main_input_name = self.manifest["inputs"][0]
        self.device = torch.device("cpu")
        # By input: the sizes that the file fixes, None where any will do.
        self.shapes: dict[str, tuple[int | None, ...]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, precision={self.precision!r})"

    def __call__(
        self, output_hidden_states: bool | None = None, return_dict: bool = True, **inputs: torch.Tensor
    ) -> Any:
        """
        Args:
            inputs: the processor's tensors, as in `SailerForAudioClassification.forward`.
            output_hidden_states: not to be had.
            return_dict: False returns a tuple.

        Raises:
            BackendError: an input is missing, larger than the file or the encoder takes, or the runtime fails on it.
        """
        if output_hidden_states:
            raise BackendError(f"The backend {self.backend!r} gives no hidden states: use backend='torch' for them.")
        arrays = self._arrays(inputs)
        outputs: dict[str, Any] = {name: torch.from_numpy(value) for name, value in self._run(arrays).items()}
        result = SailerClassifierOutput(**outputs)
        return result if return_dict else result.to_tuple()

    def probabilities(self, logits: torch.Tensor, prior: str = "balanced") -> torch.Tensor:
        """See `SailerForAudioClassification.probabilities`."""
        known: Any = self  # it asks for the configuration alone
        return self._class.probabilities(known, logits, prior)

    def eval(self) -> Self:
        """Itself, as torch's modules do."""
        return self

    def to(self, device: str | torch.device) -> Self:
        """Itself; raises BackendError for another device than the CPU."""
        if torch.device(device).type != "cpu":
            raise BackendError(f"The backend {self.backend!r} runs on the CPU, not on {device}: leave device out.")
        return self

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Copy the exported folder."""
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)

    def _run(self, inputs: dict[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Outputs by name; each array is the caller's to keep."""
        raise NotImplementedError

    def _arrays(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        missing = [name for name in self.manifest["inputs"] if inputs.get(name) is None]
        if missing:
            raise BackendError(f"This system needs {', '.join(missing)} (the processor makes them).")
        arrays = {name: inputs[name].numpy() for name in self.manifest["inputs"]}
        tower: Any = self.config.audio_config
        if tower.model_type == "whisper":
            frames, most = arrays["input_features"].shape[-1], 2 * tower.max_source_positions
            if frames > most:
                own = int(arrays["attention_mask"].sum(1).max())
                if own > most:
                    raise BackendError(
                        f"A clip takes {own} frames and this encoder has {most} ({most // 100} s): cut the audio, or "
                        "use the pipeline's chunk_length_s."
                    )
                arrays |= {name: arrays[name][..., :most] for name in ("input_features", "attention_mask")}
            elif frames % 2:  # the encoder halves them; what stands beyond the mask is not seen
                for name in ("input_features", "attention_mask"):
                    arrays[name] = np.pad(arrays[name], [(0, 0)] * (arrays[name].ndim - 1) + [(0, 1)])
        for name, array in arrays.items():
            for axis, (fixed, given) in enumerate(zip(self.shapes.get(name, ()), array.shape, strict=False)):
                if fixed is not None and fixed != given:
                    what = "a batch" if axis == 0 else f"axis {axis}"
                    raise BackendError(
                        f"{self.path} was exported for {what} of {fixed} and {name} has {given}: "
                        + (f"use batch_size={fixed}, or export" if axis == 0 else "export")
                        + " it once more with dynamic sizes (sailer export)."
                    )
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}
