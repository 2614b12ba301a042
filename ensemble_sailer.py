"""SailerEnsemble: several systems that are loaded, saved, served and judged as one (paper, Table 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file, can_return_tuple

from .adapters_sailer import HUB_OPTIONS, digest
from .configuration_sailer import (
    COMBINE,
    HEADS,
    REQUIREMENTS,
    SailerConfig,
    SailerEnsembleConfig,
    load_member,
    load_part,
    place_of,
    take_push_options,
)
from .encoders_sailer import RESAMPLED
from .layers_sailer import SailerEnsembleOutput, plain_loss
from .modeling_sailer import SailerForAudioClassification
from .processing_sailer import MEMBER_PROCESSORS, SailerEnsembleProcessor, drop_code

WEIGHTS_FILE = "model.safetensors"
# The classes that members load with, by the model_type of their config.json.
MEMBER_MODELS = {"sailer": SailerForAudioClassification}
# Of from_pretrained's options, those that a member's takes too, and those that stock loaders pass to any class.
OF_A_MEMBER = ("dtype", "torch_dtype", "attn_implementation", "low_cpu_mem_usage")
OF_LOADERS = ("trust_remote_code", "adapter_kwargs", "code_revision", "use_safetensors", "weights_only")
LEAST = 1e-12  # a class that no member thinks possible keeps a finite logit
# Output -> the head that it is of.
HEAD_OF_OUTPUT = {
    "logits": "primary",
    "secondary_logits": "secondary",
    "attributes": "attributes",
    "sex_logits": "sex",
    "age": "age",
}


class SailerEnsemble(PreTrainedModel):
    """
    Systems of one label set as one model, for inference. Members whose speech (or text) encoders are equal, by a
    digest of their weights, and hear the same input, share one encoder, which runs once.

    Args:
        config: the ensemble's configuration.
        members: the systems, in its order; `from_pretrained` loads them.
        tensors: `weights` (members,) of the primary emotions; of a stacked ensemble also `stack_weight` (labels,
            members * labels) and `stack_bias` (labels,). Equal weights by default.

    Raises:
        ValueError: members other than the configuration's, of different labels, or tensors of another shape.
    """

    config: SailerEnsembleConfig
    config_class = SailerEnsembleConfig
    input_modalities = ["audio", "text"]  # noqa: RUF012 - transformers' own form
    members: Any  # a ModuleList of systems
    weights: torch.Tensor
    stack_weight: torch.Tensor
    stack_bias: torch.Tensor
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: SailerEnsembleConfig,
        members: Sequence[SailerForAudioClassification] = (),
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(config)
        if len(members) != len(config.members) or not members:
            raise ValueError(
                f"{len(members)} members for a configuration of {len(config.members)}: load an ensemble, or a list of "
                "systems, with SailerEnsemble.from_pretrained."
            )
        for index, (member, entry) in enumerate(zip(members, config.members, strict=True)):
            config.check_member(f"Member {index} ({entry['name']})", member.config, entry["heads"])
        self.members = nn.ModuleList()
        self.post_init()  # before there are members: it is for fresh weights
        self.members.extend(members)
        labels, number = len(config.labels), len(members)
        shapes: dict[str, tuple[int, ...]] = {"weights": (number,)}
        if config.combine == "stacked":
            shapes |= {"stack_weight": (labels, number * labels), "stack_bias": (labels,)}
        found = {"weights": torch.full((number,), 1 / number)} | dict(tensors or {})
        for name, shape in shapes.items():
            if name not in found or tuple(found[name].shape) != shape:
                raise ValueError(f"A {config.combine} ensemble of {number} needs the tensor {name} of shape {shape}.")
            self.register_buffer(name, found[name].float())
        if not ((self.weights >= 0) & self.weights.isfinite()).all() or not self.weights.sum() > 0:
            raise ValueError(f"weights are {self.weights.tolist()}: numbers from 0, and not all of them 0.")
        self.main_input_name = f"{members[0].main_input_name}_{config.members[0]['audio_input']}"
        self._hearing, self._reading = self._share("audio"), self._share("text")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        combine: str | None = None,
        weights: Sequence[float] | None = None,
        heads: str | Sequence[str] = "union",
        references: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load an ensemble, or make one of systems.

        Args:
            pretrained_model_name_or_path: folder or Hub id of an ensemble; or a list of folders and Hub ids
                ("user/name", "user/name@revision") of systems.
            combine, weights: of a list: how members are combined ("probabilities" or "logits"; a stacked ensemble is
                fitted, see `sailer.training.stacking`), and their shares.
            heads: of a list: "union" (the outputs that any member has; each is the mean over those that have it),
                "common" (those that all have), or names, each of which every member must have. The primary head is
                wanted of all members, or of none.
            references: of a list: members from the Hub are saved as their ids and commits, not as copies.
            config: that of a saved ensemble, where it was read before.
            kwargs: `dtype`, `attn_implementation`, `token`, `cache_dir`, ... as transformers'.

        Raises:
            OSError: no ensemble there, or a member gone from its place (the message names it).
            ValueError: a member of another kind, with other labels or without a head that is needed.
            TypeError: an unknown option.
        """
        located = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        options = {name: value for name, value in kwargs.items() if name in OF_A_MEMBER and value is not None}
        if kwargs.get("device_map") is not None:
            raise ValueError("device_map is not for ensembles: pass device= to the pipeline, or move the model.")
        unknown = set(kwargs) - {*HUB_OPTIONS, *OF_A_MEMBER, *OF_LOADERS, "device_map"}
        unknown = {name for name in unknown if not name.startswith("_")}
        if unknown:
            raise TypeError(f"SailerEnsemble.from_pretrained takes no {sorted(unknown)}.")
        source = pretrained_model_name_or_path
        if isinstance(source, (list, tuple)):
            return cls._of_systems(source, located, options, combine or COMBINE[0], weights, heads, references)
        if config is None:
            config = cls.config_class.from_pretrained(source, **located)
        members = [
            load_member(MEMBER_MODELS, source, index, member, located, options)
            for index, member in enumerate(config.members)
        ]
        places = {name: value for name, value in located.items() if name != "subfolder"}
        file: Any = cached_file(source, WEIGHTS_FILE, subfolder=located.get("subfolder") or "", **places)
        try:
            tensors = load_file(file)
        except Exception as error:
            raise ValueError(f"{file} cannot be read ({error}): it is damaged; get it again.") from error
        ensemble = cls(config, members, tensors).eval()
        ensemble.name_or_path = str(source)
        return ensemble

    @classmethod
    def _of_systems(
        cls,
        sources: Sequence[str | os.PathLike],
        located: Mapping[str, Any],
        options: Mapping[str, Any],
        combine: str,
        weights: Sequence[float] | None,
        heads: str | Sequence[str],
        references: bool,
    ) -> Self:
        if not sources:
            raise ValueError("An ensemble needs at least one member.")
        processor = SailerEnsembleProcessor.from_pretrained(sources, **located)
        members = []
        for index, source in enumerate(sources):
            place, there, _ = place_of(source, index)
            members.append(load_part(MEMBER_MODELS, place, {**located, **there}, options))
            if references and os.path.isdir(place):
                raise ValueError(f"{source} is a folder and cannot be kept as a reference: push it, or save a copy.")
            if references:
                revision = {**located, **there}.get("revision")
                commit = HfApi(token=located.get("token")).model_info(place, revision=revision).sha
                del processor.members[index]["subfolder"]
                processor.members[index] |= {"repo_id": place, "revision": commit}
        config = ensemble_config(members, processor, combine, heads)
        if weights is not None and len(weights) != len(members):
            raise ValueError(f"{len(weights)} weights for {len(members)} members: give one for each.")
        return cls(config, members, None if weights is None else {"weights": torch.tensor(weights)}).eval()

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Configuration, code and the members that have a subfolder, each of which is a system of its own."""
        push = take_push_options(save_directory, kwargs) if push_to_hub else None
        os.makedirs(save_directory, exist_ok=True)
        sizes = {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
        for entry, member in zip(self.config.members, self.members, strict=True):
            if "subfolder" in entry:
                folder = os.path.join(save_directory, entry["subfolder"])
                member.save_pretrained(folder, **sizes)
                drop_code(folder)
        self.config.architectures = [type(self).__name__]
        custom_object_save(self, save_directory, config=self.config)  # type: ignore[arg-type]  # as transformers does
        self.config.save_pretrained(save_directory)
        file = os.path.join(save_directory, WEIGHTS_FILE)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.named_buffers(recurse=False)}
        save_file(tensors, file, metadata={"format": "pt"})
        os.chmod(file, os.stat(os.path.join(save_directory, "config.json")).st_mode)  # as any file, not ours alone
        with open(os.path.join(save_directory, "requirements.txt"), "w", encoding="utf-8") as requirements:
            requirements.writelines(f"{requirement}\n" for requirement in REQUIREMENTS)
        if push is not None:
            self.push_to_hub(**push, token=kwargs.get("token"))

    @can_return_tuple
    def forward(
        self,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **inputs: torch.Tensor | None,
    ) -> SailerEnsembleOutput:
        """
        Args:
            labels: see `SailerForAudioClassification.forward`.
            output_hidden_states, output_attentions: not to be had.
            inputs: what `SailerEnsembleProcessor` returns.

        Raises:
            ValueError: an input is missing (the message names it), or an output cannot be had.
        """
        if output_hidden_states or output_attentions:
            raise ValueError("An ensemble gives no hidden states or attentions: ask its members for theirs.")
        given: list[dict[str, Any]] = [{} for _ in self.members]
        for group in self._hearing:
            first = self.members[group[0]]
            number = self.config.members[group[0]]["audio_input"]
            audio, mask = _take(inputs, first.main_input_name, number), _take(inputs, "attention_mask", number)
            if len(group) == 1:
                given[group[0]] |= {first.main_input_name: audio, "attention_mask": mask}
                continue
            weighted = [self.members[index].config.audio_layers != "last" for index in group]
            states, mask = first.sailer.audio_hidden_states(audio, mask, all_layers=any(weighted))
            for index, all_of_them in zip(group, weighted, strict=True):
                own = states if all_of_them or not any(weighted) else states[:, -1]
                given[index] |= {"audio_hidden_states": own, "attention_mask": mask}
        for group in self._reading:
            number = self.config.members[group[0]]["text_input"]
            ids, mask = _take(inputs, "input_ids", number), _take(inputs, "text_attention_mask", number)
            read: dict[str, Any] = {"input_ids": ids, "text_attention_mask": mask}
            if len(group) > 1:
                read = {"text_hidden_states": self.members[group[0]].sailer.text_hidden_states(ids, mask)}
            for index in group:
                given[index] |= read
        answers = [
            member(**own, output_hidden_states=False, return_dict=True)
            for member, own in zip(self.members, given, strict=True)
        ]
        outputs = self._combined(answers)
        if labels is not None and outputs.logits is not None:
            outputs["loss"] = plain_loss(outputs.logits, labels)
        return outputs

    def probabilities(self, logits: torch.Tensor, prior: str = "balanced") -> torch.Tensor:
        """Primary-emotion probabilities (batch, labels).

        Args:
            logits: `member_logits` (batch, members, labels) of the output; or its `logits` (batch, labels), which say
                enough for the balanced prior, and for a stacked ensemble's natural one.
            prior: "balanced" or "natural", see `SailerForAudioClassification.probabilities`: each member's own, then
                combined.

        Raises:
            ValueError: another prior, "natural" for a member whose weights are not known, or of `logits`.
        """
        if prior not in ("balanced", "natural"):
            raise ValueError(f"prior is {prior!r}; choose 'balanced' or 'natural'.")
        if prior == "balanced" or self.config.combine == "stacked":
            combined = self.combine_logits(logits) if logits.ndim == 3 else logits.float()
            if prior == "natural" and self.config.label_weights is not None:
                weights = torch.tensor(self.config.label_weights, device=logits.device)
                combined = torch.where(weights > 0, combined - weights.clamp(min=LEAST).log(), -torch.inf)
                combined = combined / self.config.calibration_temperature
            return combined.softmax(-1)
        if logits.ndim != 3:
            raise ValueError("prior='natural' needs what each member says: pass outputs.member_logits.")
        own = [self.members[index].probabilities(logits[:, row], prior) for row, index in enumerate(self._primary())]
        combined = self.combine_logits(torch.stack(own, dim=1).clamp(min=LEAST).log())
        return (combined / self.config.calibration_temperature).softmax(-1)

    def combine_logits(self, member_logits: torch.Tensor) -> torch.Tensor:
        """(batch, members, labels) -> (batch, labels), whose softmax is the ensemble's probabilities."""
        member_logits = member_logits.float()
        if self.config.combine == "stacked":
            return nn.functional.linear(member_logits.log_softmax(-1).flatten(1), self.stack_weight, self.stack_bias)
        shares = self.weights[self._primary()]
        shares = shares / shares.sum()
        if self.config.combine == "logits":
            return torch.einsum("m,bml->bl", shares, member_logits)
        return torch.einsum("m,bml->bl", shares, member_logits.softmax(-1)).clamp(min=LEAST).log()

    def _primary(self) -> list[int]:
        return self.config.having("primary")

    def _combined(self, answers: Sequence[Any]) -> SailerEnsembleOutput:
        values: dict[str, Any] = {}
        for name, head in HEAD_OF_OUTPUT.items():
            if head not in self.config.heads:
                continue
            given: list[Any] = [answers[index][name] for index in self.config.having(head)]
            stacked = torch.stack(given, dim=1).float()
            values[f"member_{name}"] = stacked
            if name == "logits":
                values[name] = self.combine_logits(stacked)
            elif name.endswith("logits") and self.config.combine != "logits":
                values[name] = stacked.softmax(-1).mean(dim=1).clamp(min=LEAST).log()
            else:
                values[name] = stacked.mean(dim=1)
        embeddings = torch.cat([answer.embeddings for answer in answers], dim=-1)
        return SailerEnsembleOutput(**values, embeddings=embeddings)

    def _share(self, tower: str) -> list[list[int]]:
        """Positions of members whose towers are equal and have the same input, put together; they share the first."""
        groups: dict[Any, list[int]] = {}
        digests: dict[int, str] = {}
        name = f"{tower}_encoder"
        for index, (member, entry) in enumerate(zip(self.members, self.config.members, strict=True)):
            encoder = getattr(member.sailer, name)
            if encoder is None:
                continue
            shapes = tuple((key, tuple(value.shape)) for key, value in encoder.state_dict().items())
            alike: tuple[Any, ...] = (entry[f"{tower}_input"], shapes, encoder.config.model_type)
            if tower == "audio":
                # An adapter follows the last layer alone: there a last state is not among the layers'.
                adapted = getattr(encoder.config, "add_adapter", False) or encoder.config.model_type in RESAMPLED
                alike += (member.config.attend_to_padding, adapted and member.config.audio_layers)
            same = groups.setdefault(alike, [])
            same.append(index)
        found: list[list[int]] = []
        for same in groups.values():
            by_weights: dict[str, list[int]] = {}
            for index in same:
                encoder = getattr(self.members[index].sailer, name)
                digests[index] = digest(encoder.state_dict()) if len(same) > 1 else ""
                by_weights.setdefault(digests[index], []).append(index)
            found += by_weights.values()
        for group in found:
            for index in group[1:]:
                setattr(self.members[index].sailer, name, getattr(self.members[group[0]].sailer, name))
        return found


def load_system(source: str | os.PathLike, **options: Any) -> tuple[Any, Any]:
    """A saved system or ensemble, and its processor, by the `model_type` of its config.json.

    Args:
        source: folder or Hub id.
        options: as `SailerForAudioClassification.from_pretrained` takes them.

    Raises:
        OSError, ValueError: it is not there, or of another kind.
    """
    located = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    options = {name: value for name, value in options.items() if name not in HUB_OPTIONS}
    kind = SailerEnsembleConfig.model_type
    return (
        load_part(MEMBER_MODELS | {kind: SailerEnsemble}, source, located, options),
        load_part(MEMBER_PROCESSORS | {kind: SailerEnsembleProcessor}, source, located),
    )


def ensemble_config(
    members: Sequence[SailerForAudioClassification],
    processor: SailerEnsembleProcessor,
    combine: str = "probabilities",
    heads: str | Sequence[str] = "union",
) -> SailerEnsembleConfig:
    """What systems have in common; `processor.members` gets each one's heads. See `SailerEnsemble.from_pretrained`.

    Raises:
        ValueError: a head that is needed and not there; the message names the member.
    """
    configs = [member.config for member in members]
    kept = _common_heads(configs, processor.members, heads)
    for entry, own in zip(processor.members, configs, strict=True):
        entry["heads"] = [head for head in own.heads if head in kept]
    readers = [own.text_dropout for own in configs if own.text_config is not None]
    first = {head: next((own for own in configs if head in own.heads), configs[0]) for head in HEADS}
    return SailerEnsembleConfig(
        processor.members,
        combine,
        heads=kept,
        labels=configs[0].labels,
        majority_labels=configs[0].majority_labels,
        scored_labels=configs[0].scored_labels,
        secondary_labels=first["secondary"].secondary_labels,
        sex_labels=first["sex"].sex_labels,
        max_seconds=min(own.max_seconds for own in configs),
        sampling_rate=processor.sampling_rate,
        text_dropout=min(readers, default=0.0),
    )


def _common_heads(
    configs: Sequence[SailerConfig], entries: Sequence[Mapping[str, Any]], heads: str | Sequence[str]
) -> list[str]:
    if heads == "union":
        kept = [head for head in HEADS if any(head in config.heads for config in configs)]
        needed = ["primary"] * ("primary" in kept)
    elif heads == "common":
        kept = [head for head in HEADS if all(head in config.heads for config in configs)]
        needed = []
    elif isinstance(heads, str):
        raise ValueError(f"heads is {heads!r}; choose 'union', 'common' or a list of {list(HEADS)}.")
    else:
        kept = needed = [head for head in HEADS if head in heads]
        if len(kept) != len(set(heads)):
            raise ValueError(f"heads is {list(heads)}; choose of {list(HEADS)}.")
    for config, entry in zip(configs, entries, strict=True):
        for head in needed:
            if head not in config.heads:
                what = "predicts no primary emotions" if head == "primary" else f"has no {head} head"
                raise ValueError(f"{entry['name']} {what}, which the ensemble needs: it has only {config.heads}.")
    if not kept:
        raise ValueError(f"The members have no head in common: {[config.heads for config in configs]}.")
    return kept


def _take(inputs: Mapping[str, torch.Tensor | None], name: str, number: int) -> torch.Tensor:
    value = inputs.get(f"{name}_{number}")
    if value is None:
        raise ValueError(f"This ensemble needs {name}_{number} (its SailerEnsembleProcessor makes it).")
    return value


SailerEnsemble.register_for_auto_class("AutoModelForAudioClassification")

__all__ = ["SailerEnsemble", "ensemble_config", "load_system"]
