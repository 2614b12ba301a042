"""Keys that carry the epoch, and items that are the same in whichever process they are looked up."""

import io
import pickle
from itertools import chain

import numpy as np
import pytest
import soundfile
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from sailer.data.augmentation import AugmentationSettings, plan_epoch
from sailer.data.sampler import EpochSampler, LongestFirst, PlannedDataset, like_length
from sailer.data.schema import CorpusError, LabelSet, build_dataset

EVERYTHING = {
    "annotation_dropout": 0.2,
    "mixing_probability": 0.5,
    "text_dropout": 0.3,
    "undersample_majority": 0.2,
    "speed_perturbation": 0.25,
}


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    label = generator.integers(0, 9, 60)
    return build_dataset(
        {
            "id": [f"clip{i}" for i in range(60)],
            "label": label,
            "votes": generator.multinomial(5, 0.5 * np.eye(9)[label] + 0.5 / 9),
            "secondary_votes": generator.integers(0, 2, (60, 17)),
        }
    )


def identity(items):
    return items


def planned(rows, **options):
    return PlannedDataset(rows, AugmentationSettings(**{**EVERYTHING, **options}), LabelSet(), seed=5)


def passes(dataset, epochs, **options):
    """What a loader yields in consecutive epochs."""
    sampler = EpochSampler(len(dataset), seed=5)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, collate_fn=identity, **options)
    yielded = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yielded.append([item for batch in loader for item in batch])
    return yielded


def test_sampler_keys():
    sampler = EpochSampler(10, seed=3)
    first = list(sampler)
    assert len(sampler) == 10 and sorted(first) == list(range(10)) != first
    assert list(sampler) == first
    sampler.set_epoch(4)
    later = list(sampler)
    assert sorted(later) == list(range(40, 50))
    assert [key - 40 for key in later] != first
    resumed = EpochSampler(10, seed=3)
    resumed.set_epoch(4)
    assert list(resumed) == later
    assert list(EpochSampler(10, seed=4)) != first
    assert list(EpochSampler(3, shuffle=False)) == [0, 1, 2]


def corpus_like(clips, seed=0):
    """Durations as MSP-Podcast has them: 2.75 to 11 s, 5.8 s in the mean."""
    generator = np.random.default_rng(seed)
    seconds = np.clip(generator.lognormal(np.log(5.4), 0.42, clips), 2.75, 11)
    return seconds


def share_of_speech(lengths, order, batch):
    batches = [lengths[order[start : start + batch]] for start in range(0, len(order), batch)]
    return lengths.sum() / sum(len(own) * own.max() for own in batches)


@pytest.mark.parametrize("clips", [84_260, 1_440])
def test_batches_of_like_length_are_full_of_speech(clips):
    lengths = corpus_like(clips)
    assert lengths.mean() == pytest.approx(5.8, abs=0.1)
    random = np.array(list(EpochSampler(clips, seed=1)))
    alike = np.array(list(EpochSampler(clips, seed=1, lengths=lambda epoch: lengths, step=32)))
    assert share_of_speech(lengths, random, 32) < 0.6 < 0.95 < share_of_speech(lengths, alike, 32)


def test_batches_of_like_length_are_shuffled_and_a_function_of_seed_and_epoch():
    lengths = corpus_like(1003)
    asked = []

    def of_epoch(epoch):
        asked.append(epoch)
        return lengths

    def order(epoch, seed=2, step=8):
        sampler = EpochSampler(len(lengths), seed=seed, lengths=of_epoch, step=step)
        sampler.set_epoch(epoch)
        return np.array(list(sampler)) - epoch * len(lengths)

    first = order(0)
    assert sorted(first) == list(range(1003)) and asked == [0]
    assert np.array_equal(order(0), first)
    others = [order(0, seed=3), order(1), order(5)]
    steps = {frozenset(step) for step in first[:1000].reshape(-1, 8).tolist()}
    for other in others:
        assert sorted(other) == list(range(1003))
        assert len(steps & {frozenset(step) for step in other[:1000].reshape(-1, 8).tolist()}) < 10
    # Neither do the lengths rise or fall in the course of an epoch, nor are the last rows, too few for a step, any.
    means = lengths[first[:1000]].reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(125))[0, 1]) < 0.3
    assert np.ptp(lengths[first[1000:]]) < 0.5
    assert len({round(float(lengths[order(epoch)[1000:]].mean()), 1) for epoch in range(8)}) > 4


@pytest.mark.parametrize("clips", [0, 1, 7, 8, 9, 401, 808])
@pytest.mark.parametrize("step", [1, 8])
def test_every_row_comes_once_whatever_their_number(clips, step):
    lengths = corpus_like(clips)
    order = like_length(lengths, step, np.random.default_rng(0))
    assert sorted(order) == list(range(clips))


@pytest.mark.parametrize(("accumulation", "batch"), [(1, 4), (2, 2)])
def test_two_processes_share_steps_of_like_length(accumulation, batch):
    lengths = corpus_like(64)

    def batches(processes, size):
        sampler = EpochSampler(64, seed=5, lengths=lambda epoch: lengths, step=8)
        loader = DataLoader(range(64), batch_size=size, sampler=sampler, collate_fn=torch.tensor)
        shards = [
            list(prepare_data_loader(loader, num_processes=processes, process_index=index, put_on_device=False))
            for index in range(processes)
        ]
        return [[key for shard in batch for key in shard.tolist()] for batch in zip(*shards, strict=True)]

    shared = batches(2, batch)
    steps = [list(chain(*shared[start : start + accumulation])) for start in range(0, len(shared), accumulation)]
    assert steps == batches(1, 8)


def test_seconds_are_those_of_what_is_rendered(tmp_path):
    from sailer.data.rendering import render

    generator = np.random.default_rng(1)
    waveforms = [0.1 * generator.standard_normal(samples) for samples in generator.integers(3000, 60000, 30)]
    buffers = [io.BytesIO() for _ in waveforms]
    for buffer, waveform in zip(buffers, waveforms, strict=True):
        soundfile.write(buffer, waveform, 16000, format="WAV")
    rows = build_dataset(
        {
            "id": [f"clip{index}" for index in range(30)],
            "audio": [{"bytes": buffer.getvalue()} for buffer in buffers],
            "duration": [len(waveform) / 16000 for waveform in waveforms],
            "label": generator.integers(0, 9, 30),
            "votes": 1 + generator.integers(0, 3, (30, 9)),
        }
    )
    dataset = planned(rows, mixing_probability=1.0, max_seconds=3.0)
    seconds = dataset.seconds(2)
    rendered = [len(render(dataset[2 * len(dataset) + row], 16000, 3.0)) / 16000 for row in range(len(dataset))]
    np.testing.assert_allclose(seconds, rendered, atol=2e-4)
    assert 3.0 in rendered and min(rendered) < 1.5 and (dataset.plan(2).with_format("numpy")["gap"][:] < 0).any()
    unknown = rows.remove_columns("duration").add_column("duration", [float("nan")] * 30)
    assert set(planned(unknown, max_seconds=3.0, speed_perturbation=0).seconds(0)) == {3.0}


def test_the_longest_come_first():
    assert list(LongestFirst(np.array([1.0, 3.0, np.nan, 3.0, 2.0]))) == [2, 1, 3, 4, 0]


def test_items_are_what_the_plan_says(rows):
    dataset = planned(rows)
    plan = plan_epoch(rows, dataset.settings, LabelSet(), 5, 2)
    assert len(dataset) == len(plan)
    mixes = 0
    for row, expected in enumerate(plan):
        item = dataset[2 * len(dataset) + row]
        own, partner = rows[expected["index"]]["id"], expected["partner"]
        ids = [own] if partner < 0 else [own, rows[partner]["id"]]
        assert [clip["id"] for clip in item["clips"]] == (ids[::-1] if expected["partner_first"] else ids)
        assert item["gap"] == expected["gap"] and item["drop_text"] == expected["drop_text"]
        np.testing.assert_array_equal(item["target"], expected["target"])
        mixes += partner >= 0
    assert 0 < mixes < len(plan)


@pytest.mark.parametrize("variants", [0, 2])
@pytest.mark.parametrize(
    "workers",
    [
        {},
        {"persistent_workers": True},
        pytest.param({"persistent_workers": True, "multiprocessing_context": "spawn"}, marks=pytest.mark.slow),
    ],
)
def test_workers_see_what_the_main_process_sees(rows, variants, workers):
    alone = passes(planned(rows, augmentation_variants=variants), 3)
    beside = passes(planned(rows, augmentation_variants=variants), 3, num_workers=2, **workers)
    for own, others in zip(alone, beside, strict=True):
        np.testing.assert_equal(others, own)

    def heard(items):
        return sorted((str([clip["id"] for clip in item["clips"]]), item["gap"]) for item in items)

    assert heard(alone[0]) != heard(alone[1])
    assert (heard(alone[0]) == heard(alone[2])) == (variants == 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_of_accelerate_share_an_epoch(rows, workers):
    dataset = planned(rows)
    sampler = EpochSampler(len(dataset), seed=5)
    loader = DataLoader(range(10**6), batch_size=4, sampler=sampler, collate_fn=torch.tensor, num_workers=workers)
    shards = [
        prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False) for index in range(2)
    ]
    for epoch in (0, 1, 3):
        seen = []
        for shard in shards:
            shard.set_epoch(epoch)
            seen.append([key for batch in shard for key in batch.tolist()])
        expected = set(range(epoch * len(dataset), (epoch + 1) * len(dataset)))
        assert set(seen[0]) | set(seen[1]) == expected
        assert len(set(seen[0]) & set(seen[1])) <= 8, "only the duplicates that even out the last batches"


def test_only_the_plans_in_use_are_kept(rows):
    fresh, cycling = planned(rows), planned(rows, augmentation_variants=4)
    for dataset in (fresh, cycling):
        for epoch in range(6):
            dataset[epoch * len(dataset)]
    assert list(fresh._plans) == [4, 5]
    assert list(cycling._plans) == [0, 1, 2, 3]
    assert not pickle.loads(pickle.dumps(fresh))._plans


def test_renderings_are_everything_that_is_heard(rows):
    dataset = planned(rows, augmentation_variants=3)
    items = [dataset[key] for key in range(3 * len(dataset))]
    heard = {(tuple(clip["id"] for clip in item["clips"]), item["gap"], item["speed"]) for item in items}
    renderings = dataset.renderings()
    named = {
        ((rows[first]["id"],) if second < 0 else (rows[first]["id"], rows[second]["id"]), gap, speed)
        for first, second, gap, speed in renderings
    }
    assert named == heard and len(renderings) == len(heard)
    assert planned(rows, mixing_probability=0, speed_perturbation=0).renderings() == [
        (row, -1, 0.0, 1.0) for row in range(60)
    ]


def test_fresh_mixes_cannot_be_listed(rows):
    with pytest.raises(ValueError, match=r"With audio mixing every epoch has mixes .*Set augmentation_variants"):
        planned(rows).renderings()


def test_fresh_speeds_cannot_be_listed(rows):
    with pytest.raises(
        ValueError, match=r"With speed_perturbation every epoch has speeds .*Set augmentation_variants"
    ):
        planned(rows, mixing_probability=0).renderings()


def test_settings_that_do_not_fit_the_corpus_are_refused_at_once(rows):
    no_minority = rows.filter(lambda label: label in (0, 4, 5, 6, 8), input_columns="label")
    with pytest.raises(CorpusError, match="minority class"):
        planned(no_minority)
