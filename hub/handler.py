"""What Hugging Face Inference Endpoints run in front of a SAILER system: a request's body in, its emotions out.

`sailer push` puts this file beside the system. It needs torch, transformers and the system's own files; requests bring
their recordings with them, so that no one makes the server read its own files or fetch from elsewhere.
"""

import base64
import binascii
from typing import Any

import numpy as np
import torch
from transformers import pipeline

# Options of the pipeline that a request may set, and those of them that are numbers.
PARAMETERS = (
    *("top_k", "return_all", "return_embedding", "prior", "function_to_apply"),
    *("chunk_length_s", "stride_length_s", "return_timestamps"),
)
NUMBERS = ("top_k", "chunk_length_s", "stride_length_s")
FORMS = (
    "send the recording as the body with its type (Content-Type: audio/wav), or JSON whose inputs are its bytes in "
    'base64, {"audio": base64, "text": transcript}, {"array": numbers, "sampling_rate": hertz}, or a list of these'
)


class EndpointHandler:
    """One system, loaded once; called with each request's body.

    Args:
        path: the folder of the system.
    """

    def __init__(self, path: str = "") -> None:
        device = 0 if torch.cuda.is_available() else -1
        self.pipeline: Any = pipeline("audio-classification", model=path, trust_remote_code=True, device=device)

    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Args:
            data: `inputs`, a recording or a list of them: the bytes of an audio file, the same in base64, `{"array",
                "sampling_rate"}`, or `{"audio": any of these, "text": transcript}`; `parameters`, optional: options of
                the pipeline's call.

        Returns:
            What the pipeline gives, of values that JSON has: `[{"label", "score"}, ...]`, or a dict with `return_all`;
            of a list a list of these.

        Raises:
            ValueError: inputs that are no recording or cannot be used, or an unknown parameter; the message says what
                to send.
        """
        if not isinstance(data, dict) or data.get("inputs") is None:
            raise ValueError(f"The request has no inputs: {FORMS}.")
        options, inputs = _options(data.get("parameters") or {}), data["inputs"]
        if isinstance(inputs, list):
            if not inputs:
                raise ValueError(f"inputs is an empty list: {FORMS}.")
            items = [_recording(item, f"inputs[{position}]") for position, item in enumerate(inputs)]
            return _plain(self.pipeline(items, **options))
        return _plain(self.pipeline(_recording(inputs, "inputs"), **options))


def _options(parameters: Any) -> dict[str, Any]:
    if not isinstance(parameters, dict):
        raise ValueError(f"parameters is {type(parameters).__name__}; give a mapping of {', '.join(PARAMETERS)}.")
    unknown = [str(name) for name in parameters if name not in PARAMETERS]
    if unknown:
        raise ValueError(f"Unknown parameters: {', '.join(unknown)}; there are {', '.join(PARAMETERS)}.")
    # In a query they come as text, but for whole numbers and true and false.
    return {name: _number(name, value) if name in NUMBERS else value for name, value in parameters.items()}


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.strip().isdigit() else float(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, which is no number.") from None


def _recording(item: Any, where: str) -> Any:
    """What the pipeline takes, without anything that it would look up."""
    if isinstance(item, str):
        return _decoded(item, where)
    if isinstance(item, bytes | bytearray):
        if not item:
            raise ValueError(f"{where} is empty: {FORMS}.")
        return bytes(item)
    if isinstance(item, dict) and "audio" in item:
        unknown = set(item) - {"audio", "text", "transcript", "sampling_rate"}
        if unknown:
            raise ValueError(f"{where} has {sorted(unknown)[0]!r}: {FORMS}.")
        audio = item["audio"]
        if isinstance(audio, list):
            audio = {"array": audio, "sampling_rate": item.get("sampling_rate")}
        text = {name: item[name] for name in ("text", "transcript") if item.get(name) is not None}
        return {"audio": _recording(audio, f"{where}.audio"), **text}
    if isinstance(item, dict) and isinstance(item.get("array"), list) and item.get("sampling_rate"):
        try:
            return {"array": np.asarray(item["array"], dtype=np.float32), "sampling_rate": item["sampling_rate"]}
        except (ValueError, TypeError):
            raise ValueError(f"{where}.array is no list of numbers (or of channels of equal length).") from None
    raise ValueError(f"{where} is no recording: {FORMS}.")


def _decoded(text: str, where: str) -> bytes:
    """The bytes of base64, also in a data URL; a path or an address is none and is refused."""
    head, comma, rest = text.partition(",")
    content = rest if comma and head.startswith("data:") and head.endswith(";base64") else text
    try:
        found = base64.b64decode("".join(content.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where} is a text that is no base64 (paths and addresses are not read): {FORMS}.") from None
    if not found:
        raise ValueError(f"{where} is empty: {FORMS}.")
    return found


def _plain(value: Any) -> Any:
    """The same of lists and Python's numbers."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    return value
