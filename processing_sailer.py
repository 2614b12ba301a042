"""SailerProcessor: waveforms and transcripts in, padded model inputs with masks out."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, BatchFeature, PretrainedConfig, ProcessorMixin, WhisperFeatureExtractor
from transformers.utils import logging

from .audio_sailer import MINIMUM_SECONDS, load_audio, trim_silence
from .configuration_sailer import HUB_OPTIONS, load_member, load_part, place_of, take_push_options

logger = logging.get_logger(__name__)

# The log-mel's last frames see what follows the clip (an STFT window, then two convolutions of width 3): two more
# hops of silence make that the same whether the clip is alone or beside a longer one.
TAIL_HOPS = 2
# Whisper's log-mel: powers below the first count as that, and what is further below the loudest than the second, in
# decades, as that far.
LOWEST_POWER, DYNAMIC_RANGE = 1e-10, 8.0
AUDIO_PADDING = ("longest", "max_length")

_filters: WeakKeyDictionary[Any, tuple[np.ndarray, dict[torch.device, torch.Tensor]]] = WeakKeyDictionary()


class SailerProcessor(ProcessorMixin):
    """
    Joins a feature extractor and, for systems with a text tower, a tokenizer.

    Args:
        feature_extractor: of the audio backbone (log-mel as Whisper's, or raw-waveform as WavLM's). The processor
            keeps and saves a copy that returns the mask unasked, so that it serves the model by itself too.
        tokenizer: of the text backbone; `None` for a speech-only system.
        audio_padding: `"longest"` pads a batch to its longest clip. `"max_length"` cuts or pads every clip to the
            extractor's own length, as the authors' released models do (their configs set `attend_to_padding`).
        trim_silence: in dB: silence before and behind a clip's speech, so much below its loudest moment, is not heard
            (`audio_sailer.trim_silence`). `None` leaves it.

    Raises:
        ValueError: unknown `audio_padding`, or `trim_silence` is no number above 0.
    """

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any = None,
        audio_padding: str = "longest",
        trim_silence: float | None = None,
    ) -> None:
        if audio_padding not in AUDIO_PADDING:
            raise ValueError(f"audio_padding is {audio_padding!r}; choose one of {list(AUDIO_PADDING)}.")
        if trim_silence is not None and not (_is_number(trim_silence) and 0 < trim_silence < math.inf):
            raise ValueError(f"trim_silence is {trim_silence!r}; give decibels above 0, or None to leave silence.")
        super().__init__(feature_extractor)
        self.feature_extractor = copy.copy(feature_extractor)
        self.feature_extractor.return_attention_mask = True
        self.tokenizer = tokenizer
        self.audio_padding = audio_padding
        self.trim_silence = trim_silence

    def __call__(
        self,
        audio: Any = None,
        text: str | Sequence[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        device: str | torch.device = "cpu",
        padding: bool | str = True,
        return_attention_mask: bool = True,
    ) -> BatchFeature:
        """
        Args:
            audio: one waveform of shape (samples,) or (channels, samples), or anything else that `load_audio` reads (a
                path, a URL, bytes, `{"array", "sampling_rate"}`), or a list of them.
            text: the transcript(s), one per waveform; "" where there is none.
            sampling_rate: of the waveforms, in Hz; other rates than the extractor's are resampled. Files and dicts
                have their own.
            return_tensors: "pt" or "np".
            device: where log-mel features are computed.
            padding, return_attention_mask: taken because stock code passes them. A batch is padded as `audio_padding`
                says and always has its mask, without which padding would change the results.

        Returns:
            `input_features` (batch, mels, frames) for Whisper and (batch, frames, width) for others, or `input_values`
            (batch, samples); `attention_mask` over the same frames or samples; with a tokenizer `input_ids` and
            `text_attention_mask` (batch, tokens), all zero for a clip without transcript.

        Raises:
            ValueError: no audio, a waveform that is empty, shorter than 0.1 s or not finite, a transcript that is not
                a string, another number of transcripts than of waveforms (the message names the position), another
                padding than the processor's or none, or a feature extractor that gives no attention_mask.
        """
        if padding not in (True, self.audio_padding):
            raise ValueError(f"padding is {padding!r}; this processor pads to the {self.audio_padding}: leave it out.")
        if not return_attention_mask:
            raise ValueError("return_attention_mask is False, but without the mask padding would count as speech.")
        if audio is None:
            raise ValueError("No audio: pass audio=waveform or a list of waveforms.")
        clips, is_rate_known = self._waveforms(audio, sampling_rate)
        clips = self._speech(clips)
        if self.makes_log_mel:
            data = self._log_mel_inputs(clips, is_rate_known, device)
        else:  # without a rate the extractor warns
            data = self._one_by_one(clips, self.sampling_rate if is_rate_known else None)
        if self.tokenizer is not None:
            data |= self.tokenize(text, len(clips))
        elif text is not None:
            raise ValueError("This is a speech-only system: its processor has no tokenizer, so leave text out.")
        return BatchFeature({name: torch.as_tensor(value) for name, value in data.items()}).convert_to_tensors(
            return_tensors
        )

    @property
    def sampling_rate(self) -> int:
        """The extractor's sampling rate in Hz."""
        return self.feature_extractor.sampling_rate

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        names = [self.feature_extractor.model_input_names[0], "attention_mask"]
        return names + (["input_ids", "text_attention_mask"] if self.tokenizer is not None else [])

    # The tokenizer is optional, which ProcessorMixin's own bookkeeping does not allow: it is kept beside it.
    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["feature_extractor"]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        # Whoever trusts this folder's processor trusts our code: parts of it come from known classes alone.
        kwargs["trust_remote_code"] = False
        try:
            arguments = super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)
            if (processor_dict or {}).get("uses_text"):
                # The tokenizer's own file names its class: a bare configuration keeps it from asking to run ours.
                kwargs["config"] = PretrainedConfig()
                arguments.append(AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs))
        except ValueError as error:
            raise ValueError(
                f"The feature extractor or tokenizer of {pretrained_model_name_or_path} is of no class known to "
                f"transformers; code of its own is not run: {error}"
            ) from error
        return arguments

    def to_dict(self) -> dict[str, Any]:
        without = copy.copy(self)  # reading must change nothing: other threads use this processor
        del without.tokenizer
        return super(SailerProcessor, without).to_dict() | {"uses_text": self.tokenizer is not None}

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As transformers', the tokenizer with it; `push_to_hub=True` uploads all of it."""
        push = take_push_options(save_directory, kwargs) if push_to_hub else None
        files: list[str] = []
        if self.tokenizer is not None:
            # Recorded by a tokenizer that was loaded offline; it would keep others from the Hub.
            self.tokenizer.init_kwargs.pop("local_files_only", None)
            files += self.tokenizer.save_pretrained(save_directory)
        files += super().save_pretrained(save_directory, **kwargs)
        if push is not None:
            self.push_to_hub(**push, token=kwargs.get("token"))
        return files

    def _waveforms(self, audio: Any, sampling_rate: int | None) -> tuple[list[np.ndarray], bool]:
        """The clips at the extractor's rate, and whether each one's own rate was told."""
        is_list = isinstance(audio, (list, tuple)) and len(audio) > 0 and not _is_number(audio[0])
        clips = list(audio) if is_list else [audio]
        rate = self.sampling_rate if sampling_rate is None else sampling_rate
        waveforms, is_rate_known = [], True
        for position, clip in enumerate(clips):
            name = f"clip {position} of {len(clips)}"
            if isinstance(clip, (str, os.PathLike)):
                name += f" ({os.fspath(clip)})"
            elif not isinstance(clip, (Mapping, bytes, bytearray, memoryview)):
                clip = {"array": clip, "sampling_rate": rate}
                is_rate_known = sampling_rate is not None
            waveform = load_audio(clip, self.sampling_rate, name=name)
            seconds = len(waveform) / self.sampling_rate
            if seconds < MINIMUM_SECONDS:
                raise ValueError(
                    f"{name} is {1000 * seconds:.0f} ms long; at least {1000 * MINIMUM_SECONDS:.0f} ms are needed."
                )
            waveforms.append(waveform)
        return waveforms, is_rate_known

    def waveforms(self, audio: Any, sampling_rate: int | None = None) -> dict[str, torch.Tensor]:
        """What `log_mel` takes, for features that are computed later and elsewhere, such as on a GPU.

        Args:
            audio, sampling_rate: see `__call__`.

        Returns:
            `waveforms` (batch, samples), float32, silent behind each clip; and `attention_mask` (batch, frames) over
            the log-mel frames that they give.

        Raises:
            ValueError: a clip that cannot be used, or a feature extractor that makes no log-mel features as Whisper's.
        """
        if not self.makes_log_mel:
            raise ValueError(f"{type(self.feature_extractor).__name__} makes no log-mel: call the processor itself.")
        clips, is_rate_known = self._waveforms(audio, sampling_rate)
        return self._padded(self._speech(clips), is_rate_known)

    def _speech(self, clips: list[np.ndarray]) -> list[np.ndarray]:
        if self.trim_silence is None:
            return clips
        return [trim_silence(clip, self.sampling_rate, self.trim_silence) for clip in clips]

    @property
    def makes_log_mel(self) -> bool:
        """Whether the model's inputs are log-mel features as Whisper's."""
        return isinstance(self.feature_extractor, WhisperFeatureExtractor)

    def log_mel(self, waveforms: torch.Tensor, device: str | torch.device | None = None) -> torch.Tensor:
        """Log-mel features as Whisper's extractor makes them (https://arxiv.org/abs/2212.04356, section 2.2), on a
        device or the waveforms' own: (batch, samples) -> (batch, mels, samples // hop length)."""
        extractor = self.feature_extractor
        waveforms = waveforms if device is None else waveforms.to(device)
        device = waveforms.device
        if extractor.dither:
            waveforms = waveforms + extractor.dither * torch.randn_like(waveforms)
        window = torch.hann_window(extractor.n_fft, device=device)
        spectrum = torch.stft(waveforms, extractor.n_fft, extractor.hop_length, window=window, return_complex=True)
        spectrum = spectrum[..., :-1]
        # Not the squared magnitude, which takes four times as long to guard against an overflow that cannot be.
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        decades = (_mel_filters(extractor, device).T @ power).clamp_(min=LOWEST_POWER).log10_()
        floor = decades.amax(dim=(-2, -1), keepdim=True) - DYNAMIC_RANGE
        return torch.maximum(decades, floor).add_(4).div_(4)

    def _padded(self, clips: list[np.ndarray], is_rate_known: bool) -> dict[str, torch.Tensor]:
        if not is_rate_known:
            logger.warning(
                "No sampling_rate was given: the waveforms are taken to have %d Hz. Of another rate they would be "
                "heard too fast or too slow, silently.",
                self.sampling_rate,
            )
        extractor = self.feature_extractor
        lengths = [len(clip) for clip in clips]
        samples = max(lengths) + TAIL_HOPS * extractor.hop_length
        if self.audio_padding == "max_length":
            samples = extractor.n_samples
            lengths = [min(length, samples) for length in lengths]
        waveforms = torch.zeros(len(clips), samples)
        for row, clip, length in zip(waveforms, clips, lengths, strict=True):
            row[:length] = torch.from_numpy(clip[:length])
        own = torch.tensor(lengths).unsqueeze(1) // extractor.hop_length
        return {"waveforms": waveforms, "attention_mask": (torch.arange(samples // extractor.hop_length) < own).long()}

    def _log_mel_inputs(
        self, clips: list[np.ndarray], is_rate_known: bool, device: str | torch.device
    ) -> dict[str, torch.Tensor]:
        extractor = self.feature_extractor
        padded = self._padded(clips, is_rate_known)
        waveforms, mask = padded["waveforms"], padded["attention_mask"]
        if torch.device(device).type != "cpu" or extractor.dither:
            return {"input_features": self.log_mel(waveforms, device).cpu(), "attention_mask": mask}
        # Clip by clip: a batch holds much silence, and one that exceeds the processor's caches is slower by the frame.
        # Frames that begin behind the clip are silent, which is as far below its loudest as the range allows.
        reach = extractor.hop_length + extractor.n_fft // 2
        features = torch.empty(*mask.shape[:1], extractor.feature_size, mask.shape[1])
        for row, waveform, clip in zip(features, waveforms, clips, strict=True):
            own = self.log_mel(waveform[None, : len(clip) + reach])[0]
            row[:, : own.shape[1]] = own
            silence = (own.amax() - DYNAMIC_RANGE / 4).clamp(min=(math.log10(LOWEST_POWER) + 4) / 4)
            row[:, own.shape[1] :] = silence
        return {"input_features": features, "attention_mask": mask}

    def _one_by_one(self, clips: list[np.ndarray], sampling_rate: int | None) -> dict[str, torch.Tensor]:
        # Extractors pad before or after they filter and normalise: what a clip gets must not depend on the others.
        extractor = self.feature_extractor
        name = extractor.model_input_names[0]
        own = []
        for clip in clips:
            inputs = extractor(
                clip,
                sampling_rate=sampling_rate,
                padding=True,
                return_attention_mask=True,
                return_tensors="pt",
            )
            if "attention_mask" not in inputs:
                raise ValueError(
                    f"{type(extractor).__name__} gives {sorted(inputs)} and no attention_mask, so that padding cannot "
                    "be told from the clip: choose a speech encoder with another feature extractor."
                )
            own.append(inputs[name][0, : int(inputs["attention_mask"].sum())])
        frames = torch.arange(max(len(clip) for clip in own))
        mask = frames < torch.tensor([len(clip) for clip in own]).unsqueeze(1)
        return {name: nn.utils.rnn.pad_sequence(own, batch_first=True), "attention_mask": mask.long()}

    def tokenize(self, text: str | Sequence[str] | None, clips: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `text_attention_mask` (clips, tokens) of transcripts alone; see `__call__`."""
        transcripts = [""] * clips if text is None else [text] if isinstance(text, str) else list(text)
        for position, transcript in enumerate(transcripts):
            if not isinstance(transcript, str):
                raise ValueError(
                    f"Transcript {position} is {type(transcript).__name__}, not a string; use '' where there is none."
                )
        if len(transcripts) != clips:
            raise ValueError(f"{len(transcripts)} transcripts for {clips} clips: pass one per clip, '' for none.")
        limit = min(self.tokenizer.model_max_length, 512)  # unset, it is a huge number
        tokens = self.tokenizer(transcripts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        spoken = torch.tensor([[bool(transcript.strip())] for transcript in transcripts])
        return {"input_ids": tokens["input_ids"], "text_attention_mask": tokens["attention_mask"] * spoken}


class SailerEnsembleProcessor(ProcessorMixin):
    """
    The members' processors as one: audio is read once, and what several members read alike is made once.

    Args:
        processors: a `SailerProcessor` for each member.
        members: the `members` of the ensemble's configuration; which of the inputs each one reads is filled in.

    Raises:
        ValueError: another number of processors than of members, or other sampling rates.
    """

    def __init__(
        self, processors: Sequence[SailerProcessor], members: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        named = [{"name": str(i), "subfolder": f"member_{i}"} for i in range(len(processors))]
        self.members = [dict(member) for member in (named if members is None else members)]
        if len(processors) != len(self.members) or not processors:
            raise ValueError(f"{len(processors)} processors for {len(self.members)} members: pass one for each.")
        super().__init__()
        self.processors = list(processors)
        rates = [processor.sampling_rate for processor in processors]
        if len(set(rates)) > 1:
            raise ValueError(f"The members hear at {rates} Hz: an ensemble's audio is read once, at one rate.")
        sounds: list[str] = []
        texts: list[str] = []
        self.hearing: list[SailerProcessor] = []
        self.reading: list[SailerProcessor] = []
        for member, processor in zip(self.members, self.processors, strict=True):
            hears: dict[str, Any] = {
                "audio_padding": processor.audio_padding,
                "trim_silence": processor.trim_silence,
            }
            sound = json.dumps([processor.feature_extractor.to_dict(), hears], default=str)
            if sound not in sounds:
                sounds.append(sound)
                self.hearing.append(SailerProcessor(processor.feature_extractor, **hears))
            member |= {"audio_input": sounds.index(sound), "text_input": None}
            if processor.tokenizer is not None:
                words = _tokenizer_key(processor.tokenizer)
                if words not in texts:
                    texts.append(words)
                    self.reading.append(processor)
                member["text_input"] = texts.index(words)

    def __call__(
        self,
        audio: Any = None,
        text: str | Sequence[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> BatchFeature:
        """As `SailerProcessor`'s. Each input's name has the number of the `audio_input` or `text_input` behind it:
        `input_features_0`, `attention_mask_0`, `input_ids_0`, `text_attention_mask_0`, `input_values_1`, ..."""
        if audio is None:
            raise ValueError("No audio: pass audio=waveform or a list of waveforms.")
        if text is not None and not self.reading:
            raise ValueError("No member reads transcripts, so leave text out.")
        clips, is_rate_known = self.hearing[0]._waveforms(audio, sampling_rate)
        rate = self.sampling_rate if is_rate_known else None
        data: dict[str, Any] = {}
        for number, part in enumerate(self.hearing):
            made = part(clips, sampling_rate=rate, device=device, **options)
            data |= {f"{name}_{number}": value for name, value in made.items()}
        for number, part in enumerate(self.reading):
            data |= {f"{name}_{number}": value for name, value in part.tokenize(text, len(clips)).items()}
        return BatchFeature(data).convert_to_tensors(return_tensors)

    @property
    def sampling_rate(self) -> int:
        """The members' sampling rate in Hz."""
        return self.processors[0].sampling_rate

    @property
    def feature_extractor(self) -> Any:
        """The first member's."""
        return self.processors[0].feature_extractor

    @property
    def tokenizer(self) -> Any:
        """That of the first member that reads transcripts; `None` where none does."""
        return self.reading[0].tokenizer if self.reading else None

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that a call returns."""
        heard = [f"{name}_{number}" for number, part in enumerate(self.hearing) for name in part.model_input_names]
        read = [f"{name}_{n}" for n, _ in enumerate(self.reading) for name in ("input_ids", "text_attention_mask")]
        return heard + read

    @classmethod
    def get_attributes(cls) -> list[str]:
        return []

    @classmethod
    def from_pretrained(  # type: ignore[override]  # a list of systems too
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> Self:
        """Load an ensemble's processor, or that of a list of systems (see `SailerEnsemble.from_pretrained`).

        Raises:
            OSError: a member is not in its place; the message names it.
            ValueError: members that cannot be heard together.
        """
        located = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        source = pretrained_model_name_or_path
        if isinstance(source, (list, tuple)):
            places = [place_of(system, index) for index, system in enumerate(source)]
            parts = [load_part(MEMBER_PROCESSORS, place, located | there) for place, there, _ in places]
            return cls(parts, [entry for _, _, entry in places])
        members = cls.get_processor_dict(source, **located)[0]["members"]
        return cls(
            [load_member(MEMBER_PROCESSORS, source, i, member, located) for i, member in enumerate(members)], members
        )

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        name = type(self).__name__
        auto_map = {"AutoProcessor": f"processing_sailer.{name}"}
        return {"processor_class": name, "auto_map": auto_map, "members": self.members}

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """As transformers': members that have a subfolder are saved there."""
        push = take_push_options(save_directory, kwargs) if push_to_hub else None
        files = super().save_pretrained(save_directory, **kwargs)
        for member, processor in zip(self.members, self.processors, strict=True):
            if "subfolder" in member:
                folder = os.path.join(save_directory, member["subfolder"])
                files += processor.save_pretrained(folder)
                drop_code(folder)
        if push is not None:
            self.push_to_hub(**push, token=kwargs.get("token"))
        return files


# The classes that an ensemble's members load with, by the model_type of their config.json.
MEMBER_PROCESSORS = {"sailer": SailerProcessor}


def _mel_filters(extractor: WhisperFeatureExtractor, device: torch.device) -> torch.Tensor:
    """The extractor's filters (frequencies, mels) on a device: taken there once, as a copy from NumPy's memory has the
    host wait for a GPU."""
    source, places = _filters.get(extractor, (None, {}))
    if source is not extractor.mel_filters:
        source, places = extractor.mel_filters, {}
        _filters[extractor] = source, places
    if device not in places:
        places[device] = torch.from_numpy(source).to(device, torch.float32)
    return places[device]


def drop_code(folder: str) -> None:
    """Take the code out of a member's folder: the ensemble's own has it, and it is what loads the members."""
    for name in os.listdir(folder):
        if name.endswith(".py") or name == "requirements.txt":
            os.remove(os.path.join(folder, name))


def _tokenizer_key(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return f"{type(tokenizer).__name__} {tokenizer.model_max_length} {vocabulary}"


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or getattr(value, "ndim", None) == 0


SailerProcessor.register_for_auto_class()
SailerEnsembleProcessor.register_for_auto_class()

__all__ = ["SailerEnsembleProcessor", "SailerProcessor"]
