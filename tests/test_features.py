"""Kept hidden states give the logits that the towers give, are computed once, and refuse what cannot be kept."""

import pickle
import time

import numpy as np
import psutil
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, WhisperConfig, WhisperFeatureExtractor

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.data.augmentation import AugmentationSettings
from sailer.data.collator import SailerCollator
from sailer.data.rendering import rendering_key, transcript_of
from sailer.data.sampler import PlannedDataset
from sailer.data.schema import CorpusError, LabelSet, build_dataset
from sailer.training import features as features_module
from sailer.training import shelf as shelf_module
from sailer.training.features import FeatureStore

from .sounds import noise

HEADS = ("primary", "secondary", "attributes", "sex", "age")
TRANSCRIPTS = ["i am so happy about this", "leave me alone", "", "the lazy dog"]
MIXED = {"annotation_dropout": 0.2, "mixing_probability": 0.8, "text_dropout": 0.2, "augmentation_variants": 2}
MIXED |= {"speed_perturbation": 0.2}


def clips(folder, count, prefix, seed):
    """Clips of 0.3 to 1.2 s, every fourth one without a transcript."""
    generator = np.random.default_rng(seed)
    paths = [folder / f"{prefix}{index}.wav" for index in range(count)]
    seconds = generator.uniform(0.3, 1.2, count)
    for index, (path, duration) in enumerate(zip(paths, seconds, strict=True)):
        soundfile.write(path, noise(duration, seed=100 * seed + index), 16000)
    label = np.resize([5, 4, 1, 5, 3], count)
    return build_dataset(
        {
            "id": [path.stem for path in paths],
            "audio": [{"path": str(path), "bytes": None} for path in paths],
            "duration": seconds,
            "transcript": np.resize(TRANSCRIPTS, count).tolist(),
            "votes": 3 * np.eye(9)[label],
            "label": label,
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return clips(folder, 12, "train", 0), clips(folder, 5, "test", 1)


@pytest.fixture(scope="module")
def system(tiny_sailer):
    return SailerForAudioClassification.from_pretrained(tiny_sailer), SailerProcessor.from_pretrained(tiny_sailer)


def collator(processor, features=None, heads=HEADS, max_seconds=2.0):
    return SailerCollator(processor, LabelSet(), heads, max_seconds=max_seconds, features=features)


def planned(rows, **options):
    return PlannedDataset(rows, AugmentationSettings(**{**MIXED, **options}), seed=1)


def outputs(model, batch):
    model.eval()
    batch.pop("consensus", None)
    with torch.no_grad():
        return {name: value for name, value in model(**batch).items() if value is not None}


def assert_same_outputs(model, processor, store, items):
    direct, kept = collator(processor)(items), collator(processor, store)(items)
    for name in direct:
        if name.endswith("labels"):
            torch.testing.assert_close(kept[name], direct[name], equal_nan=True)
    direct, kept = outputs(model, direct), outputs(model, kept)
    assert set(direct) == set(kept)
    for name, value in direct.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=5e-5, equal_nan=True)


def count_calls(monkeypatch, model):
    """Clips and transcripts that the towers see from now on."""
    seen = {"audio": 0, "text": 0}
    for tower in seen:
        method = getattr(model.sailer, f"{tower}_hidden_states")

        def counting(inputs, mask, tower=tower, method=method):
            seen[tower] += len(inputs)
            return method(inputs, mask)

        monkeypatch.setattr(model.sailer, f"{tower}_hidden_states", counting)
    return seen


@pytest.mark.parametrize("on_disk", [False, True])
def test_same_outputs_with_and_without(system, corpus, tmp_path, monkeypatch, capsys, on_disk):
    model, processor = system
    train, test = planned(corpus[0]), corpus[1]
    with monkeypatch.context() as patch:
        seen = count_calls(patch, model)
        folder = tmp_path if on_disk else None
        store = FeatureStore.build(model, collator(processor), [train, test], folder=folder, batch_size=4)
    everything = [train[key] for key in range(2 * len(train))]
    mixes = sum(len(item["clips"]) == 2 for item in everything)
    assert mixes > 3
    assert seen["audio"] == len(train.renderings()) + len(test)
    assert "Features of" in capsys.readouterr().err
    # Other batches than those of the pass, over both variants and their repetition in later epochs.
    assert_same_outputs(model, processor, store, everything)
    assert_same_outputs(model, processor, store, [train[2 * len(train)], train[5]])
    assert_same_outputs(model, processor, store, list(test))
    batch = collator(processor, store)(everything[:3])
    assert not {"input_features", "input_ids", "text_attention_mask"} & set(batch)
    assert batch["audio_hidden_states"].dtype == torch.float32


@pytest.mark.parametrize("layers", ["weighted", "weighted_norm", "concat_norm"])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_all_layers_of_a_waveform_encoder(tmp_path, corpus, layers, norm):
    from sailer.training.tiny_backbones import make_tiny_wavlm

    backbone = make_tiny_wavlm(tmp_path / "wavlm", norm=norm)
    model = SailerForAudioClassification.from_audio_text_pretrained(backbone, audio_layers=layers, heads=HEADS).eval()
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(backbone))
    store = FeatureStore.build(model, collator(processor), [corpus[1]], batch_size=2)
    assert collator(processor, store)(list(corpus[1]))["audio_hidden_states"].shape[:2] == (5, 4)
    assert_same_outputs(model, processor, store, list(corpus[1]))


@pytest.mark.slow
def test_whisper_on_real_speech(shared, whisper_base):
    recordings = sorted((shared / "corpora" / "ravdess").rglob("*.ogg"))[:40:8]
    seconds = [soundfile.info(path).duration for path in recordings]
    rows = build_dataset(
        {
            "id": [path.stem for path in recordings],
            "audio": [{"path": str(path), "bytes": None} for path in recordings],
            "duration": seconds,
            "votes": np.eye(9)[[5, 4, 1, 3, 0]],
            "label": [5, 4, 1, 3, 0],
        }
    )
    torch.manual_seed(0)
    model = SailerForAudioClassification.from_audio_text_pretrained(whisper_base)
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(whisper_base))
    train = planned(rows, mixing_probability=1)
    store = FeatureStore.build(model, collator(processor, max_seconds=5.0), [train, rows], batch_size=3)
    items = [train[key] for key in range(5)]
    direct, kept = (
        outputs(model, collator(processor, features, ["primary"], 5.0)(items)) for features in (None, store)
    )
    torch.testing.assert_close(kept["logits"], direct["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_close(system, corpus, dtype):
    model, processor = system
    store = FeatureStore.build(model, collator(processor), [corpus[1]], dtype=dtype)
    items = list(corpus[1])
    kept = collator(processor, store)(items)
    assert kept["audio_hidden_states"].dtype == getattr(torch, dtype)
    full, half = outputs(model, collator(processor)(items)), outputs(model, kept)
    for name in set(full) - {"loss"}:
        # Every clip's output is nearest to its own, by far.
        distance = torch.cdist(half[name].reshape(5, -1), full[name].reshape(5, -1))
        own = distance.diagonal()
        assert (10 * own < (distance + torch.diag(torch.full((5,), torch.inf))).amin(dim=1)).all(), (name, distance)


def test_half_precision_of_the_towers_is_close_and_kept_apart(system, corpus, tmp_path, monkeypatch):
    model, processor = system
    exact = FeatureStore.build(model, collator(processor), [corpus[1]], folder=tmp_path)
    seen = count_calls(monkeypatch, model)
    half = FeatureStore.build(model, collator(processor), [corpus[1]], folder=tmp_path, precision=torch.bfloat16)
    assert seen["audio"] == 5
    items = list(corpus[1])
    keys, transcripts = [rendering_key(item) for item in items], [transcript_of(item) for item in items]
    for name, states in exact.inputs(keys, transcripts).items():
        other = half.inputs(keys, transcripts)[name]
        if name == "attention_mask":
            assert torch.equal(states, other)
        else:
            assert 1e-5 < (states - other).abs().max() / states.abs().max() < 5e-2


def test_only_the_text_tower(tiny_whisper, tiny_text, corpus, system):
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, tiny_text, freeze_audio=False)
    processor = system[1]
    store = FeatureStore.build(model, collator(processor), [corpus[1]])
    batch = collator(processor, store)(list(corpus[1]))
    assert {"input_features", "text_hidden_states"} <= set(batch) and "input_ids" not in batch
    assert_same_outputs(model, processor, store, list(corpus[1]))


def test_only_the_audio_tower(tiny_whisper, tiny_text, corpus, system):
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, tiny_text, freeze_text=False)
    processor = system[1]
    store = FeatureStore.build(model, collator(processor), [corpus[1]])
    batch = collator(processor, store)(list(corpus[1]))
    assert {"audio_hidden_states", "input_ids", "text_attention_mask"} <= set(batch)
    assert_same_outputs(model, processor, store, list(corpus[1]))


def test_a_folder_is_not_filled_twice(tiny_sailer, system, corpus, tmp_path, monkeypatch):
    model, processor = system
    build = {"folder": tmp_path, "batch_size": 4}
    FeatureStore.build(model, collator(processor), [corpus[0]], **build)
    with monkeypatch.context() as patch:
        seen = count_calls(patch, model)
        FeatureStore.build(model, collator(processor), [corpus[0]], **build)
        assert seen == {"audio": 0, "text": 0}
        # Other clips are added to those that are there.
        both = FeatureStore.build(model, collator(processor), list(corpus), **build)
        assert seen == {"audio": 5, "text": 0}
        # Another length, another precision and other weights are other features.
        FeatureStore.build(model, collator(processor, max_seconds=0.5), [corpus[1]], **build)
        FeatureStore.build(model, collator(processor), [corpus[1]], dtype="float16", **build)
        assert seen["audio"] == 15
    assert_same_outputs(model, processor, both, [*corpus[0], *corpus[1]])
    other = SailerForAudioClassification.from_pretrained(tiny_sailer)
    with torch.no_grad():
        other.sailer.audio_encoder.layer_norm.weight.mul_(2)
    store = FeatureStore.build(other, collator(processor), [corpus[1]], **build)
    assert_same_outputs(other, processor, store, list(corpus[1]))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("change", ["weight", "layer", "pooling"])
def test_a_store_of_another_system_is_never_used(tiny_sailer, system, corpus, tmp_path, monkeypatch, change):
    """One weight of a million is another backbone."""
    model, processor = system
    FeatureStore.build(model, collator(processor), [corpus[1]], folder=tmp_path)
    config = {"weight": {}, "layer": {"audio_layers": "weighted"}, "pooling": {"frame_pooling": 4}}[change]
    other = SailerForAudioClassification.from_pretrained(tiny_sailer, **config, output_loading_info=True)[0]
    if change == "weight":
        with torch.no_grad():
            other.sailer.audio_encoder.layers[1].fc1.weight[3, 5] += 1e-3
    seen = count_calls(monkeypatch, other)
    store = FeatureStore.build(other, collator(processor), [corpus[1]], folder=tmp_path)
    assert seen == {"audio": 5, "text": 0}
    monkeypatch.undo()
    assert_same_outputs(other, processor, store, list(corpus[1]))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_shard_is_made_again(system, corpus, tmp_path, monkeypatch, caplog, damage):
    model, processor = system
    monkeypatch.setattr(shelf_module, "SHARD_BYTES", 1)
    build = {"folder": tmp_path, "batch_size": 4}
    FeatureStore.build(model, collator(processor), [corpus[0]], **build)
    shards = sorted(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shards[-1].read_bytes())
    content[-5] ^= 1
    shards[-1].write_bytes({"flipped": content, "truncated": content[:-100], "emptied": b""}[damage])
    seen = count_calls(monkeypatch, model)
    store = FeatureStore.build(model, collator(processor), [corpus[0]], **build)
    assert seen == {"audio": 4, "text": 0}
    assert f"{shards[-1].name} is damaged" in caplog.text
    monkeypatch.undo()
    assert_same_outputs(model, processor, store, list(corpus[0]))


@pytest.mark.parametrize("layers", ["last", "weighted", "weighted_norm", "concat_norm"])
def test_pooled_states_give_the_same_and_are_smaller(tiny_whisper, corpus, system, tmp_path, layers):
    torch.manual_seed(1)
    made = {
        pooling: SailerForAudioClassification.from_audio_text_pretrained(
            tiny_whisper, audio_layers=layers, frame_pooling=pooling, frame_norm=True, heads=["primary"]
        )
        for pooling in (1, 8)
    }
    if layers != "last":
        for weights in made[8].sailer.audio_layer_weights.parameters():
            weights.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    processor = SailerProcessor(system[1].feature_extractor)
    stores = {
        pooling: FeatureStore.build(model, collator(processor), [corpus[0]], folder=tmp_path / str(pooling))
        for pooling, model in made.items()
    }
    assert_same_outputs(made[8], processor, stores[8], list(corpus[0]))
    batch = collator(processor, stores[8], ["primary"])(list(corpus[0]))
    own = collator(processor, heads=["primary"])(list(corpus[0]))["attention_mask"][:, ::2].sum(1)
    assert batch["attention_mask"].sum(1).tolist() == own.tolist() and (own % 8 != 0).any()
    size = {
        pooling: sum(path.stat().st_size for path in (tmp_path / str(pooling)).glob("*.safetensors"))
        for pooling in made
    }
    assert size[8] < size[1] / 4
    with pytest.raises(ValueError, match="output_hidden_states needs the audio"):
        made[8](
            **{name: batch[name] for name in ("pooled_hidden_states", "attention_mask")}, output_hidden_states=True
        )


@pytest.mark.parametrize(
    ("layers", "pooling", "size"), [("last", 1, 62e9), ("weighted", 1, 2.06e12), ("weighted", 64, 2.06e12 / 58)]
)
def test_the_size_at_the_corpus_size_is_told_beforehand(layers, pooling, size):
    """Whisper large-v3 over 84,260 clips of 5.8 s, one plan of them, in float16."""
    encoder = WhisperConfig(
        d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128
    )
    with torch.device("meta"):
        model = SailerForAudioClassification(
            SailerConfig(audio_config=encoder, audio_layers=layers, frame_pooling=pooling)
        )
    processor = SailerProcessor(WhisperFeatureExtractor(feature_size=128))
    needed = features_module.kept_bytes(model, processor, np.full(84_260, 5.8), torch.float16)
    assert needed == pytest.approx(size, rel=0.02)


def test_two_terabytes_are_refused_with_a_way_out(tiny_whisper, system, corpus, monkeypatch):
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, audio_layers="weighted")
    monkeypatch.setattr(features_module, "kept_bytes", lambda *arguments: 2.06e12)
    with pytest.raises(ValueError, match=r"take about 2.06 TB in memory.*audio_layers: last.*frame_pooling: 64.*off"):
        FeatureStore.build(model, collator(SailerProcessor(system[1].feature_extractor)), [corpus[1]])


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_the_size_of_a_waveform_encoders_states(tmp_path, corpus, norm, system):
    from sailer.training.tiny_backbones import make_tiny_wavlm

    backbone = make_tiny_wavlm(tmp_path / "wavlm", norm=norm)
    model = SailerForAudioClassification.from_audio_text_pretrained(backbone, audio_layers="weighted").eval()
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(backbone))
    store = FeatureStore.build(model, collator(processor), [corpus[1]])
    states = sum(store._shelf[name].nbytes for name in store._audio.values())
    assert features_module.kept_bytes(model, processor, corpus[1]["duration"], torch.float32) == states


def test_a_changed_file_is_computed_again(system, tmp_path, monkeypatch):
    model, processor = system
    rows = clips(tmp_path, 2, "clip", 3)
    FeatureStore.build(model, collator(processor), [rows], folder=tmp_path / "features")
    time.sleep(0.01)
    soundfile.write(tmp_path / "clip0.wav", np.zeros(8000), 16000)
    store = FeatureStore.build(model, collator(processor), [rows], folder=tmp_path / "features")
    assert_same_outputs(model, processor, store, list(rows))


def test_an_interrupted_pass_keeps_finished_shards(system, corpus, tmp_path, monkeypatch):
    model, processor = system
    monkeypatch.setattr(shelf_module, "SHARD_BYTES", 1)
    method, calls = model.sailer.audio_hidden_states, []

    def failing(*inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return method(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model.sailer, "audio_hidden_states", failing)
        with pytest.raises(KeyboardInterrupt):
            FeatureStore.build(model, collator(processor), [corpus[0]], folder=tmp_path, batch_size=4)
        assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch:
        seen = count_calls(patch, model)
        FeatureStore.build(model, collator(processor), [corpus[0]], folder=tmp_path, batch_size=4)
        assert seen["audio"] == 12 - 8


@pytest.mark.parametrize("on_disk", [False, True])
def test_workers_read_the_same(system, corpus, tmp_path, on_disk):
    model, processor = system
    train = planned(corpus[0])
    store = FeatureStore.build(model, collator(processor), [train], folder=tmp_path if on_disk else None)
    # Without its audio a row is all that a batch of kept features needs.
    silent = planned(corpus[0].remove_columns("audio"))
    batches = [
        list(torch.utils.data.DataLoader(silent, 5, collate_fn=collator(processor, store), num_workers=workers))
        for workers in (0, 2)
    ]
    for own, others in zip(*batches, strict=True):
        for name, value in own.items():
            torch.testing.assert_close(others[name], value, rtol=0, atol=0, equal_nan=True)
    sent = pickle.loads(pickle.dumps(store))
    assert_same_outputs(model, processor, sent, [train[0], train[1]])
    if on_disk:
        assert len(pickle.dumps(store)) < 100_000 < sum(path.stat().st_size for path in tmp_path.iterdir())


def test_no_transcripts_at_all(system, corpus):
    model, processor = system
    rows = corpus[1].remove_columns("transcript").add_column("transcript", [""] * 5)
    store = FeatureStore.build(model, collator(processor), [rows])
    assert_same_outputs(model, processor, store, list(rows))


def test_fresh_mixes_cannot_be_kept(system, corpus):
    model, processor = system
    with pytest.raises(ValueError, match=r"Set augmentation_variants .* or cache_features to off"):
        FeatureStore.build(model, collator(processor), [planned(corpus[0], augmentation_variants=0)])
    fresh_but_unmixed = planned(corpus[0], augmentation_variants=0, mixing_probability=0, speed_perturbation=0)
    store = FeatureStore.build(model, collator(processor), [fresh_but_unmixed])
    assert_same_outputs(model, processor, store, [fresh_but_unmixed[key] for key in (3, 12 * 7 + 3)])


def test_nothing_frozen(tiny_whisper, corpus, system):
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, freeze_audio=False)
    with pytest.raises(ValueError, match="No tower is frozen"):
        FeatureStore.build(model, collator(system[1]), [corpus[0]])


def test_unknown_dtype(system, corpus):
    with pytest.raises(ValueError, match="feature_dtype is 'int8'"):
        FeatureStore.build(system[0], collator(system[1]), [corpus[0]], dtype="int8")


def test_too_little_memory(system, corpus, monkeypatch):
    class Full:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Full)
    with pytest.raises(ValueError, match=r"5 clips and mixes and 3 transcripts take about .* in memory .*1 kB are"):
        FeatureStore.build(system[0], collator(system[1]), [corpus[1]])


def test_too_little_disk(system, corpus, tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Full)
    with pytest.raises(ValueError, match=r"take about .*where 1 kB are free.*feature_dtype"):
        FeatureStore.build(system[0], collator(system[1]), [corpus[1]], folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_stated_size_is_right(system, tmp_path, capsys):
    # All clips of one length: the extrapolation from the first batch is exact.
    model, processor = system
    generator = np.random.default_rng(0)
    for index in range(6):
        soundfile.write(tmp_path / f"{index}.wav", 0.1 * generator.standard_normal(16000), 16000)
    rows = build_dataset(
        {
            "id": list("abcdef"),
            "audio": [{"path": str(tmp_path / f"{index}.wav"), "bytes": None} for index in range(6)],
            "duration": [1.0] * 6,
        }
    )
    FeatureStore.build(model, collator(processor), [rows], batch_size=4)
    # 50 positions a second of width 64 in float32.
    assert f"about {6 * 50 * 64 * 4 / 1000:.3g} kB in memory" in capsys.readouterr().err


def test_one_id_for_two_recordings(system, corpus, tmp_path):
    impostor = clips(tmp_path, 5, "test", 9)
    with pytest.raises(CorpusError, match=r"Clip 'test0' has two recordings"):
        FeatureStore.build(system[0], collator(system[1]), [corpus[1], impostor])


def test_clips_that_were_not_kept(system, corpus):
    model, processor = system
    store = FeatureStore.build(model, collator(processor), [corpus[1]])
    with pytest.raises(ValueError, match=r"No features were kept of \('train0',\)"):
        collator(processor, store)([corpus[0][0]])


def test_missing_audio_is_named(system, corpus, tmp_path):
    rows = build_dataset({"id": ["ghost"]})
    with pytest.raises(CorpusError, match="'ghost' has no audio"):
        FeatureStore.build(system[0], collator(system[1]), [rows])
