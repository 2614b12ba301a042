"""Frozen towers' hidden states: computed once per distinct clip, mix and transcript, kept in memory or on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from sailer.adapters_sailer import trains
from sailer.data.collator import TEXT_INPUTS, SailerCollator
from sailer.data.rendering import Item, RenderingKey, changed_speed, rendering_key, transcript_of
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import CorpusError
from sailer.data.team import Team
from sailer.encoders_sailer import masks_padding, speech_width
from sailer.layers_sailer import NORMALIZED_LAYERS, pool_states
from sailer.training.shelf import Shelf, readable

if TYPE_CHECKING:
    from sailer.modeling_sailer import SailerForAudioClassification
    from sailer.processing_sailer import SailerProcessor

Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of encoders that do not say how many frames they make of a clip: as many as any of them do.
FRAMES_PER_SECOND = 50
# Beside a clip's pooled states: how many frames the last group holds.
LAST_GROUP = ".last"


class FeatureStore:
    """Hidden states of the frozen towers by what is rendered; `SailerCollator(features=...)` reads them.

    Made by `build`. Held in memory it is shared with forked data loader workers; workers that are spawned would each
    get a copy, so keep it on disk there.
    """

    def __init__(
        self,
        shelf: Shelf,
        audio: dict[RenderingKey, str] | None,
        text: dict[str, str] | None,
        no_transcript: torch.Tensor | None,
        pooled: int = 1,
    ) -> None:
        # Names on the shelf, by rendering and by transcript; None for a tower whose states are not kept.
        self._shelf, self._audio, self._text, self._no_transcript = shelf, audio, text, no_transcript
        self._pooled = pooled

    @classmethod
    def build(
        cls,
        model: SailerForAudioClassification,
        collator: SailerCollator,
        datasets: Iterable[PlannedDataset | Dataset],
        *,
        folder: str | Path | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        num_workers: int = 0,
        team: Team | None = None,
        precision: torch.dtype | None = None,
    ) -> FeatureStore:
        """Run the frozen towers over everything that the datasets will ever yield, the longest first.

        With `frame_pooling` in the model's configuration the pooled states are kept, so many times fewer.

        Args:
            model: its frozen towers' states are kept, on the device where it is.
            collator: decodes and mixes the clips, as it will in training.
            datasets: training, validation and test clips, with their audio.
            folder: where the states are kept, as safetensors; in memory by default. What a folder already holds of the
                same clips from the same weights is not computed again, by another run neither; a file whose checksum
                is not that of its content is.
            dtype: "float32", "float16" or "bfloat16".
            batch_size: clips per forward pass.
            num_workers: processes that decode and mix.
            team: processes that call this together, each with the same arguments: each encodes its share, and all have
                all of it in the end, once on disk or once in a machine's memory.
            precision: the towers compute in it by autocast; in float32 by default.

        Raises:
            ValueError: no tower is frozen; mixes are new every epoch (see `PlannedDataset.renderings`); an unknown
                dtype; or less room than is needed, which is known before anything is encoded. The message says what
                to change.
            CorpusError: two clips of the same id, or a clip that cannot be read.
            TeamError: another process of the team failed or died.
        """
        config = model.config
        text_config = None if trains(config, "text") else config.text_config
        if trains(config, "audio") and not text_config:
            raise ValueError("No tower is frozen, so no features can be kept: set cache_features to off.")
        if dtype not in DTYPES:
            raise ValueError(f"feature_dtype is {dtype!r}; choose one of {list(DTYPES)}.")
        team = team or Team()
        shelf = Shelf(None if folder is None else Path(folder), DTYPES[dtype], team)
        audio: dict[RenderingKey, str] | None = None
        text: dict[str, str] | None = None
        no_transcript = None
        computed = [] if precision is None else [str(precision)]
        autocast = torch.autocast(model.device.type, precision, enabled=precision is not None)
        with shelf.filling():
            places, contents, transcripts = _renderings(datasets, collator.max_seconds)
            if not trains(config, "audio"):
                mark = _audio_mark(model, collator, *computed)
                audio = {key: _digest(mark, dtype, content) for key, content in contents.items()}
                sounds = {name: places[key] for key, name in audio.items()}
            if text_config is not None:
                mark = _text_mark(model, collator, *computed)
                text = {transcript: _digest(mark, dtype, transcript) for transcript in transcripts}
                width = (text_config.num_hidden_layers + 1, text_config.hidden_size)
                no_transcript = torch.zeros(width, dtype=shelf.dtype)
            missing = [place.seconds for name, place in sounds.items() if name not in shelf] if audio else []
            untold = [name for name in text.values() if name not in shelf] if text else []
            _check_room(shelf, model, collator, missing, len(untold))
            if audio is not None:
                own = _share(sounds, lambda place: -place.seconds, shelf)
                shelf.add(_audio_batches(model, collator, own, shelf.dtype, batch_size, num_workers, autocast))
            if text is not None:
                words = _share({name: words for words, name in text.items()}, lambda words: -len(words), shelf)
                shelf.add(_text_batches(model, collator, words, shelf.dtype, batch_size, autocast))
        return cls(shelf, audio, text, no_transcript, 1 if trains(config, "audio") else config.frame_pooling)

    def holds(self, key: RenderingKey, transcript: str) -> bool:
        """Whether `inputs` can be asked for an item, by its `rendering_key` and transcript."""
        heard = self._audio is None or key in self._audio
        return heard and (self._text is None or not transcript or transcript in self._text)

    def inputs(self, keys: Sequence[RenderingKey], transcripts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch, of those towers that are kept.

        Args:
            keys: `rendering_key` of each item.
            transcripts: of each item; "" gives zeros.

        Returns:
            `audio_hidden_states` (batch, [layers,] frames, width) with `attention_mask` (batch, frames), or
            `pooled_hidden_states` (batch, [layers,] groups, width) with how many frames each group holds as the mask;
            and `text_hidden_states` (batch, layers, width); in the dtype that they are kept in.

        Raises:
            ValueError: an item that was not among those of `build`.
        """
        batch = {}
        if self._audio is not None:
            names = [_known(self._audio, key) for key in keys]
            states = [self._shelf[name] for name in names]
            frames = [state.shape[-2] for state in states]
            pad = torch.nn.functional.pad
            padded = [pad(state, (0, 0, 0, max(frames) - own)) for state, own in zip(states, frames, strict=True)]
            mask = (torch.arange(max(frames)) < torch.tensor(frames).unsqueeze(1)).long()
            if self._pooled > 1:  # the last group may hold fewer frames
                last = torch.stack([self._shelf[name + LAST_GROUP] for name in names])
                mask = mask * self._pooled
                mask[torch.arange(len(names)), torch.tensor(frames) - 1] = last
            batch["pooled_hidden_states" if self._pooled > 1 else "audio_hidden_states"] = torch.stack(padded)
            batch["attention_mask"] = mask
        if self._text is not None and self._no_transcript is not None:
            batch["text_hidden_states"] = torch.stack(
                [self._shelf[_known(self._text, text)] if text else self._no_transcript for text in transcripts]
            )
        return batch


def _known(names: Mapping[Key, str], key: Key) -> str:
    if key not in names:
        raise ValueError(f"No features were kept of {key!r}: build the store from every dataset that is to be run.")
    return names[key]


class _Place(NamedTuple):
    """Where something that is heard comes from: rows of a corpus in playing order, the gap between them, and the speed
    at which they are played."""

    rows: Dataset
    clips: tuple[int, ...]
    gap: float
    speed: float
    seconds: float


class _Items(torch.utils.data.Dataset):
    """What the collator renders."""

    def __init__(self, places: list[_Place]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        place = self.places[index]
        return {"clips": [place.rows[clip] for clip in place.clips], "gap": place.gap, "speed": place.speed}


def _renderings(
    datasets: Iterable[PlannedDataset | Dataset], max_seconds: float
) -> tuple[dict[RenderingKey, _Place], dict[RenderingKey, str], list[str]]:
    """Every distinct rendering's place and a digest of its audio by its key, and every distinct transcript."""
    places: dict[RenderingKey, _Place] = {}
    contents: dict[RenderingKey, str] = {}
    transcripts: dict[str, None] = {}
    for dataset in datasets:
        if isinstance(dataset, PlannedDataset):
            rows, renderings = dataset.dataset, dataset.renderings()
        else:
            rows, renderings = dataset, [(row, -1, 0.0, 1.0) for row in range(len(dataset))]
        narrow = rows.select_columns(["id", "audio", "transcript", "duration"])
        clips = list(tqdm(map(_identify, narrow), total=len(rows), desc="Identifying clips", leave=False))
        for first, second, gap, speed in renderings:
            heard = (first,) if second < 0 else (first, second)
            item: Item = {"clips": [clips[clip] for clip in heard], "gap": gap, "speed": speed}
            key = rendering_key(item)
            content = _digest([clips[clip]["audio"] for clip in heard], gap, *changed_speed(speed))
            if contents.setdefault(key, content) != content:
                raise CorpusError(
                    f"Clip {key[0]!r} has two recordings among the splits, and features are kept by id: rename one of "
                    "them, or set cache_features to off."
                )
            seconds = (sum(clip["duration"] for clip in item["clips"]) + gap) / speed
            # An unknown duration counts as the longest.
            seconds = max_seconds if math.isnan(seconds) else min(seconds, max_seconds)
            places[key] = _Place(rows, heard, gap, speed, seconds)
            transcripts[transcript_of(item)] = None
    return places, contents, [transcript for transcript in transcripts if transcript]


def _identify(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a digest in place of its audio: of its bytes, or of its file's path, size and time."""
    path, content = row["audio"]["path"], row["audio"]["bytes"]
    if content is None:
        try:
            status = os.stat(path)
        except (OSError, TypeError) as error:
            raise CorpusError(f"Clip {row['id']!r} has no audio to compute features of: {error}") from error
        content = [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    return {**row, "audio": _digest(content)}


def _share(items: dict[str, Made], order: Callable[[Made], float], shelf: Shelf) -> dict[str, Made]:
    """What this process is to make, longest first: dealt out over all items, so that it does not hang on how far the
    others are."""
    names = sorted(items, key=lambda name: (order(items[name]), name))[shelf.team.index :: shelf.team.size]
    return {name: items[name] for name in names if name not in shelf}


def _check_room(
    shelf: Shelf, model: SailerForAudioClassification, collator: SailerCollator, seconds: list[float], texts: int
) -> None:
    if not (seconds or texts):
        return
    config, each = model.config, shelf.dtype.itemsize
    needed = kept_bytes(model, collator.processor, np.array(seconds), shelf.dtype)
    if texts and config.text_config is not None:
        needed += texts * (config.text_config.num_hidden_layers + 1) * config.text_config.hidden_size * each
    place, free = shelf.free()
    what = " and ".join([f"{len(seconds)} clips and mixes"] * bool(seconds) + [f"{texts} transcripts"] * bool(texts))
    size = f"about {readable(needed)} in {place} ({str(shelf.dtype).removeprefix('torch.')})"
    if needed > free:
        ways = ["in a folder with room (cache_features: disk, feature_cache_dir)"]
        ways += ["at half the size (feature_dtype: float16)"] if each > 2 else []
        ways += ["of the last layer alone (audio_layers: last)"] if config.audio_layers != "last" else []
        ways += [] if config.frame_pooling > 1 else ["pooled (frame_pooling: 64 keeps a 64th)"]
        ways += ["of fewer plans (augmentation_variants)", "or not at all (cache_features: off; on a GPU in bf16)"]
        raise ValueError(
            f"Features of {what} take {size}, where {readable(free)} are free. Keep them {', '.join(ways)}."
        )
    if shelf.team.index == 0:
        tqdm.write(f"Features of {what}: {size}, {readable(free)} free", file=sys.stderr)


def kept_bytes(
    model: SailerForAudioClassification, processor: SailerProcessor, seconds: np.ndarray, dtype: torch.dtype
) -> int:
    """Bytes that the audio tower's states of clips of `seconds` (clips,) take, from the configuration alone."""
    config, encoder = model.config, model.config.audio_config
    assert encoder is not None, "SailerModel refuses a configuration without a speech encoder"
    groups = -(-_frames(model, processor, seconds) // config.frame_pooling)
    layers = encoder.num_hidden_layers + 1 if config.audio_layers != "last" else 1
    return int(groups.sum()) * layers * speech_width(encoder, config.audio_layers) * dtype.itemsize


def _frames(model: SailerForAudioClassification, processor: SailerProcessor, seconds: np.ndarray) -> np.ndarray:
    """How many frames the audio tower makes of each clip."""
    extractor, encoder = processor.feature_extractor, model.sailer.audio_encoder
    samples = np.round(np.asarray(seconds, dtype=np.float64) * extractor.sampling_rate).astype(np.int64)
    if processor.makes_log_mel:
        if processor.audio_padding == "max_length":
            samples = np.minimum(samples, extractor.n_samples)
        return -(-(samples // extractor.hop_length) // 2)
    count: Any = getattr(encoder, "_get_feat_extract_output_lengths", None)
    if model.main_input_name == "input_values" and count is not None:
        return np.maximum(count(torch.from_numpy(samples)).numpy(), 1)
    return np.ceil(seconds * FRAMES_PER_SECOND).astype(np.int64)


def _audio_batches(
    model: SailerForAudioClassification,
    collator: SailerCollator,
    missing: dict[str, _Place],
    dtype: torch.dtype,
    batch_size: int,
    num_workers: int,
    autocast: torch.autocast,
) -> Iterator[dict[str, torch.Tensor]]:
    """The states of each clip's own frames, or of groups of them and how many the last group holds, by name."""
    if not missing:
        return
    names, config = list(missing), model.config
    loader = torch.utils.data.DataLoader(
        _Items([missing[name] for name in names]),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=replace(collator, heads=(), features=None),
    )
    for number, batch in enumerate(tqdm(loader, desc="Encoding speech", unit="batch")):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        if "waveforms" in batch:
            batch["input_features"] = collator.processor.log_mel(batch["waveforms"])
        with torch.no_grad(), autocast:
            states, mask = model.sailer.audio_hidden_states(batch[model.main_input_name], batch["attention_mask"])
        chunk = names[number * batch_size : (number + 1) * batch_size]
        kept: dict[str, torch.Tensor] = {}
        for name, state, frames in zip(chunk, states, mask, strict=True):
            own = state[..., frames.bool(), :]
            if config.frame_pooling > 1:
                own, counts = pool_states(
                    own.unsqueeze(0), config.frame_pooling, normalize=config.audio_layers in NORMALIZED_LAYERS
                )
                own, kept[name + LAST_GROUP] = own[0], counts[0, -1].to("cpu", torch.long, copy=True)
            kept[name] = own.to("cpu", dtype).clone().contiguous()
        yield kept


def _text_batches(
    model: SailerForAudioClassification,
    collator: SailerCollator,
    missing: dict[str, str],
    dtype: torch.dtype,
    batch_size: int,
    autocast: torch.autocast,
) -> Iterator[dict[str, torch.Tensor]]:
    """The states of transcripts by name."""
    names = list(missing)
    for start in tqdm(range(0, len(names), batch_size), desc="Encoding transcripts", unit="batch"):
        chunk = names[start : start + batch_size]
        tokens = collator.processor.tokenize([missing[name] for name in chunk], len(chunk))
        with torch.no_grad(), autocast:
            states = model.sailer.text_hidden_states(*(tokens[name].to(model.device) for name in TEXT_INPUTS))
        yield {name: state.clone() for name, state in zip(chunk, states.to("cpu", dtype), strict=True)}


def _audio_mark(model: SailerForAudioClassification, collator: SailerCollator, *computed: str) -> str:
    """A digest of all that an audio tower's states depend on, but the audio."""
    config, processor = model.config, collator.processor
    return _digest(
        _plain(config.audio_config),
        config.audio_layers != "last",
        config.frame_pooling,
        config.audio_layers in NORMALIZED_LAYERS and config.frame_pooling > 1,
        config.attend_to_padding,
        masks_padding(model.sailer.audio_encoder.config),
        processor.feature_extractor.to_dict(),
        processor.audio_padding,
        collator.max_seconds,
        *([] if processor.trim_silence is None else [processor.trim_silence]),
        *computed,
        *_weights(model.sailer.audio_encoder),
    )


def _text_mark(model: SailerForAudioClassification, collator: SailerCollator, *computed: str) -> str:
    tokenizer = collator.processor.tokenizer
    config = _plain(model.config.text_config)
    return _digest(config, tokenizer.get_vocab(), *computed, *_weights(model.sailer.text_encoder))


def _plain(config: PretrainedConfig | None) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"} if config else {}


def _weights(tower: torch.nn.Module | None) -> Iterator[memoryview]:
    for tensor in tower.state_dict().values() if tower is not None else ():
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        is_bytes = isinstance(part, bytes | memoryview)
        digest.update(part if is_bytes else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()
