"""A released checkpoint in, a folder with the same outputs out: the paper's authors' (vox-profile), or emotion2vec."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from sailer.configuration_sailer import ATTRIBUTES, PRIMARY_LABELS, SailerConfig
from sailer.data.atomic import replacing_folder
from sailer.hub.card import render_converted_card
from sailer.hub.emotion2vec import FILES as EMOTION2VEC_FILES
from sailer.hub.emotion2vec import convert_emotion2vec, is_emotion2vec
from sailer.hub.errors import ConversionError
from sailer.modeling_sailer import SailerForAudioClassification
from sailer.processing_sailer import SailerProcessor

logger = logging.getLogger(__name__)

BACKBONE_CONFIGS = Path(__file__).parents[1] / "backbone_configs"
# `pretrain_model` of a released checkpoint -> the configuration that ships with this package.
RELEASED_BACKBONES = {"whisper_large": "whisper-large-v3", "wavlm_large": "wavlm-large"}
WHISPER_SECONDS = 15
WHISPER_POSITIONS = 750
SECONDARY_LABELS = [f"secondary_{index}" for index in range(17)]
HEADS = {"primary": "emotion_layer", "secondary": "detailed_out_layer"} | {
    name: f"{name}_layer" for name in ATTRIBUTES
}
# Parts of our model (longest first) and what they are called in a released checkpoint.
PARTS = {
    "sailer.audio_projection.": "model_seq.",
    "sailer.audio_layer_weights.weight": "weights",
    **{f"heads.{ours}.": f"{theirs}." for ours, theirs in HEADS.items()},
}
LORA_LAYERS = {"whisper": ("fc1", "fc2"), "wavlm": ("feed_forward.intermediate_dense", "feed_forward.output_dense")}
# Weight normalisation had other names before torch's parametrizations.
OLD_NAMES = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
LORA = ("auto", "merged", "unmerged")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    audio_backbone: str | None = None,
    lora: str = "auto",
) -> Path:
    """Convert a released checkpoint: the authors' to a system, emotion2vec's to its encoder or classifier.

    Of the authors':

    LoRA is merged into the weights: loralib does so by itself in eval mode, so a checkpoint that was saved in that
    mode holds merged weights beside the factors, and they are taken as they are (see `_are_merged`). Whisper models
    keep their 15 s of padding: the processor pads or cuts every clip to it, the encoder attends to the padding and the
    pooling does not. The order of the 17 secondary classes is not published, so they are called secondary_0 to
    secondary_16. Attributes-only models get the attribute heads alone.

    Args:
        source: folder or Hub id with `config.json` and `model.safetensors`; of emotion2vec with `config.yaml`,
            `model.pt` and, of a classifier, `tokens.txt`.
        destination: folder to write; it must not exist, or be empty.
        audio_backbone: folder, JSON file or Hub id with the backbone's configuration. By default that of
            `backbone_config.json` beside the checkpoint, else the one that the checkpoint names (whisper-large-v3 and
            wavlm-large ship with this package).
        lora: whether the checkpoint's matrices hold their LoRA factors already, "merged" or "unmerged"; "auto" sees
            for itself.

    Returns:
        The destination.

    Raises:
        ConversionError: not such a checkpoint, weights that are missing, truncated or pickled, a tensor that is
            missing, left over, not finite or of another shape, an unknown backbone, a setting that no checkpoint can
            have, or a destination with files in it or that cannot be written.
    """
    if lora not in LORA:
        raise ConversionError(f"lora is {lora!r}; choose one of {list(LORA)}.")
    destination = Path(destination)
    _check_destination(destination)
    folder = _download(source)
    if is_emotion2vec(folder):
        if audio_backbone is not None or lora != "auto":
            raise ConversionError(f"{source} is an emotion2vec checkpoint: leave out --audio_backbone and --lora.")
        with replacing_folder(destination) as beside:
            convert_emotion2vec(folder, str(source), destination.name, beside)
        return destination
    _check_checkpoint(folder, source)
    settings = _read_settings(folder)
    backbone = _backbone_config(folder, settings, audio_backbone)
    try:
        config = _system_config(settings, backbone)
    except ValueError as error:
        raise ConversionError(f"{folder}: {error}") from error
    with torch.device("meta"):
        model = SailerForAudioClassification(config)
    model.load_state_dict(_read_tensors(folder, settings, model, backbone, lora), assign=True)

    with replacing_folder(destination) as folder:
        model.save_pretrained(folder)
        _processor(backbone).save_pretrained(folder)
        render_converted_card(str(source), config, destination.name, folder / "README.md")
    return destination


def packaged_config(name: str) -> PretrainedConfig:
    """Configuration of a backbone of the paper, without the network.

    Args:
        name: "whisper-large-v3", "wavlm-large" or "roberta-large".

    Raises:
        ValueError: another name.
    """
    path = BACKBONE_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = sorted(path.stem for path in BACKBONE_CONFIGS.glob("*.json"))
        raise ValueError(f"No configuration called {name!r} ships with this package; there are {known}.")
    return AutoConfig.from_pretrained(path)


def _check_destination(destination: Path) -> None:
    """Before the work: whether the folder can be made where it is wanted."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConversionError(f"{destination} exists and is not an empty folder; choose another destination.")
    try:
        with replacing_folder(destination):
            pass
        destination.rmdir()
    except OSError as error:
        raise ConversionError(f"{destination} cannot be written ({error.strerror}); choose another place.") from error


def _download(source: str | os.PathLike) -> Path:
    """The folder of a checkpoint; of one on the Hub with the files that are converted alone."""
    if Path(source).is_dir():
        return Path(source)
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "config.yaml"]))
        if is_emotion2vec(folder):
            folder = Path(snapshot_download(str(source), allow_patterns=list(EMOTION2VEC_FILES)))
        return folder
    except (OSError, ValueError) as error:
        raise ConversionError(f"{source} is neither a folder nor a Hub id that can be reached: {error}") from error


def _check_checkpoint(folder: Path, source: str | os.PathLike) -> None:
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"{source} has no config.json; a released checkpoint has config.json and model.safetensors (emotion2vec's "
            "config.yaml and model.pt)."
        )
    if not (folder / "model.safetensors").is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        found = f" It holds {', '.join(pickles)}." if pickles else ""
        raise ConversionError(
            f"{source} has no model.safetensors.{found} Pickled weights are refused, because loading a pickle can run "
            "code; have them saved as safetensors by someone who trusts them."
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"{path} holds no settings by name: it is not a checkpoint in the authors' format.")
    missing = [name for name in ("pretrain_model", "hidden_dim", "output_class_num") if name not in settings]
    if missing:
        raise ConversionError(f"{path} has no {missing}: it is not a checkpoint in the authors' format.")
    for name in ("hidden_dim", "output_class_num", "detailed_class_num", "lora_rank"):
        value = settings.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConversionError(f"{path}: {name} is {value!r}; it is a whole number from 1.")
    if not isinstance(settings["pretrain_model"], str):
        raise ConversionError(f"{path}: pretrain_model is {settings['pretrain_model']!r}; it is a backbone's name.")
    return settings


def _backbone_config(folder: Path, settings: dict[str, Any], audio_backbone: str | None) -> PretrainedConfig:
    beside = Path(audio_backbone or folder) / "backbone_config.json"
    try:
        if beside.is_file():
            config = AutoConfig.from_pretrained(beside, trust_remote_code=False)
        elif audio_backbone is not None:
            config = AutoConfig.from_pretrained(audio_backbone, trust_remote_code=False)
        elif settings["pretrain_model"] in RELEASED_BACKBONES:
            config = packaged_config(RELEASED_BACKBONES[settings["pretrain_model"]])
        else:
            raise ConversionError(
                f"The configuration of backbone {settings['pretrain_model']!r} does not ship with this package (those "
                f"of {sorted(RELEASED_BACKBONES)} do); name its folder or Hub id with --audio_backbone."
            )
    except (OSError, ValueError, StrictDataclassError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"No backbone configuration could be read from {audio_backbone or beside}: {error}"
        ) from error
    if config.model_type not in LORA_LAYERS:
        raise ConversionError(
            f"The backbone is {config.model_type!r}; the authors' models have {sorted(LORA_LAYERS)}."
        )
    return config


def _system_config(settings: dict[str, Any], audio_config: PretrainedConfig) -> SailerConfig:
    is_whisper = audio_config.model_type == "whisper"
    if is_whisper:
        audio_config.max_source_positions = WHISPER_POSITIONS
    heads = ["attributes"] if _attributes_only(settings) else ["primary", "secondary", "attributes"]
    return SailerConfig(
        audio_config=audio_config,
        audio_layers="last" if is_whisper else "weighted",
        hidden_size=settings["hidden_dim"],
        heads=heads,
        labels=PRIMARY_LABELS,
        secondary_labels=SECONDARY_LABELS,
        freeze_audio=bool(settings.get("freeze_params", True)),
        attend_to_padding=is_whisper,
        max_seconds=float(WHISPER_SECONDS),
        target_weighting="product",
    )


def _attributes_only(settings: dict[str, Any]) -> bool:
    # Only these classes have the option; an emotion head of another size is their untrained, unused default.
    return "predict_gender" in settings or settings["output_class_num"] != len(PRIMARY_LABELS)


def _processor(backbone: PretrainedConfig) -> SailerProcessor:
    if backbone.model_type == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=backbone.num_mel_bins, chunk_length=WHISPER_SECONDS)
        return SailerProcessor(extractor, audio_padding="max_length")
    return SailerProcessor(Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True))


def _read_tensors(
    folder: Path, settings: dict[str, Any], model: SailerForAudioClassification, backbone: PretrainedConfig, lora: str
) -> dict[str, torch.Tensor]:
    """Our model's state, in float32, from their file; every tensor of it is accounted for."""
    path = folder / "model.safetensors"
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = {name: _source_name(name, backbone) for name in shapes}
    adapted = _adapted_weights(settings, backbone)
    try:
        with safe_open(path, framework="pt") as file:
            stored = {_modern_name(name): name for name in file.keys()}  # noqa: SIM118 - not a dict
            _check_names(path, stored, {*sources.values(), *adapted}, settings, backbone)
            state, factors = {}, {}
            for name, source in sources.items():
                tensor = file.get_tensor(stored[source]).float()
                if not tensor.isfinite().all():
                    raise ConversionError(f"{path}: tensor {source} holds values that are not finite (NaN, infinity).")
                if source == "embed_positions":
                    tensor = tensor[:WHISPER_POSITIONS]
                if tuple(tensor.shape) != shapes[name]:
                    raise ConversionError(
                        f"{path}: tensor {source} has shape {tuple(tensor.shape)} where {shapes[name]} is expected; "
                        "is the backbone the right one (--audio_backbone)?"
                    )
                state[name] = tensor
                pair = [source.removesuffix("weight") + f"lora_{side}" for side in "AB"]
                if pair[0] in adapted:
                    down, up = (file.get_tensor(stored[side]).float() for side in pair)
                    # loralib's scaling is alpha / rank, and alpha is 1.
                    factors[name] = up @ down / len(down)
            if factors and not (lora == "merged" or (lora == "auto" and _are_merged(state, factors, path))):
                state |= {name: state[name] + update for name, update in factors.items()}
            return state
    except SafetensorError as error:
        raise ConversionError(
            f"{path} cannot be read ({error}): the file is truncated or damaged; copy or download it again."
        ) from error


def _are_merged(weights: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], path: Path) -> bool:
    """Whether matrices W hold their LoRA updates D = B A / rank already.

    The share of D in W is estimated by projecting all matrices at once: sum <W, D> / sum <D, D> is about 1 where W is
    W0 + D, and about 0 where it is W0, which does not know D. Its standard error under independent entries of W0 is
    the root mean square of W over the norm of D; where it is large, or the share near neither, a warning says so.
    """
    projected = sum(float((weights[name].double() * update).sum()) for name, update in factors.items())
    energy = sum(float(update.double().square().sum()) for update in factors.values())
    if energy == 0:
        return True  # updates of zero: merging changes nothing
    entries = sum(weights[name].numel() for name in factors)
    power = sum(float(weights[name].double().square().sum()) for name in factors) / entries
    share, error = projected / energy, (power / energy) ** 0.5
    merged = share > 0.5
    told = f"{path}: the weights hold {share:.2f} ± {error:.2f} of the LoRA factors (0: not merged, 1: merged)"
    if error > 0.2 or min(abs(share), abs(share - 1)) > 0.3:
        logger.warning(
            "%s, which is not clear; taken as %s. Say --lora merged or --lora unmerged if you know.",
            *(told, "merged" if merged else "unmerged"),
        )
    else:
        logger.info("%s.", told)
    return merged


def _source_name(name: str, backbone: PretrainedConfig) -> str:
    if name == "sailer.audio_encoder.embed_positions.weight" and backbone.model_type == "whisper":
        return "embed_positions"
    for ours, theirs in PARTS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    tower = "backbone_model.encoder." if backbone.model_type == "whisper" else "backbone_model."
    return tower + name.removeprefix("sailer.audio_encoder.")


def _modern_name(name: str) -> str:
    prefix, _, last = name.rpartition(".")
    return f"{prefix}.{OLD_NAMES[last]}" if last in OLD_NAMES else name


def _adapted_weights(settings: dict[str, Any], backbone: PretrainedConfig) -> set[str]:
    """Names of the LoRA factors: both feed-forward matrices of every layer whose index is above half their number."""
    if settings.get("finetune_method") not in ("lora", "combined"):
        return set()
    layers = backbone.num_hidden_layers
    return {
        f"backbone_model.encoder.layers.{index}.{matrix}.lora_{side}"
        for index in range(layers // 2 + 1, layers)
        for matrix in LORA_LAYERS[backbone.model_type]
        for side in "AB"
    }


def _check_names(
    path: Path, stored: Iterable[str], needed: set[str], settings: dict[str, Any], backbone: PretrainedConfig
) -> None:
    unused: tuple[str, ...] = ()
    if backbone.model_type == "whisper":
        unused += ("backbone_model.decoder.", "backbone_model.encoder.embed_positions.weight", "weights")
    if _attributes_only(settings):
        unused += ("emotion_layer.", "detailed_out_layer.")
    missing = sorted(needed.difference(stored))
    left_over = sorted(name for name in set(stored) - needed if not name.startswith(unused))
    for problem, names in (("lacks", missing), ("has tensors of no known use:", left_over)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ConversionError(
                f"{path} {problem} {shown}. Nothing is converted that might give other outputs than the original; is "
                "the backbone the right one (--audio_backbone)?"
            )
