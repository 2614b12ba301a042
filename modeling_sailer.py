"""The SAILER model: two towers, a pooled projection of the speech, and one MLP per output (paper, section 2)."""

from __future__ import annotations

import difflib
import inspect
import os
import shutil
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .adapters_sailer import HUB_OPTIONS, PEFT, LoraTowers, add_lora, lora_of, lora_parts, place_of_backbone, trains
from .configuration_sailer import ATTRIBUTES, REQUIREMENTS, SailerConfig, take_push_options
from .discriminant_sailer import LinearDiscriminant, pool_opinions
from .encoders_sailer import (
    all_hidden_states,
    build_encoder,
    check_speech_encoder,
    encode_audio,
    keep_layers,
    load_encoder,
    speech_width,
    text_mask,
    transformer_layers,
)
from .layers_sailer import (
    AudioProjection,
    FrameNorm,
    LayerWeights,
    PredictionHead,
    SailerClassifierOutput,
    SailerModelOutput,
    SpeakerReference,
    join_layers,
    label_probabilities,
    masked_mean,
    plain_loss,
    pool_frames,
)
from .linear_sailer import tower_kernels
from .pipeline_sailer import SpeechEmotionPipeline  # noqa: F401 - so that save_pretrained takes the file along

logger = logging.get_logger(__name__)

# Targets of the auxiliary heads: the loss over them is the training objective's.
AUXILIARY_LABELS = ("secondary_labels", "attribute_labels", "sex_labels", "age_labels")
CENTURY = 100.0  # the age head's sigmoid spans 0 to 100 years


class SailerPreTrainedModel(LoraTowers, PreTrainedModel):
    """What both models share: how they are loaded (from safetensors alone), saved and frozen, and LoRA."""

    config: SailerConfig
    config_class = SailerConfig
    base_model_prefix = "sailer"
    input_modalities = ["audio", "text"]  # noqa: RUF012 - transformers' own form
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch, whatever else a Trainer passes
    _supports_sdpa = True
    _supports_flash_attn = True

    def _init_weights(self, module: nn.Module) -> None:
        # The towers initialise themselves; PyTorch's own initialisation of the head is the authors'.
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            module.reset_parameters()
        elif isinstance(module, LayerWeights):
            nn.init.zeros_(module.weight)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Self:
        """As transformers', from safetensors only: a pickle can run code when it is loaded, and is refused.

        Heads that the checkpoint's own configuration does not have (`heads=[...]`) start afresh, which a warning says.
        A system that was saved as adapters gets its frozen towers from where they were (`backbones`), and needs peft.

        Raises:
            OSError: there is no model.safetensors.
            ValueError: it is truncated or damaged, or lacks tensors (unless `output_loading_info` lists them); or a
                backbone of adapters cannot be loaded, or is another.
        """
        kwargs |= {"use_safetensors": True, "output_loading_info": True}
        source = pretrained_model_name_or_path
        try:
            loaded: Any = super().from_pretrained(source, *args, **kwargs)
        except OSError as error:
            if "model.safetensors" not in str(error):
                raise
            raise OSError(f"{error} Pickled weights are refused: loading a pickle can run code.") from error
        except Exception as error:
            if type(error).__name__ != "SafetensorError":  # its own module is not a Hub file's to import
                raise
            raise ValueError(
                f"The weights of {source} cannot be read ({error}): the file is truncated or damaged; get it again."
            ) from error
        model, report = loaded
        if report["missing_keys"] and not output_loading_info:
            fresh = cls._new_heads(model, source, kwargs)
            lost = sorted(key for key in report["missing_keys"] if not key.startswith(tuple(fresh)))
            if lost:
                raise ValueError(f"The weights of {source} lack {lost[:5]}; get the whole file.")
            logger.warning("%s has no heads for %s: they start afresh and want training.", source, ", ".join(fresh))
        model.freeze_towers()  # loading makes new parameters, which want gradients
        return loaded if output_loading_info else model

    @classmethod
    def _new_heads(cls, model: PreTrainedModel, source: Any, options: dict[str, Any]) -> list[str]:
        """Prefixes of the tensors of those heads that the checkpoint at `source` was saved without."""
        located = {name: value for name, value in options.items() if name in HUB_OPTIONS}
        saved = cls.config_class.get_config_dict(source, **located)[0]
        before = cls.config_class(**saved).heads
        heads = [head for head in model.config.heads if head not in before]
        return [f"heads.{name}." for head in heads for name in (ATTRIBUTES if head == "attributes" else [head])]

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embeddings.

        Raises:
            NotImplementedError: a speech-only system has none.
        """
        base: Any = getattr(self, "sailer", self)
        text_encoder: PreTrainedModel | None = base.text_encoder
        if text_encoder is None:
            raise NotImplementedError("This is a speech-only system: it embeds no tokens.")
        return text_encoder.get_input_embeddings()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', with a requirements.txt of what loading takes. The weights get the permissions of the
        configuration beside them (safetensors writes files that nobody else can read).

        A system with LoRA is saved as adapters: what is trained, and where the frozen encoders are. `merge_lora` first
        saves all of it."""
        push = take_push_options(save_directory, kwargs) if kwargs.pop("push_to_hub", False) else None
        super().save_pretrained(save_directory, *args, **kwargs)
        with open(os.path.join(save_directory, "requirements.txt"), "w", encoding="utf-8") as file:
            wanted = (*REQUIREMENTS, *[PEFT] * bool(lora_of(self.config)))
            file.writelines(f"{requirement}\n" for requirement in wanted)
        usual = os.path.join(save_directory, "config.json")
        for name in os.listdir(save_directory):
            if name.endswith(".safetensors") and os.path.isfile(usual):
                shutil.copymode(usual, os.path.join(save_directory, name))
        if push is not None:
            self.push_to_hub(**push, token=kwargs.get("token"))


class SailerModel(SailerPreTrainedModel):
    """
    The towers and their fusion: audio (and transcript) -> one embedding per clip.

    Args:
        config: the system's configuration.
        audio_encoder, text_encoder: loaded towers; built from the configuration by default.

    Raises:
        ValueError: the configuration has no speech encoder, or one that cannot be used (the message says why).
    """

    def __init__(
        self,
        config: SailerConfig,
        audio_encoder: PreTrainedModel | None = None,
        text_encoder: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        if config.audio_config is None:
            raise ValueError("The configuration has no audio_config: a SAILER system needs a speech encoder.")
        check_speech_encoder(config.audio_config, config.audio_layers)
        self.audio_encoder = audio_encoder or build_encoder(config.audio_config)
        self.main_input_name = self.audio_encoder.main_input_name
        width = speech_width(config.audio_config, config.audio_layers)
        if config.audio_layers != "last":
            keep_layers(self.audio_encoder)
            self.audio_layer_weights, width = join_layers(config, width)
        if config.frame_norm:
            self.audio_frame_norm = FrameNorm(width)
        if config.speaker_reference:
            self.speaker_reference = SpeakerReference(width, len(config.labels))
        self.audio_projection = AudioProjection(width, config.hidden_size, config.conv_dropout)
        self.text_encoder: PreTrainedModel | None = None
        if config.text_config is not None:
            self.text_encoder = text_encoder or build_encoder(config.text_config)
            self.text_layer_weights = LayerWeights(config.text_config.num_hidden_layers + 1)
        for tower, lora in lora_of(config).items():
            add_lora(getattr(self, f"{tower}_encoder"), tower, lora)
        self.freeze_towers()
        self.post_init()

    @property
    def embedding_size(self) -> int:
        """Width of the fused embedding."""
        return self.config.hidden_size + getattr(self.config.text_config, "hidden_size", 0)

    def train(self, mode: bool = True) -> SailerModel:
        """What is frozen of the towers stays in eval mode: no dropout, no SpecAugment. So does the audio tower's batch
        normalisation, which would otherwise see the few clips of one length that are encoded together."""
        super().train(mode)
        for module in self.audio_encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        for tower, trained in self.frozen_towers():
            tower.eval()
            for layer in trained:
                layer.train(mode)
        return self

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
        pooled_hidden_states: torch.Tensor | None = None,
        text_hidden_states: torch.Tensor | None = None,
        speaker_shift: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> SailerModelOutput:
        """
        Args:
            input_features: float; (batch, mels, frames) for Whisper, (batch, frames, width) for others; or
            input_values: (batch, samples) float, for raw-waveform encoders.
            attention_mask: (batch, frames or samples), 1 on the clip's own; see `encode_audio`.
            input_ids, text_attention_mask: (batch, tokens); a mask row of zeros means no transcript, whose embedding
                is zero.
            audio_hidden_states: the audio tower's output instead of its input, (batch, frames, width), or (batch,
                layers, frames, width) where layers are weighted; `attention_mask` is then over these frames.
            pooled_hidden_states: what `pool_states` makes of them, (batch, [layers,] groups, width); `attention_mask`
                is then how many of a clip's frames each group holds.
            text_hidden_states: (batch, layers, width), means over each transcript's tokens, instead of input_ids.
            speaker_shift: (batch, width), taken off each clip's speech frames (`SpeakerReference.shift`).
            output_hidden_states: also return the speech encoder's hidden states; the configuration's by default.
            return_dict: False returns a tuple.

        Raises:
            ValueError: the audio input that this tower needs is missing, a mask that is needed is missing or does not
                fit, input_ids without a text tower, or hidden states that are asked for where they were not passed.
        """
        weighted = self.config.audio_layers != "last"
        collect = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        is_pooled = pooled_hidden_states is not None
        states, mask, layers = pooled_hidden_states if is_pooled else audio_hidden_states, attention_mask, None
        if states is None:
            audio = input_features if self.main_input_name == "input_features" else input_values
            if audio is None:
                raise ValueError(f"This system needs {self.main_input_name} (or audio_hidden_states).")
            states, mask = self.audio_hidden_states(audio, attention_mask)
            if collect and not weighted:  # in a second pass: an adapter's output is not among the layers
                layers, _ = self.audio_hidden_states(audio, attention_mask, all_layers=True)
        elif collect and (is_pooled or not weighted):
            raise ValueError("output_hidden_states needs the audio: what is passed holds no layer's frames.")
        hidden_states = (states if layers is None else layers).unbind(1) if collect else None
        dtype = next(self.audio_projection.parameters()).dtype
        states = states.to(dtype)
        if weighted:
            states = self.audio_layer_weights(states, is_normalized=is_pooled)
        if mask is None:
            mask = states.new_ones(states.shape[:2], dtype=torch.long)
        if self.config.frame_pooling > 1 and not is_pooled:
            states, mask = pool_frames(states, mask, self.config.frame_pooling)
        speech_means = masked_mean(states, mask)
        states = states if speaker_shift is None else states - speaker_shift.to(states).unsqueeze(1)
        if self.config.frame_norm:
            states = self.audio_frame_norm(states, mask)
        projected = self.audio_projection(states.transpose(1, 2)).transpose(1, 2)
        embeddings = masked_mean(projected, mask)

        if self.text_encoder is not None:
            if text_hidden_states is None:
                if input_ids is None:
                    raise ValueError("This system has a text tower: pass input_ids (the processor makes them).")
                text_hidden_states = self.text_hidden_states(input_ids, text_attention_mask)
            text = self.text_layer_weights(text_hidden_states.to(dtype))
            embeddings = torch.cat([embeddings, text], dim=-1)
        elif input_ids is not None or text_hidden_states is not None:
            raise ValueError("This is a speech-only system: it takes no input_ids.")
        return SailerModelOutput(embeddings=embeddings, hidden_states=hidden_states, speech_means=speech_means)

    def audio_hidden_states(
        self, audio: torch.Tensor, attention_mask: torch.Tensor | None = None, all_layers: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The audio tower's part, which a frozen system may compute once per clip.

        Args:
            audio: input_features or input_values.
            attention_mask: over the frames or samples of `audio`.
            all_layers: every layer's states; by default where layers are weighted.

        Returns:
            states (batch, frames, width), or (batch, layers, frames, width) of all layers; and the mask (batch,
            frames) of each clip's own frames.
        """
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.config, "audio")),
            tower_kernels(self.config.onednn_linear, self.audio_encoder),
        ):
            return encode_audio(
                self.audio_encoder,
                audio,
                attention_mask,
                all_layers=self.config.audio_layers != "last" if all_layers is None else all_layers,
                attend_to_padding=self.config.attend_to_padding,
            )

    def text_hidden_states(self, input_ids: torch.Tensor, text_attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Every layer's mean over the transcript's own tokens, (batch, layers, width); zero where there is none."""
        assert self.text_encoder is not None, "a speech-only system has no text tower"
        if text_attention_mask is None:
            text_attention_mask = torch.ones_like(input_ids)
        is_empty = text_attention_mask.sum(1, keepdim=True) == 0
        # Attention over nothing would be NaN.
        visible = text_mask(self.text_encoder, text_attention_mask.masked_fill(is_empty, 1))
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and trains(self.config, "text")),
            tower_kernels(self.config.onednn_linear, self.text_encoder),
        ):
            outputs = self.text_encoder(input_ids=input_ids, attention_mask=visible, output_hidden_states=True)
            states = all_hidden_states(outputs)
            return masked_mean(states, text_attention_mask.unsqueeze(1))

    def frozen_towers(self) -> list[tuple[nn.Module, list[nn.Module]]]:
        """Towers that stay as they were loaded, each with those of its layers that are trained nevertheless."""
        config = self.config
        frozen: list[tuple[nn.Module, list[nn.Module]]] = []
        if config.freeze_audio:
            frozen.append((self.audio_encoder, lora_parts(self.audio_encoder)))
        elif config.trainable_audio_layers is not None:
            layers = list(transformer_layers(self.audio_encoder))
            frozen.append((self.audio_encoder, layers[-config.trainable_audio_layers :]))
        if config.freeze_text and self.text_encoder is not None:
            frozen.append((self.text_encoder, lora_parts(self.text_encoder)))
        return frozen


class SailerForAudioClassification(SailerPreTrainedModel):
    """
    SAILER with its heads: primary emotion, secondary emotions, attributes, speaker sex and age, as configured.

    Arguments are those of `SailerModel`.
    """

    def __init__(
        self,
        config: SailerConfig,
        audio_encoder: PreTrainedModel | None = None,
        text_encoder: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        config.check_labels()
        self.sailer = SailerModel(config, audio_encoder, text_encoder)
        self.main_input_name = self.sailer.main_input_name
        outputs = {"primary": len(config.labels), "secondary": len(config.secondary_labels), "sex": 2, "age": 1}
        sizes = {head: outputs[head] for head in config.heads if head in outputs}
        if "attributes" in config.heads:
            sizes |= dict.fromkeys(ATTRIBUTES, 1)
        width = self.sailer.embedding_size
        heads = {name: PredictionHead(width, config.hidden_size, size) for name, size in sizes.items()}
        self.heads = nn.ModuleDict(heads)
        if config.discriminant_share:
            speech_width = next(self.sailer.audio_projection.parameters()).shape[1]
            self.discriminant = LinearDiscriminant(speech_width, len(config.labels))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        audio_hidden_states: torch.Tensor | None = None,
        pooled_hidden_states: torch.Tensor | None = None,
        text_hidden_states: torch.Tensor | None = None,
        mixup_permutation: torch.Tensor | None = None,
        mixup_lambda: torch.Tensor | None = None,
        speaker_shift: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **auxiliary_targets: torch.Tensor | None,
    ) -> SailerClassifierOutput:
        """
        Args:
            input_features, input_values, attention_mask, input_ids, text_attention_mask, audio_hidden_states,
                pooled_hidden_states, text_hidden_states, speaker_shift, output_hidden_states, return_dict: see
                `SailerModel.forward`.
            labels: (batch, labels) float distributions of primary votes, a row with NaN is unknown; or (batch,) class
                ids, -100 is unknown.
            mixup_permutation, mixup_lambda: (batch,) each: the embedding of clip i becomes lambda_i * e_i +
                (1 - lambda_i) * e_permutation(i) (manifold mixup, https://arxiv.org/abs/1806.05236).
            output_attentions: not to be had: the towers' fast attention keeps none.
            auxiliary_targets: secondary_labels, attribute_labels, sex_labels and age_labels are taken so that any
                Trainer may pass them; the training objective over them is `sailer.training.losses.SailerObjective`.

        Returns:
            `SailerClassifierOutput`; outputs without a head are None.

        Raises:
            ValueError: labels of another shape or outside the classes, or an output that cannot be had.
            TypeError: an unknown argument (the message names the nearest).
        """
        for name in set(auxiliary_targets).difference(AUXILIARY_LABELS):
            known = (*inspect.signature(type(self).forward).parameters, *AUXILIARY_LABELS)
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"Unknown argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        if output_attentions:
            raise ValueError("output_attentions is not supported: call model.sailer.audio_encoder for its attentions.")
        fused = self.sailer(
            input_features=input_features,
            input_values=input_values,
            attention_mask=attention_mask,
            input_ids=input_ids,
            text_attention_mask=text_attention_mask,
            audio_hidden_states=audio_hidden_states,
            pooled_hidden_states=pooled_hidden_states,
            text_hidden_states=text_hidden_states,
            speaker_shift=speaker_shift,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        embeddings = fused.embeddings
        if mixup_permutation is not None and mixup_lambda is not None:
            share = mixup_lambda.to(embeddings.dtype).unsqueeze(1)
            embeddings = share * embeddings + (1 - share) * embeddings[mixup_permutation]

        outputs = {name: head(embeddings) for name, head in self.heads.items()}
        attributes = age = None
        if "attributes" in self.config.heads:
            attributes = torch.cat([outputs[name] for name in ATTRIBUTES], dim=-1).sigmoid()
        if "age" in outputs:
            age = CENTURY * outputs["age"].squeeze(-1).sigmoid()
        logits = pool_opinions(self, outputs.get("primary"), fused.speech_means, speaker_shift)
        loss = None if labels is None or logits is None else plain_loss(logits, labels)
        return SailerClassifierOutput(
            loss=loss,
            logits=logits,
            secondary_logits=outputs.get("secondary"),
            attributes=attributes,
            sex_logits=outputs.get("sex"),
            age=age,
            embeddings=embeddings,
            hidden_states=fused.hidden_states,
            speech_means=fused.speech_means,
        )

    def probabilities(self, logits: torch.Tensor, prior: str = "balanced") -> torch.Tensor:
        """Primary-emotion probabilities.

        Args:
            logits: (batch, labels).
            prior: "balanced": softmax(logits), which suits a class-balanced test set. "natural": the training weights
                are divided out, softmax((logits - log w) / T), which estimates the annotators' distribution; a class
                that training never saw gets 0.

        Raises:
            ValueError: another prior, or "natural" for a system whose weights are not known.
        """
        return label_probabilities(self.config, logits, prior)

    @classmethod
    def from_audio_text_pretrained(
        cls,
        audio: str | os.PathLike,
        text: str | os.PathLike | None = None,
        attn_implementation: str | None = None,
        **config_kwargs: Any,
    ) -> Self:
        """Build a new system from pre-trained backbones; the heads are freshly initialised.

        Args:
            audio: Hub id or folder of a speech encoder. Of a full Whisper checkpoint only the encoder is loaded.
            text: Hub id or folder of a text encoder; `None` for a speech-only system.
            attn_implementation: of both towers, as in transformers.
            config_kwargs: options of `SailerConfig`.

        Raises:
            ValueError: a backbone cannot be loaded, any tensor of an encoder is not in its checkpoint (the message
                names the tensors), or `audio` is no speech encoder that can be used (the message says why).
        """
        audio_encoder = load_encoder(audio, attn_implementation, config_kwargs.get("audio_layers", "last"))
        text_encoder = None if text is None else load_encoder(text, attn_implementation)
        text_config = None if text_encoder is None else text_encoder.config
        config = SailerConfig(audio_config=audio_encoder.config, text_config=text_config, **config_kwargs)
        if lora_of(config):
            places = {"audio": audio} | ({} if text is None else {"text": text})
            config.backbones = {tower: place_of_backbone(place) for tower, place in places.items()}
        return cls(config, audio_encoder, text_encoder)


SailerModel.register_for_auto_class("AutoModel")
SailerForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = ["SailerForAudioClassification", "SailerModel", "SailerPreTrainedModel"]
