"""Frozen towers' hidden states: computed once per distinct clip, mix and transcript, kept in memory or on disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psutil
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from sailer.atomic import replacing
from sailer.data.collator import TEXT_INPUTS, SailerCollator
from sailer.data.rendering import Item, RenderingKey, rendering_key, transcript_of
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import CorpusError
from sailer.encoders_sailer import masks_padding

if TYPE_CHECKING:
    from sailer.modeling_sailer import SailerForAudioClassification

Key = TypeVar("Key", bound=Hashable)

# A pass that is cut short loses at most this much: finished shards are found again.
SHARD_BYTES = 2**30
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class FeatureStore:
    """Hidden states of the frozen towers by what is rendered; `SailerCollator(features=...)` reads them.

    Made by `build`. Held in memory it is shared with forked data loader workers; workers that are spawned would each
    get a copy, so keep it on disk there.
    """

    def __init__(
        self,
        shelf: _Shelf,
        audio: dict[RenderingKey, str] | None,
        text: dict[str, str] | None,
        no_transcript: torch.Tensor | None,
    ) -> None:
        # Names on the shelf, by rendering and by transcript; None for a tower whose states are not kept.
        self._shelf, self._audio, self._text, self._no_transcript = shelf, audio, text, no_transcript

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
    ) -> FeatureStore:
        """Run the frozen towers over everything that the datasets will ever yield, the longest first.

        Args:
            model: its frozen towers' states are kept, on the device where it is.
            collator: decodes and mixes the clips, as it will in training.
            datasets: training, validation and test clips, with their audio.
            folder: where the states are kept, as safetensors; in memory by default. What a folder already holds of the
                same clips from the same weights is not computed again, by another run or process neither.
            dtype: "float32", "float16" or "bfloat16".
            batch_size: clips per forward pass.
            num_workers: processes that decode and mix.

        Raises:
            ValueError: no tower is frozen; mixes are new every epoch (see `PlannedDataset.renderings`); an unknown
                dtype; or less room than is needed. The message says what to change.
            CorpusError: two clips of the same id, or a clip that cannot be read.
        """
        config = model.config
        text_config = config.text_config if config.freeze_text else None
        if not (config.freeze_audio or text_config):
            raise ValueError("No tower is frozen, so no features can be kept: set cache_features to off.")
        if dtype not in DTYPES:
            raise ValueError(f"feature_dtype is {dtype!r}; choose one of {list(DTYPES)}.")
        shelf = _Shelf(None if folder is None else Path(folder), DTYPES[dtype])
        places, contents, transcripts = _renderings(datasets, collator.max_seconds)
        audio = text = no_transcript = None
        if config.freeze_audio:
            mark = _audio_mark(model, collator)
            audio = {key: _digest(mark, dtype, content) for key, content in contents.items()}
            missing = {name: places[key] for key, name in audio.items() if name not in shelf}
            batches = _audio_batches(model, collator, missing, shelf.dtype, batch_size, num_workers)
            shelf.add(
                batches, sum(place.seconds for place in missing.values()), what=f"{len(missing)} clips and mixes"
            )
        if text_config is not None:
            mark = _text_mark(model, collator)
            text = {transcript: _digest(mark, dtype, transcript) for transcript in transcripts}
            untold = {name: transcript for transcript, name in text.items() if name not in shelf}
            batches = _text_batches(model, collator, untold, shelf.dtype, batch_size)
            shelf.add(batches, len(untold), what=f"{len(untold)} transcripts")
            width = (text_config.num_hidden_layers + 1, text_config.hidden_size)
            no_transcript = torch.zeros(width, dtype=shelf.dtype)
        return cls(shelf, audio, text, no_transcript)

    def inputs(self, keys: Sequence[RenderingKey], transcripts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch, of those towers that are kept.

        Args:
            keys: `rendering_key` of each item.
            transcripts: of each item; "" gives zeros.

        Returns:
            `audio_hidden_states` (batch, [layers,] frames, width) with `attention_mask` (batch, frames), and
            `text_hidden_states` (batch, layers, width), in the dtype that they are kept in.

        Raises:
            ValueError: an item that was not among those of `build`.
        """
        batch = {}
        if self._audio is not None:
            states = [self._shelf[_known(self._audio, key)] for key in keys]
            frames = [state.shape[-2] for state in states]
            pad = torch.nn.functional.pad
            batch["audio_hidden_states"] = torch.stack(
                [pad(state, (0, 0, 0, max(frames) - own)) for state, own in zip(states, frames, strict=True)]
            )
            batch["attention_mask"] = (torch.arange(max(frames)) < torch.tensor(frames).unsqueeze(1)).long()
        if self._text is not None and self._no_transcript is not None:
            batch["text_hidden_states"] = torch.stack(
                [self._shelf[_known(self._text, text)] if text else self._no_transcript for text in transcripts]
            )
        return batch


class _Shelf:
    """Tensors by name, in memory or in safetensors files of a folder."""

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._tensors: dict[str, torch.Tensor] = {}
        self._open()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name] if name in self._tensors else self._files[name].get_tensor(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def add(self, batches: Iterable[tuple[float, dict[str, torch.Tensor]]], total: float, what: str) -> None:
        """Keep the tensors of all batches, if there is room.

        Args:
            batches: the amount of work in each, in any unit, and its tensors. From the first the size is extrapolated.
            total: the amount of work in all.
            what: what the tensors are of, for messages.

        Raises:
            ValueError: there is less room than is needed.
        """
        if not total:
            return
        pending: dict[str, torch.Tensor] = {}
        for number, (amount, tensors) in enumerate(batches):
            if number == 0:
                self._check_room(total / amount * _size(tensors), what)
            pending |= tensors
            if self.folder is not None and _size(pending) >= SHARD_BYTES:
                self._write(self.folder, pending)
                pending = {}
        if self.folder is None:
            self._tensors |= pending
        elif pending:
            self._write(self.folder, pending)
        self._open()

    def _check_room(self, needed: float, what: str) -> None:
        place = "memory" if self.folder is None else str(self.folder)
        free = psutil.virtual_memory().available if self.folder is None else shutil.disk_usage(self.folder).free
        size = f"about {_readable(needed)} in {place} ({str(self.dtype).removeprefix('torch.')})"
        if needed > free:
            raise ValueError(
                f"Features of {what} take {size}, where {_readable(free)} are free. Keep them in a "
                "folder with room (cache_features: disk, feature_cache_dir), at half the size (feature_dtype: "
                "float16), or not at all (cache_features: off)."
            )
        tqdm.write(f"Features of {what}: {size}, {_readable(free)} free", file=sys.stderr)

    def _write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        with replacing(folder / f"{uuid.uuid4().hex}.safetensors") as beside:
            save_file(tensors, beside)

    def _open(self) -> None:
        shards = sorted(self.folder.glob("*.safetensors")) if self.folder is not None else []
        opened = [safe_open(shard, framework="pt") for shard in shards]
        self._files = {name: shard for shard in opened for name in shard.keys()}  # noqa: SIM118 - not a mapping


def _known(names: Mapping[Key, str], key: Key) -> str:
    if key not in names:
        raise ValueError(f"No features were kept of {key!r}: build the store from every dataset that is to be run.")
    return names[key]


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


class _Place(NamedTuple):
    """Where something that is heard comes from: rows of a corpus in playing order, and the gap between them."""

    rows: Dataset
    clips: tuple[int, ...]
    gap: float
    seconds: float


class _Items(torch.utils.data.Dataset):
    """What the collator renders."""

    def __init__(self, places: list[_Place]) -> None:
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Item:
        place = self.places[index]
        return {"clips": [place.rows[clip] for clip in place.clips], "gap": place.gap}


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
            rows, renderings = dataset, [(row, -1, 0.0) for row in range(len(dataset))]
        narrow = rows.select_columns(["id", "audio", "transcript", "duration"])
        clips = list(tqdm(map(_identify, narrow), total=len(rows), desc="Identifying clips", leave=False))
        for first, second, gap in renderings:
            heard = (first,) if second < 0 else (first, second)
            item: Item = {"clips": [clips[clip] for clip in heard], "gap": gap}
            key = rendering_key(item)
            content = _digest([clips[clip]["audio"] for clip in heard], gap)
            if contents.setdefault(key, content) != content:
                raise CorpusError(
                    f"Clip {key[0]!r} has two recordings among the splits, and features are kept by id: rename one of "
                    "them, or set cache_features to off."
                )
            seconds = sum(clip["duration"] for clip in item["clips"]) + gap
            # An unknown duration counts as the longest.
            places[key] = _Place(rows, heard, gap, max_seconds if math.isnan(seconds) else min(seconds, max_seconds))
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


def _audio_batches(
    model: SailerForAudioClassification,
    collator: SailerCollator,
    missing: dict[str, _Place],
    dtype: torch.dtype,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """Seconds of audio in each batch, and the states of each clip's own frames by name; the longest clips first."""
    names = sorted(missing, key=lambda name: -missing[name].seconds)
    loader = torch.utils.data.DataLoader(
        _Items([missing[name] for name in names]),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=replace(collator, heads=(), features=None),
    )
    for number, batch in enumerate(tqdm(loader, desc="Encoding speech", unit="batch")):
        audio, mask = (batch[name].to(model.device) for name in (model.main_input_name, "attention_mask"))
        with torch.no_grad():
            states, mask = model.sailer.audio_hidden_states(audio, mask)
        chunk = names[number * batch_size : (number + 1) * batch_size]
        own = [state[..., frames.bool(), :].to("cpu", dtype) for state, frames in zip(states, mask, strict=True)]
        yield sum(missing[name].seconds for name in chunk), dict(zip(chunk, own, strict=True))


def _text_batches(
    model: SailerForAudioClassification,
    collator: SailerCollator,
    missing: dict[str, str],
    dtype: torch.dtype,
    batch_size: int,
) -> Iterator[tuple[float, dict[str, torch.Tensor]]]:
    """Number of transcripts in each batch, and their states by name; the longest first."""
    names = sorted(missing, key=lambda name: -len(missing[name]))
    for start in tqdm(range(0, len(names), batch_size), desc="Encoding transcripts", unit="batch"):
        chunk = names[start : start + batch_size]
        tokens = collator.processor.tokenize([missing[name] for name in chunk], len(chunk))
        with torch.no_grad():
            states = model.sailer.text_hidden_states(*(tokens[name].to(model.device) for name in TEXT_INPUTS))
        yield len(chunk), dict(zip(chunk, states.to("cpu", dtype).clone().unbind(), strict=True))


def _audio_mark(model: SailerForAudioClassification, collator: SailerCollator) -> str:
    """A digest of all that an audio tower's states depend on, but the audio."""
    config, processor = model.config, collator.processor
    return _digest(
        _plain(config.audio_config),
        config.audio_layers != "last",
        config.attend_to_padding,
        masks_padding(model.sailer.audio_encoder.config),
        processor.feature_extractor.to_dict(),
        processor.audio_padding,
        collator.max_seconds,
        *_weights(model.sailer.audio_encoder),
    )


def _text_mark(model: SailerForAudioClassification, collator: SailerCollator) -> str:
    tokenizer = collator.processor.tokenizer
    return _digest(_plain(model.config.text_config), tokenizer.get_vocab(), *_weights(model.sailer.text_encoder))


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


def _readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
