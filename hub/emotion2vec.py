"""An emotion2vec checkpoint as FunASR has it (config.yaml, model.pt, tokens.txt) in, a transformers folder out."""

from __future__ import annotations

import ast
import logging
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sailer.configuration_sailer import REQUIREMENTS
from sailer.encoders_emotion2vec import (
    Emotion2VecConfig,
    Emotion2VecFeatureExtractor,
    Emotion2VecForAudioClassification,
    Emotion2VecModel,
)
from sailer.hub.card import render_emotion2vec_card
from sailer.hub.errors import ConversionError
from sailer.processing_sailer import SailerProcessor

logger = logging.getLogger(__name__)

FILES = ("config.yaml", "model.pt", "tokens.txt")
PREFIX = "d2v_model."  # of a pre-trained model inside a larger one, unless scope_map names others
NESTED = ("state_dict", "model_state_dict", "model")  # where, in this order, a checkpoint may hold its tensors
UNUSED = "unuse"  # how the tokens of classes begin that no clip is given
MOST_CONVOLUTIONS = 64

# Options by their names in config.yaml, ours, and what they hold. `model_conf`:
MODEL_OPTIONS = {
    "embed_dim": ("hidden_size", int),
    "num_heads": ("num_attention_heads", int),
    "norm_eps": ("layer_norm_eps", float),
    "norm_affine": ("layer_norm_affine", bool),
    "normalize": ("do_normalize", bool),
    "encoder_dropout": ("hidden_dropout", float),
    "attention_dropout": ("attention_dropout", float),
    "activation_dropout": ("activation_dropout", float),
    "post_mlp_drop": ("feed_forward_dropout", float),
    "dropout_input": ("input_dropout", float),
    "layerdrop": ("layerdrop", float),
}
# `model_conf.modalities.audio`:
AUDIO_OPTIONS = {
    "prenet_depth": ("prenet_layers", int),
    "prenet_dropout": ("prenet_dropout", float),
    "prenet_layerdrop": ("prenet_layerdrop", float),
    "num_extra_tokens": ("num_extra_tokens", int),
    "conv_pos_groups": ("conv_pos_groups", int),
    "conv_pos_depth": ("conv_pos_layers", int),
    "num_alibi_heads": ("alibi_heads", int),
    "learned_alibi_scale": ("alibi_scale_learned", bool),
    "learned_alibi_scale_per_head": ("alibi_scale_per_head", bool),
    "learned_alibi_scale_per_layer": ("alibi_scale_per_layer", bool),
}
# Read by name below.
MODEL_PARTS = ("depth", "mlp_ratio", "modalities", "start_drop_path_rate", "end_drop_path_rate")
AUDIO_PARTS = ("feature_encoder_spec", "conv_pos_width", "model_depth", "start_drop_path_rate", "end_drop_path_rate")
# The one value that is understood; another computes something else.
MODEL_FIXED = {"layer_norm_first": False}
AUDIO_FIXED = {
    "type": "AUDIO",
    "extractor_mode": "layer_norm",
    "conv_pos_pre_ln": False,
    "use_alibi_encoder": True,
    "learned_alibi": False,
}
# What only pre-training and its targets see.
PRETRAINING = {
    *("average_top_k_layers", "end_of_block_targets", "clone_batch", "max_update", "seed", "skip_ema", "mae_init"),
    *("layer_norm_target_layer", "batch_norm_target_layer", "instance_norm_target_layer", "instance_norm_targets"),
    *("layer_norm_targets", "log_norms", "shared_decoder", "min_target_var", "min_pred_var", "supported_modality"),
    *("cls_loss", "recon_loss", "d2v_loss", "decoder_group", "cls_type", "loss_beta", "loss_scale", "decoder"),
    *("init_extra_token_zero", "inverse_mask", "keep_masked_pct", "add_masks", "remove_masks", "encoder_zero_mask"),
    *("local_grad_mult", "alibi_scale", "alibi_max_pos"),
}
PRETRAINING_PREFIXES = ("_", "ema_", "mask_", "adversarial_")


def is_emotion2vec(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in FunASR's form, not one in the form of SAILER's authors."""
    return (folder / "config.yaml").is_file() and not (folder / "model.safetensors").is_file()


def convert_emotion2vec(folder: Path, source: str, name: str, destination: Path) -> None:
    """Convert an emotion2vec checkpoint: the encoder, or with tokens.txt the classifier.

    Its pickle goes through torch's weights-only reader and no other. What inference does not use, the decoder for one,
    is left out and counted, in the log and on the card.

    Args:
        folder: with `config.yaml`, `model.pt` and, of a classifier, `tokens.txt`.
        source: Hub id or folder that it came from, for the card.
        name: of the converted model.
        destination: empty folder to write into.

    Raises:
        ConversionError: a file or tensor that is missing or misshapen, an option that is not understood, or a pickle
            of more than tensors; the message names it.
    """
    options = _read_yaml(folder / "config.yaml")
    tokens = _tokens(folder, options)
    settings = _settings(folder / "config.yaml", options)
    if tokens:
        labels = _english(tokens)
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
        settings["unused_labels"] = [
            label for label, token in zip(labels, tokens, strict=True) if token.startswith(UNUSED)
        ]
    try:
        config = Emotion2VecConfig(**settings)
    except ValueError as error:
        raise ConversionError(f"{folder / 'config.yaml'}: {error}") from error
    with torch.device("meta"):
        model = Emotion2VecForAudioClassification(config) if tokens else Emotion2VecModel(config)
    state, left_out = _read_tensors(folder / "model.pt", options, model)
    model.load_state_dict(state, assign=True)
    told = ", ".join(f"{count} of {part}" for part, count in sorted(left_out.items()))
    if told:
        logger.info("%s: left out %d tensors that inference does not use: %s.", source, left_out.total(), told)

    model.save_pretrained(destination)
    extractor = Emotion2VecFeatureExtractor(do_normalize=config.do_normalize)
    (SailerProcessor(extractor) if tokens else extractor).save_pretrained(destination)
    (destination / "requirements.txt").write_text("".join(f"{line}\n" for line in REQUIREMENTS), encoding="utf-8")
    (destination / "model.safetensors").chmod((destination / "config.json").stat().st_mode)
    render_emotion2vec_card(source, config, tokens, dict(left_out), name, destination / "README.md")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        options = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is not YAML: {error}") from error
    if not isinstance(options, dict) or not isinstance(options.get("model_conf"), dict):
        raise ConversionError(f"{path} has no model_conf: it is not an emotion2vec checkpoint's configuration.")
    if options.get("model") != "Emotion2vec":
        raise ConversionError(
            f"{path}: model is {options.get('model')!r}; of FunASR's models Emotion2vec is converted."
        )
    return options


def _settings(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Our configuration's options from theirs."""
    model = options["model_conf"]
    modalities = model.get("modalities")
    if not isinstance(modalities, dict) or not isinstance(modalities.get("audio"), dict):
        raise ConversionError(f"{path} has no model_conf.modalities.audio.")
    others = [name for name, value in modalities.items() if name != "audio" and value is not None]
    if others:
        raise ConversionError(f"{path}: model_conf.modalities.{others[0]} is not understood; audio is.")
    audio = modalities["audio"]
    read = _Reader(path, "model_conf", model, MODEL_OPTIONS, MODEL_FIXED, MODEL_PARTS)
    read_audio = _Reader(path, "model_conf.modalities.audio", audio, AUDIO_OPTIONS, AUDIO_FIXED, AUDIO_PARTS)
    settings = read.settings() | read_audio.settings()
    depth, prenet = read.value("depth", int), settings["prenet_layers"]
    if settings["alibi_scale_per_layer"] and read_audio.value("model_depth", int) != depth:
        raise ConversionError(
            f"{path}: model_conf.modalities.audio.model_depth is {audio['model_depth']} and model_conf.depth {depth}: "
            "which of the scales is whose is not told."
        )
    if settings["conv_pos_layers"] < 1:
        raise ConversionError(f"{path}: model_conf.modalities.audio.conv_pos_depth is a whole number from 1.")
    convolutions = _convolutions(path, audio.get("feature_encoder_spec"))
    conv_dim, conv_kernel, conv_stride = map(list, zip(*convolutions, strict=True))
    rates = [*_rates(read_audio, prenet), *_rates(read, depth)]
    return settings | {
        "num_hidden_layers": prenet + depth,
        "intermediate_size": int(settings["hidden_size"] * read.value("mlp_ratio", float)),
        "conv_dim": conv_dim,
        "conv_kernel": conv_kernel,
        "conv_stride": conv_stride,
        "conv_pos_kernel": max(3, read_audio.value("conv_pos_width", int) // settings["conv_pos_layers"]),
        "drop_path_rates": rates if any(rates) else None,
    }


class _Reader:
    """One section of config.yaml: every option of it is read, fixed, or known to be of pre-training alone."""

    def __init__(
        self,
        path: Path,
        place: str,
        section: Mapping[str, Any],
        options: Mapping[str, tuple[str, type]],
        fixed: Mapping[str, Any],
        parts: tuple[str, ...],
    ) -> None:
        self.path, self.place, self.section, self.options = path, place, section, options
        for name, value in section.items():
            if name in fixed and value != fixed[name]:
                raise ConversionError(f"{path}: {place}.{name} is {value!r}; {fixed[name]!r} is what is understood.")
            if name in {*options, *fixed, *parts, *PRETRAINING} or str(name).startswith(PRETRAINING_PREFIXES):
                continue
            raise ConversionError(f"{path}: {place}.{name} (here {value!r}) is not understood.")
        for name in fixed:
            self._required(name)

    def settings(self) -> dict[str, Any]:
        """Values by our names."""
        return {ours: self.value(name, kind) for name, (ours, kind) in self.options.items()}

    def value(self, name: str, kind: type) -> Any:
        """An option that is there and of its kind; a whole number is a float too."""
        value = self._required(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if kind is float and (whole or isinstance(value, float)):
            return float(value)
        if not (whole if kind is int else isinstance(value, kind)):
            told = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise ConversionError(f"{self.path}: {self.place}.{name} is {value!r}; it is {told}.")
        return value

    def _required(self, name: str) -> Any:
        if name not in self.section:
            raise ConversionError(f"{self.path} has no {self.place}.{name}.")
        return self.section[name]


def _rates(read: _Reader, blocks: int) -> list[float]:
    """Stochastic depth's rates, evenly spaced over the blocks."""
    first, last = read.value("start_drop_path_rate", float), read.value("end_drop_path_rate", float)
    return torch.linspace(first, last, blocks, dtype=torch.float64).tolist()


def _convolutions(path: Path, spec: Any) -> list[tuple[int, int, int]]:
    """(width, kernel, stride) of each convolution from a list, or from an expression of lists, `+` and `*` as text.

    The text is Python, which is not run: it is read as a tree of lists, tuples, whole numbers, sums and products.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [value(element) for element in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
                return left + right
            is_repeated = isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int)
            if is_repeated and len(left) * right <= MOST_CONVOLUTIONS:
                return left * right
        raise ValueError(ast.unparse(node))

    try:
        found = value(ast.parse(spec, mode="eval").body) if isinstance(spec, str) else spec
        if not isinstance(found, list) or not found or len(found) > MOST_CONVOLUTIONS:
            raise ValueError(found)
        for layer in found:
            if not (
                isinstance(layer, list | tuple) and len(layer) == 3 and all(type(n) is int and n > 0 for n in layer)
            ):
                raise ValueError(layer)
    except (ValueError, SyntaxError, RecursionError) as error:
        raise ConversionError(
            f"{path}: model_conf.modalities.audio.feature_encoder_spec is {spec!r}; it is a list of (width, kernel, "
            f"stride), all whole numbers from 1, as in '[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2'."
        ) from error
    return [tuple(layer) for layer in found]


def _tokens(folder: Path, options: Mapping[str, Any]) -> list[str]:
    """The classifier's tokens, in the order of its outputs; none of an encoder."""
    path, size = folder / "tokens.txt", options.get("vocab_size", -1)
    if isinstance(size, bool) or not isinstance(size, int | None):
        raise ConversionError(f"{folder / 'config.yaml'}: vocab_size is {size!r}; it is a whole number.")
    if not path.is_file():
        if size is not None and size > 0:
            raise ConversionError(f"{folder} has no tokens.txt, which names the {size} classes of its vocab_size.")
        return []
    try:
        tokens = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not UTF-8: {error}") from error
    if not tokens or (size is not None and size > 0 and size != len(tokens)):
        raise ConversionError(f"{path} names {len(tokens)} classes and the vocab_size of config.yaml is {size}.")
    return tokens


def _english(tokens: list[str]) -> list[str]:
    """English names: of "生气/angry" what follows the slash, and the whole token where that would be there twice."""
    short = [token.rpartition("/")[2] or token for token in tokens]
    names: list[str] = []
    for index, (token, name) in enumerate(zip(tokens, short, strict=True)):
        name = token if short.count(name) > 1 else name
        names.append(f"{name} ({index})" if tokens.count(token) > 1 or name in names else name)
    return names


def _read_tensors(
    path: Path, options: Mapping[str, Any], model: Emotion2VecModel | Emotion2VecForAudioClassification
) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Our model's state, in float32, and how many tensors of the file are not in it, by their part."""
    stored = _load(path)
    prefixes = _prefixes(options)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state, used, missing = {}, set(), []
    for name, shape in shapes.items():
        source, part = _source_name(name.removeprefix("emotion2vec."), model.config.prenet_layers)
        found = next((key for prefix in prefixes if (key := prefix + source) in stored), None)
        if found is None:
            missing.append(source)
            continue
        used.add(found)
        tensor = stored[found].float()
        wanted = _source_shape(source, shape)
        if tuple(tensor.shape) != wanted:
            raise ConversionError(
                f"{path}: tensor {found} has shape {tuple(tensor.shape)} where {wanted} is expected."
            )
        if not tensor.isfinite().all():
            raise ConversionError(f"{path}: tensor {found} holds values that are not finite (NaN, infinity).")
        tensor = tensor if part is None else tensor.chunk(3)[part]
        state[name] = tensor.reshape(shape).contiguous()
    if missing:
        names = list(dict.fromkeys(missing))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ConversionError(f"{path} lacks {shown}: is config.yaml that of this model?")
    return state, Counter(_part(key, prefixes) for key in stored if key not in used)


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ConversionError(f"{path.parent} has no model.pt beside its config.yaml.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is not read: it holds more than tensors and plain values, and loading such a pickle can run code "
            f"({' '.join(str(error).split())[:300]})."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ConversionError(
            f"{path} cannot be read ({' '.join(str(error).split())[:300]}): it is truncated or damaged; get it again."
        ) from error
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    tensors = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, torch.Tensor):
            tensors[str(name)] = value
    if not tensors:
        raise ConversionError(f"{path} holds no tensors by name.")
    return tensors


def _prefixes(options: Mapping[str, Any]) -> list[str]:
    """What tensors' names may begin with, the first that is there counting: as FunASR reads scope_map, the last pair
    first."""
    pairs = options.get("scope_map") or []
    pairs = [pair.strip() for pair in pairs.split(",")] if isinstance(pairs, str) else list(pairs)
    none = (None, "", "none", "None")
    sources = [pairs[index] for index in range(0, len(pairs) - 1, 2) if pairs[index + 1] in none]
    return list(dict.fromkeys(["module.", *(str(name) for name in reversed(sources) if name not in none), PREFIX, ""]))


def _source_name(name: str, prenet_layers: int) -> tuple[str, int | None]:
    """What FunASR calls a tensor of ours, and which third of that it is (query, key or value)."""
    audio = "modality_encoders.AUDIO."
    replaced = {
        r"feature_extractor\.(\d+)\.conv\.": rf"{audio}local_encoder.conv_layers.\1.0.",
        r"feature_extractor\.(\d+)\.layer_norm\.": rf"{audio}local_encoder.conv_layers.\1.2.1.",
        r"feature_projection\.0\.": f"{audio}project_features.1.",
        r"feature_projection\.1\.": f"{audio}project_features.2.",
        r"(extra_tokens|alibi_scale)$": rf"{audio}\1",
        r"encoder\.layer_norm\.": f"{audio}context_encoder.norm.",
        r"classifier\.": "proj.",
    }
    for ours, theirs in replaced.items():
        if re.match(ours, name):
            return re.sub(ours, theirs, name), None
    place = re.fullmatch(r"positions\.convs\.(\d+)\.(.+)", name)
    if place:
        return f"{audio}relative_positional_encoder.{int(place[1]) + 1}.0.{place[2]}", None
    block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert block is not None, name
    index = int(block[1])
    where = f"{audio}context_encoder.blocks.{index}" if index < prenet_layers else f"blocks.{index - prenet_layers}"
    inside = {
        "attention.q_proj": ("attn.qkv", 0),
        "attention.k_proj": ("attn.qkv", 1),
        "attention.v_proj": ("attn.qkv", 2),
        "attention.out_proj": ("attn.proj", None),
        "layer_norm": ("norm1", None),
        "feed_forward.intermediate_dense": ("mlp.fc1", None),
        "feed_forward.output_dense": ("mlp.fc2", None),
        "final_layer_norm": ("norm2", None),
    }
    theirs, part = inside[block[2]]
    return f"{where}.{theirs}.{block[3]}", part


def _source_shape(source: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if ".attn.qkv." in source:
        return (3 * shape[0], *shape[1:])
    if source.endswith(".extra_tokens"):
        return (1, *shape)
    if source.endswith(".alibi_scale"):
        return (shape[0], 1, shape[1], 1, 1)
    return shape


def _part(key: str, prefixes: list[str]) -> str:
    """The part of a model that a tensor belongs to, for the count of what is left out."""
    for prefix in prefixes:
        key = key.removeprefix(prefix)
    names = key.removeprefix("modality_encoders.AUDIO.").split(".")
    return names[0] or key


__all__ = ["FILES", "convert_emotion2vec", "is_emotion2vec"]
