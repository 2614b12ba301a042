"""LoRA in the towers, by peft: put into a frozen encoder, saved without it, loaded over it again, merged into it.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685): a matrix W becomes W + s B A, of which A (rank, inputs) and B
(outputs, rank) are trained; s is alpha / rank.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .encoders_sailer import load_encoder

TOWERS = ("audio", "text")
# What an entry of the configuration holds, with the defaults (of `alpha` the rank, of `layers` all of them).
DEFAULTS = {
    **{"rank": None, "alpha": None, "dropout": 0.0, "targets": ["feed_forward"], "layers": None},
    **{"use_dora": False, "use_rslora": False},
}
_WAV2VEC2 = {
    "attention": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"),
    "feed_forward": ("feed_forward.intermediate_dense", "feed_forward.output_dense"),
}
_CONFORMER = {
    "attention": ("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v", "self_attn.linear_out"),
    "feed_forward": tuple(f"ffn{i}.{part}_dense" for i in (1, 2) for part in ("intermediate", "output")),
}
_BERT = {
    "attention": (*(f"attention.self.{part}" for part in ("query", "key", "value")), "attention.output.dense"),
    "feed_forward": ("intermediate.dense", "output.dense"),
}
# model_type -> what "attention" and "feed_forward" are in one of its layers.
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "whisper": {
        "attention": tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
        "feed_forward": ("fc1", "fc2"),
    },
    **dict.fromkeys(("data2vec-audio", "emotion2vec", "hubert", "sew", "unispeech", "unispeech-sat"), _WAV2VEC2),
    **dict.fromkeys(("wav2vec2", "wavlm"), _WAV2VEC2),
    **dict.fromkeys(("wav2vec2-bert", "wav2vec2-conformer"), _CONFORMER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
}
# Where encoders have their layers.
LAYERS = ("layers", "encoder.layers", "encoder.layer")
# Of from_pretrained's options, those that say where a checkpoint is.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
WEIGHTS_FILE, ADAPTER_FILE = "model.safetensors", "adapter_model.safetensors"
PEFT = "peft>=0.20"
ADAPTER = "default"  # peft's name of the one adapter that a tower has


def checked_lora(tower: str, lora: Any, is_frozen: bool, has_tower: bool = True) -> dict[str, Any] | None:
    """An entry of a configuration (`audio_lora`, `text_lora`) with all of `DEFAULTS`.

    Raises:
        ValueError: an option outside its range, or a tower that is not there or is trained whole; it is named as a
            recipe names it.
    """
    if lora is None:
        return None
    if not isinstance(lora, Mapping) or not {"rank"} <= set(lora) <= set(DEFAULTS):
        raise ValueError(
            f"{tower}_lora is {lora!r}; give a mapping with rank, and of {list(DEFAULTS)[1:]} what differs."
        )
    lora = DEFAULTS | dict(lora)
    if not has_tower:
        raise ValueError(f"{tower}_lora_rank is {lora['rank']!r}, but the system has no {tower} encoder.")
    if not is_frozen:
        raise ValueError(
            f"{tower}_lora_rank is {lora['rank']!r} but freeze_{tower} is false: LoRA trains beside an encoder that "
            f"stays as it was loaded. Set freeze_{tower} to true, or leave LoRA out."
        )
    for name, least in (("rank", 1), ("layers", 1)):
        value = lora[name]
        wrong = isinstance(value, bool) or not isinstance(value, int) or value < least
        if wrong and (value is not None or name == "rank"):
            raise ValueError(f"{tower}_lora_{name} is a whole number from {least}, got {value!r}.")
    lora["alpha"] = lora["rank"] if lora["alpha"] is None else lora["alpha"]
    alpha, dropout, targets = lora["alpha"], lora["dropout"], lora["targets"]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha must be positive and finite, got {alpha!r}.")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is a share from 0 to below 1, got {dropout!r}.")
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not targets:
        raise ValueError(f"{tower}_lora_targets is {targets!r}; give a list of names.")
    lora["targets"] = list(targets)
    for name in ("use_dora", "use_rslora"):
        if not isinstance(lora[name], bool):
            raise ValueError(f"{name} is true or false, got {lora[name]!r}.")
    return lora


def trains(config: Any, tower: str) -> bool:
    """Whether anything of a tower, "audio" or "text", is trained: the encoder itself, or LoRA in it."""
    return not getattr(config, f"freeze_{tower}") or getattr(config, f"{tower}_lora") is not None


def lora_of(config: Any) -> dict[str, dict[str, Any]]:
    """Entry of each tower of a configuration that has LoRA."""
    return {tower: lora for tower in TOWERS if (lora := getattr(config, f"{tower}_lora"))}


def add_lora(encoder: PreTrainedModel, tower: str, lora: Mapping[str, Any] | None) -> None:
    """Put LoRA into an encoder, in place; at first it changes nothing of what the encoder says.

    Args:
        encoder: a tower's.
        tower: "audio" or "text", for errors.
        lora: as `checked_lora` gives it; `None` does nothing.

    Raises:
        ImportError: peft is not installed.
        ValueError: it has LoRA already, more layers are asked for than it has, or a target is none of its linear
            layers.
    """
    if lora is None:
        return
    peft = _import_peft()
    if lora_parts(encoder):
        raise ValueError(f"The {tower} encoder has LoRA already: merge it first (sailer merge, model.merge_lora()).")
    options = peft.LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora_targets(encoder, tower, lora["targets"], lora["layers"]),
        use_dora=lora["use_dora"],
        use_rslora=lora["use_rslora"],
    )
    peft.inject_adapter_in_model(options, encoder, ADAPTER)
    for part in lora_parts(encoder):
        for thing in (*part.modules(), *part.parameters()):
            setattr(thing, "_is_hf_initialized", True)  # noqa: B010 - peft did: B is zero, and must stay so


def lora_targets(encoder: PreTrainedModel, tower: str, targets: Sequence[str], layers: int | None) -> list[str]:
    """Names of an encoder's linear layers that get LoRA.

    Args:
        encoder: a tower's.
        tower: for errors.
        targets: "attention", "feed_forward", or how the names of linear layers end.
        layers: so many of its transformer layers, counted from the output; `None` for all.

    Raises:
        ValueError: see `add_lora`.
    """
    kind = encoder.config.model_type
    found = ((path, _part(encoder, path)) for path in LAYERS)
    path, blocks = next(((path, part) for path, part in found if isinstance(part, nn.ModuleList)), ("", None))
    if blocks is None:
        raise ValueError(f"The layers of a {kind!r} encoder cannot be told apart: leave {tower}_lora_rank out.")
    if layers is not None and layers > len(blocks):
        raise ValueError(f"{tower}_lora_layers is {layers}, and this encoder has {len(blocks)} layers.")
    chosen = range(len(blocks) - layers if layers else 0, len(blocks))
    linear = [name for name, part in blocks[chosen[0]].named_modules() if isinstance(part, nn.Linear)]
    wanted: list[str] = []
    for target in targets:
        meant = TARGETS.get(kind, {}).get(target)
        # A word stands for the layers of these very names, a name for all that end so.
        own = [name for name in linear if (name in meant if meant else f".{name}".endswith(f".{target}"))]
        if not own:
            words = "attention, feed_forward, or " if kind in TARGETS else ""
            raise ValueError(
                f"{tower}_lora_targets names {target!r}, which no linear layer of this {kind!r} encoder is: choose of "
                f"{words}{', '.join(linear)}."
            )
        wanted += [name for name in own if name not in wanted]
    return [f"{path}.{index}.{name}" for index in chosen for name in wanted]


def lora_parts(encoder: nn.Module) -> list[nn.Module]:
    """What LoRA adds to an encoder, which is all that is trained of it; nothing of one without LoRA."""
    adapted = (part for part in encoder.modules() if hasattr(part, "base_layer") and hasattr(part, "lora_A"))
    return [part for layer in adapted for name, part in layer.named_children() if name != "base_layer"]


def merge_lora(encoder: nn.Module) -> None:
    """Add the LoRA of an encoder to its weights, in place: it then is as it would be without peft.

    Raises:
        ValueError: a weight would not be finite.
    """
    adapted = [(name, part) for name, part in encoder.named_modules() if hasattr(part, "base_layer")]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(encoder.get_submodule(parent), own, layer.get_base_layer())
    if adapted:
        del encoder.peft_config


def base_state(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """An encoder's tensors without LoRA, under the names that they have where there is none."""
    names = {name: name.replace(".base_layer.", ".") for name in encoder.state_dict() if ".lora_" not in name}
    return {names[name]: value for name, value in encoder.state_dict().items() if name in names}


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over tensors' names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(raw.numpy().data)
    return found.hexdigest()


def place_of_backbone(source: str | os.PathLike) -> dict[str, str]:
    """Where a tower's frozen weights are, for a configuration's `backbones`: a Hub id or a whole path."""
    return {"source": os.path.abspath(source) if os.path.isdir(source) else os.fspath(source)}


def moved_backbones(saved: Mapping[str, Any] | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration's `backbones`, those that are given in other places; their checksums stay."""
    return {tower: {**entry, **given.get(tower, {})} for tower, entry in (saved or given).items()}


def without_frozen_towers(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a system's state what is saved beside its adapters: all but the towers that stay as they were loaded.

    Their digests are put into the configuration, so that it is seen if a backbone is not the same when it is loaded.

    Raises:
        ValueError: it is not known where a frozen tower's weights are.
    """
    base = getattr(model, "sailer", model)
    backbones = {tower: dict(entry) for tower, entry in (model.config.backbones or {}).items()}
    for tower in TOWERS:
        encoder = getattr(base, f"{tower}_encoder")
        if encoder is None or not getattr(model.config, f"freeze_{tower}"):
            backbones.pop(tower, None)
            continue
        if tower not in backbones:
            raise ValueError(
                f"Adapters are saved without the {tower} encoder, and it is not known where its weights are: set "
                f"config.backbones, {{{tower!r}: {{'source': ID_OR_FOLDER}}}}, or merge first (model.merge_lora())."
            )
        if "sha256" not in backbones[tower]:
            backbones[tower]["sha256"] = digest(base_state(encoder))
    model.config.backbones = backbones
    frozen = tuple(f"{tower}_encoder." for tower in backbones)
    return {name: value for name, value in state.items() if not name.removeprefix("sailer.").startswith(frozen)}


def save_adapters(model: Any, folder: str | os.PathLike) -> None:
    """Write the adapters of the towers, each to a subfolder of peft's own form (audio_adapter, text_adapter)."""
    base = getattr(model, "sailer", model)
    for tower in lora_of(model.config):
        encoder, place = getattr(base, f"{tower}_encoder"), os.path.join(folder, f"{tower}_adapter")
        options = copy.deepcopy(encoder.peft_config[ADAPTER])
        options.base_model_name_or_path = model.config.backbones[tower]["source"]
        options.inference_mode = True
        options.save_pretrained(place)
        tensors = _import_peft().get_peft_model_state_dict(encoder, adapter_name=ADAPTER)
        tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, os.path.join(place, ADAPTER_FILE), metadata={"format": "pt"})


@dataclass
class SavedAdapters:
    """A system that was saved as adapters: what `from_pretrained` of the system without them takes, and the rest."""

    options: dict[str, Any]
    lora: dict[str, dict[str, Any]]
    backbones: dict[str, dict[str, str]]
    tensors: dict[str, dict[str, torch.Tensor]]

    @classmethod
    def read(
        cls, model_class: Any, source: Any, located: Mapping[str, Any], options: Mapping[str, Any]
    ) -> SavedAdapters | None:
        """What lies at `source`; `None` where that is no system saved as adapters.

        Args:
            model_class: of the system.
            source: folder or Hub id.
            located: of `options` those that say where it is (`revision`, `subfolder`, ...).
            options: of `from_pretrained`.

        Raises:
            OSError: a file is missing.
            ValueError: a backbone cannot be loaded, or is not the one that the adapters were trained on.
        """
        config = options.get("config")
        if source is None or not isinstance(config, PretrainedConfig | None):
            return None
        if config is None:
            saved = model_class.config_class.get_config_dict(source, **located)[0]
            if not any(saved.get(f"{tower}_lora") for tower in TOWERS):
                return None
            given = {name: value for name, value in options.items() if name not in {*located, "dtype"}}
            config, given = model_class.config_class.from_pretrained(
                source, return_unused_kwargs=True, **located, **given
            )
            given |= {name: options[name] for name in ("dtype",) if name in options}
        else:
            given = {name: value for name, value in options.items() if name not in {*located, "config"}}
            config = copy.deepcopy(config)
        lora = lora_of(config)
        if not lora:
            return None
        if given.get("dtype") == "auto":  # there is no one file whose type it could be
            given["dtype"] = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        state = load_file(_file(source, WEIGHTS_FILE, located))
        backbones = {tower: dict(entry) for tower, entry in (config.backbones or {}).items()}
        prefix = "sailer." if any(name.startswith("sailer.") for name in state) else ""
        for tower, entry in backbones.items():
            tensors = _base_tensors(model_class, tower, entry, config)
            state |= {f"{prefix}{tower}_encoder.{name}": value for name, value in tensors.items()}
        own = {tower: load_file(_file(source, f"{tower}_adapter/{ADAPTER_FILE}", located)) for tower in lora}
        for tower in TOWERS:
            setattr(config, f"{tower}_lora", None)
        return cls({**given, "config": config, "state_dict": state}, lora, backbones, own)

    def put_into(self, model: Any) -> None:
        """Give the loaded system its adapters.

        Raises:
            ValueError: they are of another encoder.
        """
        base = getattr(model, "sailer", model)
        for tower, lora in self.lora.items():
            encoder = getattr(base, f"{tower}_encoder")
            add_lora(encoder, tower, lora)
            setattr(model.config, f"{tower}_lora", lora)
            tensors = {name.removeprefix("base_model.model."): value for name, value in self.tensors[tower].items()}
            try:
                report = _import_peft().set_peft_model_state_dict(encoder, tensors, ADAPTER)
            except RuntimeError as error:
                raise ValueError(f"The adapter of the {tower} encoder does not fit it: {error}") from error
            lost = [name for name in report.missing_keys if ".lora_" in name]
            if lost or report.unexpected_keys:
                names = sorted(lost or report.unexpected_keys)[:3]
                raise ValueError(f"The adapter of the {tower} encoder {'lacks' if lost else 'has unknown'} {names}.")
        model.config.backbones = self.backbones
        model.to(dtype=model.dtype)


class LoraTowers(PreTrainedModel):
    """What a system with LoRA can do beside what others can; all of it but `add_lora` does nothing without LoRA."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', also of a system that was saved as adapters; see `SailerPreTrainedModel`."""
        located = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        adapters = SavedAdapters.read(cls, pretrained_model_name_or_path, located, kwargs)
        if adapters is None:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        loaded: Any = super().from_pretrained(None, *args, **adapters.options)
        adapters.put_into(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers'; with LoRA without the frozen towers, and the adapters beside it."""
        if not lora_of(self.config):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        kwargs["state_dict"] = without_frozen_towers(self, kwargs.get("state_dict") or self.state_dict())
        super().save_pretrained(save_directory, *args, **kwargs)
        save_adapters(self, save_directory)

    def freeze_towers(self) -> None:
        """Take the gradients off what the configuration freezes of the towers."""
        base: Any = getattr(self, "sailer", self)
        for tower, trained in base.frozen_towers():
            tower.requires_grad_(False)
            for layer in trained:
                layer.requires_grad_(True)

    def add_lora(
        self,
        audio: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        source: str | os.PathLike | None = None,
    ) -> None:
        """Put LoRA into towers, in place; at first it changes nothing of what the system says.

        Args:
            audio, text: as `SailerConfig`'s `audio_lora` and `text_lora`.
            source: where the system was loaded from: adapters are saved without the frozen encoders.

        Raises:
            ImportError, ValueError: see `sailer.adapters_sailer.add_lora`.
        """
        base, config = getattr(self, "sailer", self), self.config
        for tower, lora in zip(TOWERS, (audio, text), strict=True):
            encoder = getattr(base, f"{tower}_encoder")
            lora = checked_lora(tower, lora, getattr(config, f"freeze_{tower}"), encoder is not None)
            add_lora(encoder, tower, lora)
            if lora is not None:
                setattr(config, f"{tower}_lora", lora)
            if source is not None:
                config.backbones = {**(config.backbones or {}), tower: place_of_backbone(source)}
        cast(Any, self).freeze_towers()

    def merge_lora(self) -> Self:
        """Add the LoRA of the towers to their weights, in place: then it needs no peft, and is saved whole."""
        base = getattr(self, "sailer", self)
        for tower in lora_of(self.config):
            merge_lora(getattr(base, f"{tower}_encoder"))
            setattr(self.config, f"{tower}_lora", None)
        self.config.backbones = None
        cast(Any, self).freeze_towers()
        return self


def _base_tensors(model_class: Any, tower: str, entry: Mapping[str, str], config: Any) -> dict[str, torch.Tensor]:
    source = entry["source"]
    way = f"Name its place: from_pretrained(..., backbones={{{tower!r}: {{'source': ID_OR_FOLDER}}}})."
    try:
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
        if kind == config.model_type:  # a system that training went on from
            system = model_class.from_pretrained(source, dtype=torch.float32)
            encoder = getattr(getattr(system, "sailer", system), f"{tower}_encoder")
        else:
            encoder = load_encoder(source, None, config.audio_layers if tower == "audio" else None)
    except (OSError, ValueError) as error:
        raise ValueError(f"The {tower} encoder of these adapters cannot be loaded: {error} {way}") from error
    tensors = base_state(encoder)
    if entry.get("sha256", "") not in ("", digest(tensors)):
        raise ValueError(
            f"The weights of {source} are not those that the adapters of the {tower} encoder were trained on. {way}"
        )
    return tensors


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'sailer[lora]'.") from error
    return peft


def _file(source: Any, name: str, located: Mapping[str, Any]) -> str:
    path = cached_file(str(source), name, **located)
    assert path is not None, "cached_file raises where a file is missing"
    return path


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


__all__ = [
    "LoraTowers",
    "SavedAdapters",
    "add_lora",
    "base_state",
    "checked_lora",
    "digest",
    "lora_of",
    "lora_parts",
    "lora_targets",
    "merge_lora",
    "moved_backbones",
    "place_of_backbone",
    "save_adapters",
    "trains",
    "without_frozen_towers",
]
