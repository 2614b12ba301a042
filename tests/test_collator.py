"""Batches of plain rows and of planned items: targets by hand, inputs as the processor makes them, clear errors."""

import pickle

import numpy as np
import pytest
import torch

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.sampler import EpochSampler, PlannedDataset
from sailer.data.schema import CorpusError, LabelSet, build_dataset

HEADS = ("primary", "secondary", "attributes", "sex", "age")
ANGRY, CONTEMPT, HAPPY, NEUTRAL = 0, 1, 4, 5
NAN = float("nan")


@pytest.fixture(scope="module")
def processor(tiny_sailer):
    return SailerProcessor.from_pretrained(tiny_sailer)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Happy and Contempt clips of one man and one woman; an unlabelled clip; one without agreement."""
    import soundfile

    folder = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    for index, seconds in enumerate((0.5, 0.8, 0.3, 1.2)):
        soundfile.write(folder / f"{index}.wav", 0.1 * generator.standard_normal(int(16000 * seconds)), 16000)
    votes = np.zeros((4, 9))
    votes[0, [HAPPY, NEUTRAL]] = 3, 1
    votes[1, CONTEMPT] = 2
    votes[3, [ANGRY, HAPPY]] = 1, 1
    secondary = np.zeros((4, 17))
    secondary[0, [2, 3]] = 1, 1
    return build_dataset(
        {
            "id": ["a", "b", "c", "d"],
            "audio": [{"path": str(folder / f"{index}.wav"), "bytes": None} for index in range(4)],
            "duration": [0.5, 0.8, 0.3, 1.2],
            "transcript": ["i am so happy", "leave me alone", "", "the lazy dog"],
            "votes": votes,
            "secondary_votes": secondary,
            "attributes": [[0.5, 0.75, 1.0], [0.25, NAN, 0.5], [NAN] * 3, [0.5] * 3],
            "label": [HAPPY, CONTEMPT, -100, -1],
            "sex": ["male", "female", "", "male"],
            "age": [30, NAN, 40, 30],
        }
    )


def collator(processor, **options):
    return SailerCollator(processor, LabelSet(), HEADS, **options)


def test_targets_of_plain_rows(processor, rows):
    batch = collator(processor)(list(rows))
    labels = np.zeros((4, 9), dtype=np.float32)
    labels[0, [HAPPY, NEUTRAL]] = 0.75, 0.25
    labels[1, CONTEMPT] = 1
    labels[2] = NAN
    labels[3, [ANGRY, HAPPY]] = 0.5
    np.testing.assert_array_equal(batch["labels"], labels)
    secondary = np.full((4, 17), NAN, dtype=np.float32)
    secondary[0] = 0
    secondary[0, [2, 3]] = 0.5
    np.testing.assert_array_equal(batch["secondary_labels"], secondary)
    np.testing.assert_array_equal(
        batch["attribute_labels"], np.array([[0.5, 0.75, 1], [0.25, NAN, 0.5], [NAN] * 3, [0.5] * 3])
    )
    assert batch["sex_labels"].tolist() == [1, 0, -100, 1]
    assert batch["consensus"].tolist() == [HAPPY, CONTEMPT, -100, -1]
    np.testing.assert_array_equal(batch["age_labels"], [30, NAN, 40, 30])
    dtypes = {name: batch[name].dtype for name in batch if name.endswith("labels")}
    assert dtypes.pop("sex_labels") == torch.long and set(dtypes.values()) == {torch.float32}


def test_hard_targets_of_plain_rows(processor, rows):
    labels = collator(processor, hard_targets=True)(list(rows))["labels"]
    np.testing.assert_array_equal(labels[:2], np.eye(9)[[HAPPY, CONTEMPT]])
    assert labels[2:].isnan().all()


def test_inputs_are_the_processors(processor, rows):
    from sailer.audio_sailer import load_audio

    batch = collator(processor, max_seconds=1.0)(list(rows))
    waveforms = [load_audio(row["audio"], max_seconds=1.0) for row in rows]
    expected = processor(audio=waveforms, text=list(rows["transcript"]), sampling_rate=16000)
    targets = {"labels", "secondary_labels", "attribute_labels", "sex_labels", "age_labels", "consensus"}
    assert set(batch) == set(expected) | targets
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, rtol=0, atol=0)
    assert len(waveforms[3]) == 16000
    assert batch["text_attention_mask"].sum(1).tolist()[2] == 0


def mix_of(rows, first, second, **plan):
    targets = {"target": [0.5] * 9, "hard_target": [0.25] * 9, "secondary_target": [NAN] * 17}
    return {
        "clips": [rows[first], rows[second]],
        "gap": 0.5,
        "attribute_target": [0.5] * 3,
        "drop_text": False,
        **targets,
        **plan,
    }


def test_planned_items(processor, rows):
    items = [mix_of(rows, 0, 1), mix_of(rows, 3, 0, drop_text=True)]
    batch = collator(processor)(items)
    assert batch["attention_mask"].sum(1).tolist() == [180, 220]  # (0.5 + 0.8 + 0.5) s and (1.2 + 0.5 + 0.5) s
    np.testing.assert_array_equal(batch["labels"], np.full((2, 9), 0.5))
    np.testing.assert_array_equal(batch["attribute_labels"], np.full((2, 3), 0.5))
    assert batch["secondary_labels"].isnan().all() and "consensus" not in batch
    # Sex and age stay where the two speakers share them.
    assert batch["sex_labels"].tolist() == [-100, 1]
    np.testing.assert_array_equal(batch["age_labels"], [NAN, 30])
    expected = processor(audio=[np.zeros(16000)] * 2, text=["i am so happy leave me alone", ""], sampling_rate=16000)
    torch.testing.assert_close(batch["input_ids"], expected["input_ids"])
    torch.testing.assert_close(batch["text_attention_mask"], expected["text_attention_mask"])
    hard = collator(processor, hard_targets=True)(items)["labels"]
    np.testing.assert_array_equal(hard, np.full((2, 9), 0.25))


def test_a_long_mix_is_cropped(processor, rows):
    batch = collator(processor, max_seconds=1.5)([mix_of(rows, 1, 3)])
    assert batch["attention_mask"].sum(1).tolist() == [150]


def test_only_the_targets_of_the_models_heads(tiny_speech_sailer, rows):
    speech_only = SailerProcessor.from_pretrained(tiny_speech_sailer)
    batch = SailerCollator(speech_only, LabelSet(), ["primary"])(list(rows))
    assert set(batch) == {"input_features", "attention_mask", "labels", "consensus"}


def test_the_model_takes_a_batch(tiny_sailer, processor, rows):
    model = SailerForAudioClassification.from_pretrained(tiny_sailer)
    batch = collator(processor)(list(rows))
    del batch["consensus"]
    with torch.no_grad():
        outputs = model(**batch)
    assert outputs.loss.isfinite() and outputs.logits.shape == (4, 9)


def test_batches_are_the_same_from_workers(processor, rows):
    dataset = PlannedDataset(rows, AugmentationSettings(annotation_dropout=0.2, mixing_probability=0.9), seed=1)
    batches = [
        list(
            torch.utils.data.DataLoader(
                dataset,
                batch_size=2,
                sampler=EpochSampler(len(dataset), 1),
                collate_fn=collator(processor),
                num_workers=workers,
            )
        )
        for workers in (0, 2)
    ]
    for own, others in zip(*batches, strict=True):
        for name, value in own.items():
            torch.testing.assert_close(others[name], value, rtol=0, atol=0, equal_nan=True)


def test_it_can_be_sent_to_a_worker(processor, rows):
    sent = pickle.loads(pickle.dumps(collator(processor, hard_targets=True)))
    batch = sent(list(rows))
    np.testing.assert_array_equal(batch["labels"][0], np.eye(9)[HAPPY])


def test_unknown_head(processor):
    with pytest.raises(ValueError, match=r"Unknown heads \['mood'\]"):
        SailerCollator(processor, LabelSet(), ["primary", "mood"])


def test_a_clip_that_is_too_short_is_named(processor):
    short = build_dataset({"id": ["blink"], "votes": [[1] + [0] * 8]})[0]
    short["audio"] = {"array": np.zeros(160, dtype=np.float32), "sampling_rate": 16000}
    with pytest.raises(CorpusError, match=r"'blink' is 0\.010 s long; the minimum is 0\.1 s"):
        collator(processor)([short])
