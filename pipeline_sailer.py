"""SpeechEmotionPipeline: recordings in, emotions out; windows over long audio, batches of like length, any device."""

from __future__ import annotations

import difflib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import Pipeline, pipeline
from transformers.utils import logging

from .audio_sailer import MINIMUM_SECONDS, read_audio
from .configuration_sailer import ATTRIBUTES, SailerConfig
from .processing_sailer import SailerProcessor
from .windows_sailer import (
    ITEM_ERRORS,
    Clip,
    KnowsSpeakers,
    count_of,
    cut_windows,
    run_ahead,
    set_of,
    shifts_of,
    with_speakers,
)

logger = logging.get_logger(__name__)

PRIORS = ("balanced", "natural")
FUNCTIONS = ("softmax", "none")
ON_ERROR = ("raise", "return")
PREPROCESS = ("chunk_length_s", "stride_length_s", "transcriber", "speaker", "speaker_key")
SETS = ("prior", "function_to_apply", "coverage", "coverage_by_class")  # options that say what a set is made of
POSTPROCESS = ("top_k", "return_all", "return_embedding", "return_timestamps", *SETS)
# Clips of like length are looked for among this many batches; results wait no longer than that.
BUFFERED_BATCHES = 8
# A larger pass is slower on a CPU, because its activations fall out of the cache (measured: 15 % at eight of 15 s).
CPU_SECONDS = 30.0


class SpeechEmotionPipeline(KnowsSpeakers, Pipeline):
    """
    Emotions of recordings (task `"audio-classification"`).

    ```python
    >>> from transformers import pipeline

    >>> classifier = pipeline(model="user/sailer", trust_remote_code=True)
    >>> classifier("clip.wav", top_k=1)
    [{'label': 'Happy', 'score': 0.71}]
    ```

    Options of a call may also be given when the pipeline is made, and then hold for every call. Silence is audio like
    any other and gets a result. What one clip gets does not depend on the clips that it is batched with.

    Args:
        model, processor: a `SailerForAudioClassification` and its `SailerProcessor`.
        device, dtype, device_map: as in transformers; log-mel features are computed on a CUDA device too.

    Raises:
        ValueError: there is no processor, or an option is out of its range.
        TypeError: unknown option (the message names the nearest).
    """

    model: Any  # a SailerForAudioClassification, whose file imports this one
    processor: SailerProcessor

    # Any, because a Pipeline's own are None.
    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False

    def __init__(
        self, model: Any, processor: SailerProcessor | None = None, on_error: str = "raise", **kwargs: Any
    ) -> None:
        if processor is None:
            raise ValueError("The pipeline needs processor=SailerProcessor.from_pretrained(...) beside the model.")
        self._on_error = _one_of("on_error", on_error, ON_ERROR)
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if kwargs.get(name) is not None:
                count_of(name, kwargs[name], least)
        self._transcribers: dict[str, Callable] = {}
        self._has_told_of_missing_text = False
        super().__init__(model=model, processor=processor, **kwargs)
        self.model.eval()

    def __call__(  # type: ignore[override]  # options by name alone
        self,
        inputs: Any,
        batch_size: int | None = None,
        num_workers: int | None = None,
        on_error: str | None = None,
        **options: Any,
    ) -> Any:
        """
        Args:
            inputs: one recording: a path, an http(s) URL, the bytes of an audio file, a waveform of shape (samples,)
                or (channels, samples) at the model's rate, `{"array" or "raw", "sampling_rate"}`, or `{"audio": any
                of these, "text": transcript}` (or "transcript", as in a row of sailer's corpora). Or many: a list,
                which gives a list, or a generator or dataset, which gives a generator and may be endless. What is
                used although it was cut short, or has more than two channels, is told in a warning; see
                `audio_sailer` for the limits.
            batch_size: windows that the model sees at once (on a CPU no more than 30 s of them); 1 by default. Above
                that results come a few batches late, because windows of like length are put together.
            num_workers: threads that decode ahead of the model; 0 (none) by default.
            on_error: "raise" (the default) at the first input that cannot be used (the message names it), or
                "return" `{"error": message}` in its place and go on, whatever went wrong with it: reading it, a
                window of it in the model, memory. Its neighbours in a batch get their results.
            top_k: how many labels; all by default.
            return_all: give a dict: "primary" (the list of labels), "label" (the decision among the scored classes),
                "set" (the labels that are possible, see `coverage`), "secondary", "attributes" (in [0, 1]) and
                "attributes_1_7", "sex", "age", "transcript", as far as the system has them, and "embedding", an array
                of shape (width,). All but that is ready for JSON.
            return_embedding: `False` leaves the embedding out.
            prior: "balanced", the paper's scores; or "natural", which estimates the annotators' distribution.
            function_to_apply: "softmax" (the default) or "none", which gives the emotions' logits, to which no prior
                applies. The emotions are one distribution: "sigmoid" is refused.
            coverage: share of clips like those of the calibration split whose "set" has what annotators would agree
                on, 0.9 by default: the system's conformal prediction sets, see `windows_sailer.prediction_set`.
            coverage_by_class: whether each class has a threshold of its own, so that this holds for each of them.
            chunk_length_s: longest audio that is heard at once; longer audio is cut into windows of this length. By
                default the longest that the system was trained on; 0 for no windows, which refuses audio that the
                encoder would cut.
            stride_length_s: seconds that a window shares with its left and right neighbours, one number or two; a
                sixth of the window by default.
            return_timestamps: give one result per window, `{"timestamp": (start, end), ...}`, not their mean weighted
                by duration.
            transcriber: a speech-recognition pipeline, or its model's id, for inputs without a transcript.
            speaker: whose voice it is, by a name that `adapt` was given; of many inputs one name for all of them or a
                list, None for those whose speaker is not known.
            speaker_key: where each input is a dict that names its speaker itself, under which key.

        Returns:
            `[{"label", "score"}, ...]` by falling score; for a system without emotions its attributes (arousal,
            valence and dominance, in [0, 1]), else sex, else age in years. A dict with `return_all`; a list of dicts
            with `return_timestamps`; a list or generator of these for many inputs.

        Raises:
            ValueError: audio that cannot be used, a system that needs transcripts and has neither them nor a
                transcriber, or a coverage outside (0, 1) or of a system without calibration scores.
            FileNotFoundError: no such file.
        """
        preprocess, _, postprocess = self._sanitize_parameters(**options)
        on_error = self._on_error if on_error is None else _one_of("on_error", on_error, ON_ERROR)
        is_one = _is_one_recording(inputs)
        clips = self.encode([inputs] if is_one else _iterate(inputs), batch_size, num_workers, **preprocess)

        def results() -> Iterator[Any]:
            for position, clip in enumerate(clips):
                if clip.error is None:
                    yield self.postprocess(clip, **self._postprocess_params | postprocess)
                elif on_error == "return":
                    yield {"error": clip.message}
                elif isinstance(clip.error, ITEM_ERRORS):
                    kind = FileNotFoundError if isinstance(clip.error, FileNotFoundError) else ValueError
                    raise kind(clip.message if is_one else f"Item {position}: {clip.message}") from clip.error
                else:
                    clip.error.add_note(f"Item {position} of the pipeline's inputs")
                    raise clip.error

        if is_one:
            return next(results())
        return list(results()) if isinstance(inputs, (list, tuple)) else results()

    def encode(
        self, items: Iterable[Any], batch_size: int | None = None, num_workers: int | None = None, **options: Any
    ) -> Iterator[Clip]:
        """Recordings through the model, before `postprocess` makes results of them, in one form or several.

        Args:
            items: recordings, as in `__call__`; they may be endless.
            batch_size, num_workers: see `__call__`.
            options: `chunk_length_s`, `stride_length_s`, `transcriber`, `speaker` and `speaker_key`.

        Yields:
            A `Clip` per recording, in the order given; `error` is set where a recording cannot be used.
        """
        size = count_of("batch_size", batch_size if batch_size is not None else self._batch_size or 1, 1)
        workers = count_of("num_workers", num_workers if num_workers is not None else self._num_workers or 0, 0)
        options = self._preprocess_params | options
        return self._encode(with_speakers(items, options.pop("speaker", None)), size, workers, options)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        for name in options:
            if name not in PREPROCESS + POSTPROCESS:
                near = difflib.get_close_matches(name, PREPROCESS + POSTPROCESS, 1)
                raise TypeError(f"Unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        _one_of("prior", options.get("prior", PRIORS[0]), PRIORS)
        _one_of("function_to_apply", options.get("function_to_apply", FUNCTIONS[0]), FUNCTIONS)
        if "chunk_length_s" in options or "stride_length_s" in options:
            given = getattr(self, "_preprocess_params", {}) | options
            length, stride = self._chunk_length(given.get("chunk_length_s")), given.get("stride_length_s")
            cut_windows(0, self.processor.sampling_rate, length, stride)
        if options.get("top_k") is not None:
            count_of("top_k", options["top_k"], 1)
        if options.get("transcriber") is not None and self.processor.tokenizer is None:
            raise ValueError("This is a speech-only system: it reads no transcripts, so leave transcriber out.")
        given = getattr(self, "_postprocess_params", {}) | options
        set_of(self.model.config, {}, **{name: given[name] for name in SETS if name in given})  # whether it can be had
        return (
            {name: options[name] for name in PREPROCESS if name in options},
            {},
            {name: options[name] for name in POSTPROCESS if name in options},
        )

    def preprocess(  # type: ignore[override]  # a Clip holds more than the model's inputs
        self,
        inputs: Any,
        chunk_length_s: float | None = None,
        stride_length_s: float | tuple[float, float] | None = None,
        transcriber: Any = None,
    ) -> Clip:
        """One recording, read and cut into windows; see `__call__`."""
        text, audio = None, inputs
        if isinstance(inputs, Mapping) and "audio" in inputs:
            audio = inputs["audio"]
            text = inputs.get("text", inputs.get("transcript"))
            if "sampling_rate" in inputs and isinstance(audio, (np.ndarray, torch.Tensor, list)):
                audio = {"array": audio, "sampling_rate": inputs["sampling_rate"]}
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"The transcript is {type(text).__name__}, not a string; leave it out where there is none."
            )
        if self.processor.tokenizer is None:
            text = None
        elif not (text and text.strip()):
            text = None
            if transcriber is None:
                self._do_without_text()
        rate = self.processor.sampling_rate
        recording = read_audio(audio, rate)
        waveform = recording.waveform
        if recording.warning is not None:
            logger.warning(recording.warning)
        seconds = len(waveform) / rate
        if seconds < MINIMUM_SECONDS:
            raise ValueError(
                f"The audio is {1000 * seconds:.0f} ms long; at least {1000 * MINIMUM_SECONDS:.0f} are needed."
            )
        windows = cut_windows(len(waveform), rate, self._chunk_length(chunk_length_s), stride_length_s)
        self._check_length(max(end - start for start, end in windows) / rate)
        return Clip(
            windows=[waveform[start:end] for start, end in windows],
            timestamps=[(start / rate, end / rate) for start, end in windows],
            text=text,
            warning=recording.warning,
        )

    def _forward(self, model_inputs: Mapping[str, torch.Tensor]) -> Any:  # type: ignore[override]  # as above
        return self.model(**model_inputs, output_hidden_states=False, return_dict=True)

    def postprocess(  # type: ignore[override]  # as above
        self,
        model_outputs: Clip,
        top_k: int | None = None,
        return_all: bool = False,
        return_timestamps: bool = False,
        prior: str = "balanced",
        return_embedding: bool = True,
        function_to_apply: str = "softmax",
        coverage: float | None = None,
        coverage_by_class: bool = False,
    ) -> Any:
        """Results of one recording from the outputs of its windows; see `__call__`."""
        clip = model_outputs
        rows = [clip.outputs[index] for index in range(len(clip.timestamps))]
        stacked = {name: torch.stack([row[name] for row in rows]).float() for name in rows[0]}
        values = self._values(stacked, prior)
        if function_to_apply == "none" and "primary" in values:
            values["primary"] = stacked["logits"]
        if not return_embedding:
            del values["embedding"]
        sets = dict(zip(SETS, (prior, function_to_apply, coverage, coverage_by_class), strict=True))
        if return_timestamps:
            results = []
            for index, timestamp in enumerate(clip.timestamps):
                row = {name: value[index] for name, value in values.items()}
                described = self._describe(row, top_k, clip.text or clip.texts.get(index), sets)
                main = next(iter(described))
                results.append({"timestamp": timestamp} | (described if return_all else {main: described[main]}))
            return results
        durations = torch.tensor([end - start for start, end in clip.timestamps])
        share = durations / durations.sum()
        means = {name: torch.einsum("w,w...->...", share, value) for name, value in values.items()}
        heard = " ".join(clip.texts[index] for index in sorted(clip.texts)) if clip.texts else None
        described = self._describe(means, top_k, clip.text or heard, sets)
        return described if return_all else _as_list(described)

    def get_inference_context(self) -> Callable:
        return torch.inference_mode

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model, its code and the processor."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _encode(
        self, items: Iterable[tuple[Any, Any]], batch_size: int, workers: int, options: dict[str, Any]
    ) -> Iterator[Clip]:
        transcriber, key = self._transcriber(options.get("transcriber")), options.pop("speaker_key", None)

        def prepare(named: tuple[Any, Any]) -> Clip:
            item, speaker = named
            try:
                shift = self.speaker_of(speaker, item, key)
                return replace(self.preprocess(item, **options), speaker_shift=shift)
            except Exception as error:  # whatever it is, it is this item's alone
                return Clip(error=error)

        waiting: deque[Clip] = deque()  # in the order given
        buffer: list[tuple[Clip, int]] = []
        limit = batch_size * (BUFFERED_BATCHES if batch_size > 1 else 1)
        for clip in itertools.chain(run_ahead(prepare, items, workers, batch_size), [None]):
            if clip is not None:
                waiting.append(clip)
                buffer += [(clip, index) for index in range(len(clip.windows))]
            while len(buffer) >= limit or (clip is None and buffer):
                self._run(buffer[:limit], batch_size, transcriber)
                del buffer[:limit]
            while waiting and waiting[0].is_done:
                yield waiting.popleft()

    def _run(self, windows: list[tuple[Clip, int]], batch_size: int, transcriber: Callable | None) -> None:
        """Encode windows in batches of like length and hand each clip its rows."""
        windows = sorted(windows, key=lambda window: -len(window[0].windows[window[1]]))
        while windows:
            clip, index = windows[0]
            seconds = len(clip.windows[index]) / self.processor.sampling_rate
            size = min(batch_size, max(1, int(CPU_SECONDS / seconds))) if self.device.type == "cpu" else batch_size
            self._run_batch(windows[:size], transcriber)
            windows = windows[size:]

    def _run_batch(self, batch: list[tuple[Clip, int]], transcriber: Callable | None) -> None:
        """Encode a batch; where that fails its halves, down to the clip that it fails for, which gets the error."""
        batch = [window for window in batch if window[0].error is None]
        if not batch:
            return
        try:
            outputs = self._outputs(batch, transcriber)
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].error = error
                return
            middle = len(batch) // 2
            self._run_batch(batch[:middle], transcriber)
            self._run_batch(batch[middle:], transcriber)
            return
        for row, (clip, index) in enumerate(batch):
            clip.outputs[index] = {name: value[row] for name, value in outputs.items()}
            strange = [name for name, value in clip.outputs[index].items() if not torch.isfinite(value).all()]
            if strange:
                clip.error = ValueError(
                    f"The system's {strange[0]} for this recording are not finite (NaN or infinity)."
                )

    def _outputs(self, batch: list[tuple[Clip, int]], transcriber: Callable | None) -> dict[str, torch.Tensor]:
        waveforms = [clip.windows[index] for clip, index in batch]
        inputs = self.processor(
            audio=waveforms,
            text=self._texts(batch, waveforms, transcriber) if self.processor.tokenizer is not None else None,
            sampling_rate=self.processor.sampling_rate,
            device=self.device if self.device.type == "cuda" else "cpu",
        )
        return self.forward(inputs | shifts_of(clip for clip, _ in batch))

    def _texts(
        self, batch: list[tuple[Clip, int]], waveforms: list[np.ndarray], transcriber: Callable | None
    ) -> list[str]:
        untold = [row for row, (clip, index) in enumerate(batch) if clip.text is None and index not in clip.texts]
        if untold and transcriber is not None:
            rate = self.processor.sampling_rate
            sources = [{"raw": waveforms[row], "sampling_rate": rate} for row in untold]
            for row, result in zip(untold, transcriber(sources, batch_size=len(sources)), strict=True):
                clip, index = batch[row]
                clip.texts[index] = result["text"].strip()
        return [clip.text or clip.texts.get(index, "") for clip, index in batch]

    def _transcriber(self, transcriber: Any) -> Callable | None:
        if not isinstance(transcriber, (str, os.PathLike)):
            return transcriber
        name = str(transcriber)
        if name not in self._transcribers:
            self._transcribers[name] = pipeline(
                "automatic-speech-recognition", model=name, device=self.device, trust_remote_code=False
            )
        return self._transcribers[name]

    def _do_without_text(self) -> None:
        if self.model.config.text_dropout <= 0:
            raise ValueError(
                "This system was trained on speech and its transcript together: pass {'audio': ..., 'text': ...}, or "
                "transcriber= a speech-recognition pipeline or model id."
            )
        if not self._has_told_of_missing_text:
            self._has_told_of_missing_text = True
            logger.warning(
                "No transcript: this system runs on speech alone, as in a part of its training. For its full accuracy "
                "pass {'audio': ..., 'text': transcript} or transcriber=."
            )

    def _chunk_length(self, chunk_length_s: float | None) -> float:
        return self.model.config.max_seconds if chunk_length_s is None else chunk_length_s

    def _check_length(self, seconds: float) -> None:
        systems = getattr(self.model, "members", [self.model])  # an ensemble's, and their processors
        for model, processor in zip(systems, getattr(self.processor, "processors", [self.processor]), strict=True):
            extractor = processor.feature_extractor
            positions = getattr(model.config.audio_config, "max_source_positions", None)
            longest = float("inf") if positions is None else positions / 50
            if processor.audio_padding == "max_length" and hasattr(extractor, "n_samples"):
                longest = extractor.n_samples / extractor.sampling_rate  # what is longer, the extractor cuts off
            if seconds > longest:
                raise ValueError(
                    f"The audio is heard in windows of {seconds:.1f} s and this encoder takes {longest:.0f} s: choose "
                    "a chunk_length_s up to that."
                )

    def _values(self, outputs: dict[str, torch.Tensor], prior: str) -> dict[str, torch.Tensor]:
        """What can be averaged over windows, by head; each (windows, ...)."""
        values = {}
        if "logits" in outputs:
            said = outputs.get("member_logits", outputs["logits"])  # of an ensemble, what each member says
            values["primary"] = self.model.probabilities(said, prior)
        if "attributes" in outputs:
            values["attributes"] = outputs["attributes"]
        if "secondary_logits" in outputs:
            values["secondary"] = outputs["secondary_logits"].softmax(-1)
        if "sex_logits" in outputs:
            values["sex"] = outputs["sex_logits"].softmax(-1)
        if "age" in outputs:
            values["age"] = outputs["age"]
        return values | {"embedding": outputs["embeddings"]}

    def _describe(
        self, values: dict[str, torch.Tensor], top_k: int | None, transcript: str | None, sets: Mapping[str, Any]
    ) -> dict[str, Any]:
        config: SailerConfig = self.model.config
        described: dict[str, Any] = {}
        if "primary" in values:
            scores = dict(zip(config.labels, values["primary"].tolist(), strict=True))
            described["primary"] = _ranked(scores)[:top_k]
            described["label"] = max(config.scored_labels, key=scores.__getitem__)
            possible = set_of(config, scores, **sets)
            described |= {} if possible is None else {"set": possible}
        if "attributes" in values:
            described["attributes"] = dict(zip(ATTRIBUTES, values["attributes"].tolist(), strict=True))
            described["attributes_1_7"] = {name: 1 + 6 * value for name, value in described["attributes"].items()}
        for name, labels in (("secondary", config.secondary_labels), ("sex", config.sex_labels)):
            if name in values:
                described[name] = _ranked(dict(zip(labels, values[name].tolist(), strict=True)))
        if "age" in values:
            described["age"] = values["age"].item()
        if transcript is not None:
            described["transcript"] = transcript
        return described | {name: values[name].numpy() for name in ("embedding",) if name in values}


def _is_one_recording(inputs: Any) -> bool:
    if isinstance(
        inputs, (str, bytes, bytearray, memoryview, os.PathLike, Mapping, np.ndarray, np.generic, torch.Tensor)
    ):
        return True
    is_many = isinstance(inputs, Iterable) or hasattr(inputs, "__getitem__")
    return hasattr(inputs, "get_all_samples") or hasattr(inputs, "read") or not is_many


def _iterate(inputs: Any) -> Iterable[Any]:
    if hasattr(inputs, "__len__") and not isinstance(inputs, Iterable):
        return (inputs[index] for index in range(len(inputs)))  # a map-style torch dataset
    return inputs


def _ranked(scores: dict[str, float]) -> list[dict[str, Any]]:
    return [{"label": label, "score": scores[label]} for label in sorted(scores, key=scores.__getitem__, reverse=True)]


def _as_list(described: dict[str, Any]) -> list[dict[str, Any]]:
    main = described[next(iter(described))]
    if isinstance(main, list):
        return main
    if isinstance(main, float):
        return [{"label": "age", "score": main}]
    return [{"label": label, "score": score} for label, score in main.items()]


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{option} is {value!r}; choose one of {list(allowed)}.")
    return value


__all__ = ["SpeechEmotionPipeline"]
