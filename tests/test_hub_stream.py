"""Training on a dataset that is streamed: every clip once whatever the processes and workers, and what is refused."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
from datasets import Audio, ClassLabel, Dataset, Features, Value

from sailer.cli import main
from sailer.data import CorpusError, LabelSet, load_corpus
from sailer.data.augmentation import AugmentationSettings
from sailer.data.corpora.hub_stream import stream_source
from sailer.data.sampler import PlannedDataset
from sailer.data.streaming import StreamedClips
from sailer.training.trainer import SailerTrainer

from .sounds import noise
from .test_resume import assert_equal_systems

FOUR = LabelSet(("Neutral", "Happy", "Sad", "Angry"), majority=("Neutral",))
COLUMNS = {"audio": "speech", "label": "emotion", "id": "name"}
SHARDS = (5, 9, 2, 7)  # clips of each file of the training split


def wav(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(0.3 + 0.01 * seed, seed), 16000, format="WAV")
    return file.getvalue()


def write(path: Path, first: int, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"speech": {"path": Value("string"), "bytes": Value("binary")}, "name": Value("string")}
    features["emotion"] = ClassLabel(names=["Neutral", "Happy", "Sad", "Angry"])
    rows = {
        "speech": [{"path": "a.wav", "bytes": wav(first + row)} for row in range(size)],
        "name": [f"clip{first + row}" for row in range(size)],
        "emotion": [(first + row) % 4 for row in range(size)],
    }
    Dataset.from_dict(rows, Features(features)).cast_column("speech", Audio(decode=False)).to_parquet(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, first = tmp_path_factory.mktemp("stream") / "set", 0
    for shard, size in enumerate(SHARDS):
        write(folder / "data" / f"train-{shard:05d}-of-00004.parquet", first, size)
        first += size
    write(folder / "data" / "validation-00000-of-00001.parquet", 100, 8)
    return folder


def planned(dataset: Path, **options: object) -> PlannedDataset:
    rows = load_corpus("hub", dataset, label_set=FOUR, columns=COLUMNS, streamed="train", **options)["train"]
    return PlannedDataset(rows, AugmentationSettings(), FOUR)


def heard(clips: StreamedClips, workers: int = 0) -> list[list[str]]:
    loader = torch.utils.data.DataLoader(clips, batch_size=None, num_workers=workers, collate_fn=list)
    return [[item["clips"][0]["id"] for item in batch] for batch in loader]


def test_annotations_are_those_of_the_dataset_at_hand_and_the_recordings_stay(dataset: Path) -> None:
    given = {"label_set": FOUR, "columns": COLUMNS}
    streamed, whole = (load_corpus("hub", dataset, **given, **more) for more in ({"streamed": "train"}, {}))
    assert [recording["bytes"] for recording in streamed["train"]["audio"]] == [None] * 23
    names = ["id", "votes", "label"]
    assert streamed["train"].select_columns(names)[:] == whole["train"].select_columns(names)[:]
    assert (
        streamed["validation"].select_columns([*names, "audio"])[:]
        == whole["validation"].select_columns([*names, "audio"])[:]
    )
    source = stream_source(dataset, "train", columns=COLUMNS)
    for row in streamed["train"]:
        recording = next(source.recordings(row["shard"], row["row"]))
        assert recording == {"path": None, "bytes": wav(int(row["id"][4:]))}


def bytes_read(path: Path) -> int:
    """By this process, while the annotations of the dataset are read."""
    before = psutil.Process().io_counters().read_chars
    assert len(load_corpus("hub", path, label_set=FOUR, columns=COLUMNS, streamed="train")["train"])
    return psutil.Process().io_counters().read_chars - before


@pytest.mark.skipif(not hasattr(psutil.Process, "io_counters"), reason="this system does not count what is read")
def test_annotations_are_read_without_the_recordings(dataset: Path, tmp_path: Path) -> None:
    bytes_read(dataset)  # modules that are imported at first are read too
    write(tmp_path / "set" / "train-00000-of-00001.parquet", 500, 12)  # of 5.3 s and more
    write(tmp_path / "set" / "validation-00000-of-00001.parquet", 0, 1)
    recordings = sum(len(wav(500 + row)) for row in range(12))
    assert recordings > 2e6 and bytes_read(tmp_path / "set") < recordings / 5


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (2, 0), (3, 2), (1, 3)])
def test_every_clip_is_heard_once_an_epoch(dataset: Path, size: int, workers: int) -> None:
    source, rows = stream_source(dataset, "train", columns=COLUMNS), planned(dataset)
    epochs = []
    for epoch in range(2):
        batches = []
        for index in range(size):
            clips = StreamedClips(rows, source, 2, seed=5, index=index, size=size, buffer=4)
            clips.set_epoch(epoch)
            own = heard(clips, workers)
            assert len(own) == len(clips) == math.ceil(math.ceil(23 / size) / 2), "as many batches in every process"
            batches += own
        counts = Counter(name for batch in batches for name in batch)
        assert set(counts) == {f"clip{row}" for row in range(23)}
        assert sum(counts.values()) == math.ceil(23 / size) * size and max(counts.values()) <= 2
        epochs.append(batches)
    assert epochs[0] != epochs[1]


def test_an_item_is_the_plans_with_its_own_recording(dataset: Path) -> None:
    rows = planned(dataset)
    clips = StreamedClips(rows, stream_source(dataset, "train", columns=COLUMNS), 23, seed=1)
    clips.set_epoch(3)
    (batch,) = list(clips)
    for item in batch:
        number = int(item["clips"][0]["id"][4:])
        assert item["clips"][0]["audio"]["bytes"] == wav(number)
        expected = rows[3 * len(rows) + number]
        assert item.keys() == expected.keys() and np.array_equal(item["target"], expected["target"])


def test_a_dataset_that_was_changed_while_it_was_read_is_told_of(dataset: Path) -> None:
    rows = planned(dataset)

    class Shorter:
        def recordings(self, shard: int, first: int):
            return iter([{"path": None, "bytes": b""}] * (1 - first))

    with pytest.raises(CorpusError, match=r"is no longer in shard \d of the stream"):
        list(StreamedClips(rows, Shorter(), 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_fractions": {"validation": 0.1}}, "leave split_fractions"),
        ({"minimum_seconds": 1.0}, "clips without a duration"),
        ({"streamed": "test"}, r"no split 'test' to stream; it has \['train', 'validation'\]"),
        ({"columns": COLUMNS | {"audio": "name"}}, "does not hold the recordings"),
        ({"columns": COLUMNS | {"audio": "sound"}}, "has no column 'sound'"),
    ],
)
def test_what_cannot_be_streamed(dataset: Path, options: dict, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        load_corpus("hub", dataset, **{"label_set": FOUR, "columns": COLUMNS, "streamed": "train"} | options)


def test_a_saved_folder_or_no_dataset_is_not_streamed(tmp_path: Path) -> None:
    Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(CorpusError, match="is on this disk"):
        load_corpus("hub", tmp_path / "saved", streamed="train")
    with pytest.raises(CorpusError, match=r"cannot stream .*nowhere"):
        load_corpus("hub", tmp_path / "nowhere", streamed="train")


def arguments(dataset: Path, folder: Path, **changes: object) -> list[str]:
    given = {
        "corpus": "hub",
        "data_dir": dataset,
        "corpus_options": json.dumps({"columns": COLUMNS}),
        "streaming": "true",
        "labels": "[Neutral, Happy, Sad, Angry]",
        "majority_labels": "[Neutral]",
        "validation_split": "validation",
        "audio_backbone": "tiny-whisper",
        "text_backbone": "null",
        "heads": "[primary]",
        "hidden_size": 16,
        "mixing_probability": 0,
        "freeze_audio": "true",
        "freeze_text": "true",
        "frame_norm": "true",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "shuffled_label_baseline": "false",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "dataloader_num_workers": 0,
        "output_dir": folder,
    }
    return ["demo", *(f"--{name}={value}" for name, value in (given | changes).items())]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "synthetic"}, "streaming is true and corpus is 'synthetic'"),
        ({"mixing_probability": 0.3}, r"mixing_probability is 0\.3 but streaming is true"),
        ({"cache_features": "memory"}, "cache_features is 'memory' but streaming is true"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length' but streaming is true"),
        ({"preview": 2}, "preview is 2 but streaming is true"),
        (
            {"dataloader_persistent_workers": "true", "dataloader_num_workers": 1},
            "dataloader_persistent_workers is true",
        ),
        ({"streaming_buffer": 0}, "streaming_buffer"),
        ({"objective": "distil", "teacher": "a_teacher"}, "objective is 'distil' but streaming is true"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    dataset: Path, tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", *arguments(dataset, tmp_path / "out", **changes)]) == 2
    assert re.search(message, capsys.readouterr().err)


STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 20}


@pytest.mark.slow
def test_a_streamed_run_that_was_cut_in_mid_epoch_ends_with_the_same_weights(dataset: Path, tmp_path: Path) -> None:
    """Six steps an epoch: the run is cut after the eighth."""
    assert main(["train", *arguments(dataset, tmp_path / "whole", **STEPS)]) == 0
    step, seen = SailerTrainer.training_step, []

    def cut(self: SailerTrainer, *given: object, **more: object) -> object:
        if self.state.global_step == 9 and not seen:
            raise KeyboardInterrupt
        return step(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SailerTrainer, "training_step", cut)
        assert main(["train", *arguments(dataset, tmp_path / "cut", **STEPS)]) == 130
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-8").is_dir()
    assert main(["train", *arguments(dataset, tmp_path / "cut", **STEPS, resume_from_checkpoint="true")]) == 0
    assert_equal_systems(tmp_path / "whole", tmp_path / "cut")
    log = json.loads((tmp_path / "cut" / "training_log.json").read_text())
    assert max(entry["step"] for entry in log) == 12


@pytest.mark.slow
def test_two_processes_train_on_a_stream(dataset: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).resolve().parents[1] / "train.py"
    command = [*launch, str(script), *arguments(dataset, tmp_path / "two", dataloader_num_workers=1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Trained on 48 clips" in done.stdout  # 12 of each process in each of two epochs: the 23, and one to fill up
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["validation"]["clips"] == 8
