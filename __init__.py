"""sailer: emotion recognition in natural speech (SAILER, Interspeech 2025). Public names load on first use."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names, for editors and type checkers
    from sailer.configuration_sailer import SailerConfig
    from sailer.ensemble_sailer import SailerEnsemble
    from sailer.inference.loading import load
    from sailer.inference.streaming import EmotionStream
    from sailer.modeling_sailer import SailerForAudioClassification, SailerModel
    from sailer.pipeline_sailer import SpeechEmotionPipeline
    from sailer.processing_sailer import SailerProcessor
    from sailer.training.arguments import SailerTrainingArguments
    from sailer.training.trainer import SailerTrainer

__version__ = "0.1.0"

_PUBLIC = {
    "EmotionStream": "inference.streaming",
    "SailerConfig": "configuration_sailer",
    "SailerEnsemble": "ensemble_sailer",
    "SailerModel": "modeling_sailer",
    "SailerForAudioClassification": "modeling_sailer",
    "SailerProcessor": "processing_sailer",
    "SpeechEmotionPipeline": "pipeline_sailer",
    "SailerTrainer": "training.trainer",
    "SailerTrainingArguments": "training.arguments",
    "load": "inference.loading",
}

__all__ = [
    "EmotionStream",
    "SailerConfig",
    "SailerEnsemble",
    "SailerForAudioClassification",
    "SailerModel",
    "SailerProcessor",
    "SailerTrainer",
    "SailerTrainingArguments",
    "SpeechEmotionPipeline",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import sailer` and `sailer --help` do not wait for torch.
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"sailer.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
