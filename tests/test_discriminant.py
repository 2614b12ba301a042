"""The linear discriminant beside the primary head: its arithmetic, how opinions are pooled, and training's part."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.discriminant_sailer import set_discriminant, without_discriminant
from sailer.settings import SettingsError, resolve
from sailer.train import fit, prepare
from sailer.training.discriminant import discriminant_analysis, fit_discriminant

from .sounds import noise


def test_two_round_clouds_by_hand() -> None:
    """Centres (-1, 0) and (3, 0), spread 1 along both axes: log p(b) - log p(a) = 4 x - 4, and that of the priors."""
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=float)
    means = torch.from_numpy(
        np.concatenate([corners - np.array([1, 0]), corners + np.array([3, 0])]).repeat(500, axis=0)
    )
    labels = np.repeat([0, 1], 2000)
    for priors, lead in (([1, 1], 0.0), ([30, 10], np.log(1 / 3))):
        mean, weight, bias = fit_discriminant(means, labels, np.array(priors, dtype=float))
        points = torch.tensor([[1.0, 0.0], [2.0, 5.0], [-3.0, 1.0]])
        scores = (points - mean) @ weight.T + bias
        expected = torch.tensor([0.0, 4.0, -16.0]) + lead
        assert torch.allclose(scores[:, 1] - scores[:, 0], expected, rtol=0.01, atol=0.02), scores


@pytest.mark.parametrize("labels", [2, 3, 8])
def test_it_says_what_scikit_learn_says(labels: int) -> None:
    generator = np.random.default_rng(labels)
    truth = np.tile(np.arange(labels), 12)
    clips = generator.normal(size=(len(truth), 40)) * generator.uniform(0.01, 100, 40) + truth[:, None] + 500
    priors = generator.uniform(0.1, 1, labels)
    mean, weight, bias = fit_discriminant(torch.from_numpy(clips), truth, priors)
    said = torch.nn.functional.linear(torch.from_numpy(clips).float() - mean, weight, bias).softmax(-1)
    analysis = discriminant_analysis(clips.shape, priors / priors.sum()).fit(clips, truth)
    assert np.allclose(said.numpy(), analysis.predict_proba(clips), atol=1e-3)


@pytest.fixture
def system(tiny_speech_sailer: Path) -> tuple[SailerForAudioClassification, SailerProcessor]:
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer).eval()
    return model, SailerProcessor.from_pretrained(tiny_speech_sailer)


def give_discriminant(model: SailerForAudioClassification, share: float) -> None:
    width, labels = model.sailer.audio_projection[0].in_channels, len(model.config.labels)
    generator = torch.Generator().manual_seed(3)
    tensors = (torch.randn(*shape, generator=generator) for shape in ((width,), (labels, width), (labels,)))
    set_discriminant(model, *tensors)
    model.config.discriminant_share = share


def test_opinions_are_pooled_by_their_shares_and_the_voice_is_taken_off_both(
    system, different_clips, tmp_path
) -> None:
    model, processor = system
    inputs = processor(audio=different_clips[:3], sampling_rate=16000)
    shift = torch.randn(3, model.sailer.audio_projection[0].in_channels)
    with torch.no_grad():
        heads = [model(**inputs, speaker_shift=moved) for moved in (None, shift)]
        give_discriminant(model, 0.3)
        pooled = [model(**inputs, speaker_shift=moved) for moved in (None, shift)]
        one = model(**processor(audio=different_clips[1:2], sampling_rate=16000))
    own = model.discriminant
    for head, both, moved in zip(heads, pooled, (0, shift), strict=True):
        scores = (head.speech_means - moved - own.mean) @ own.weight.T + own.bias
        assert torch.allclose(both.logits, 0.7 * head.logits + 0.3 * scores, atol=1e-4)
        assert torch.equal(both.embeddings, head.embeddings)
    assert torch.allclose(one.logits[0], pooled[0].logits[1], atol=1e-4), "alone as in a batch"
    # A geometric mean of the probabilities: shares of 1 and 0 are either opinion.
    model.config.discriminant_share = 1.0
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits, own(heads[0].speech_means), atol=1e-4)
    model.config.discriminant_share = 0.3
    model.save_pretrained(tmp_path)
    loaded = SailerForAudioClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, pooled[0].logits)
    relabelled = SailerForAudioClassification.from_pretrained(
        tmp_path, labels=["Good", "Bad"], ignore_mismatched_sizes=True
    )
    assert relabelled.config.discriminant_share == 0 and not hasattr(relabelled, "discriminant"), (
        "it is of other labels"
    )
    without_discriminant(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, heads[0].logits)


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    for actor in range(1, 7):
        for emotion in (1, 3, 5):
            path = tmp_path / "ravdess" / f"03-01-0{emotion}-01-01-01-0{actor}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, noise(0.4, 10 * actor + emotion), 16000)
    actors = {"train_actors": "1-4", "validation_actors": "5", "test_actors": "6"}
    return {
        **{"corpus": "ravdess", "data_dir": str(tmp_path / "ravdess"), "output_dir": str(tmp_path / "out")},
        **{
            "corpus_options": actors,
            "labels": ["Neutral", "Happy", "Angry"],
            "majority_labels": [],
            "heads": ["primary"],
        },
        **{"audio_backbone": "tiny-whisper", "audio_layers": "concat_norm", "frame_pooling": 4, "hidden_size": 8},
        **{"max_steps": 1, "use_cpu": True, "disable_tqdm": True},
    }


SPEEDS = {"speed_perturbation": 0.25, "augmentation_variants": 3}


def train(recipe: dict, **options: object):
    job = prepare(resolve({**recipe, **options}))
    return job, fit(job)


@pytest.mark.parametrize("kept", ["memory", "off"])
def test_training_fits_it_on_what_was_heard_and_changes_nothing_else(recipe: dict, kept: str) -> None:
    for actor in (2, 3):  # Angry counts for more, the rarer it is
        Path(recipe["data_dir"], f"03-01-05-01-01-01-0{actor}.wav").unlink()
    recipe |= {"max_steps": 4, "load_best_model_at_end": False}
    speeds = SPEEDS if kept == "memory" else {}
    job, trainer = train(recipe, discriminant_share=0.4, cache_features=kept, **speeds)
    model = job.system.model.eval()
    assert model.config.discriminant_share == 0.4
    clips = [(row, speed) for speed in ((0.8, 1.0, 1.25) if speeds else (1.0,)) for row in range(10)]
    items = [{"clips": [job.train_rows[row]], "gap": 0.0, "speed": speed} for row, speed in clips]
    keys = {speed for _, _, _, speed in job.planned.renderings()}
    for item in items:  # as exactly as the plans have it
        item["speed"] = min(keys, key=lambda speed: abs(speed - item["speed"]))
    collator = trainer.evaluation_collator
    batch = type(collator)(collator.processor, collator.label_set, (), features=collator.features)(items)
    with torch.no_grad():
        means = model(**batch).speech_means
    labels = np.array([job.train_rows[row]["label"] for row, _ in clips])
    weights = model.config.label_weights
    assert weights[2] > 1.5 * weights[1]
    mean, weight, bias = fit_discriminant(means.double(), labels, np.bincount(labels) * weights)
    with torch.no_grad():
        found = model.discriminant(means).log_softmax(-1)
    expected = ((means - mean) @ weight.T + bias).log_softmax(-1)
    assert torch.allclose(found, expected, atol=0.02), (found - expected).abs().max()
    assert found.argmax(-1).tolist() == labels.tolist()
    plain, _ = train(recipe, cache_features=kept, **speeds)
    weights, others = model.state_dict(), plain.system.model.state_dict()
    assert {name for name in weights if name.startswith("discriminant")} == weights.keys() - others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in others if "speaker_reference" not in name)


def test_a_label_that_it_cannot_know_leaves_it_out(recipe: dict, caplog) -> None:
    for path in Path(recipe["data_dir"]).glob("03-01-05-*-0[234].wav"):
        path.unlink()
    job, _ = train(recipe, discriminant_share=0.4)
    assert job.system.model.config.discriminant_share == 0 and not hasattr(job.system.model, "discriminant")
    assert "No discriminant is fitted: of ['Angry'] there are fewer than 2 clips" in caplog.text


def test_a_base_models_is_fitted_anew_or_left_out(recipe: dict, tmp_path: Path) -> None:
    job, _ = train(recipe, discriminant_share=0.4)
    job.system.model.discriminant.bias.add_(7)  # of the clips before
    job.system.model.save_pretrained(tmp_path / "base")
    job.system.processor.save_pretrained(tmp_path / "base")
    further = recipe | {
        "base_model": str(tmp_path / "base"),
        "audio_backbone": None,
        "output_dir": str(tmp_path / "on"),
    }
    again, _ = train(further)
    assert again.system.model.config.discriminant_share == 0.4
    assert torch.allclose(again.system.model.discriminant.bias, job.system.model.discriminant.bias - 7, atol=1e-4)
    for share in (0.0, 0.1):
        changed, _ = train(further, discriminant_share=share, output_dir=str(tmp_path / f"on{share}"))
        assert changed.system.model.config.discriminant_share == share
        assert hasattr(changed.system.model, "discriminant") == bool(share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discriminant_share": 1.5}, "discriminant_share is 1.5; give a share from 0 to 1"),
        ({"discriminant_share": 0.5, "heads": ["attributes"]}, "no primary head: add primary to heads"),
        (
            {"discriminant_share": 0.5, "streaming": True, "corpus": "hub"},
            "discriminant_share is 0.5 but streaming is true",
        ),
    ],
)
def test_shares_that_cannot_be(recipe: dict, options: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        prepare(resolve(recipe | options))


@pytest.mark.slow
def test_through_the_command_line(recipe: dict) -> None:
    """What is saved, and what `sailer predict` says, has the discriminant in it."""
    given = {**recipe, **SPEEDS, "cache_features": "memory", "discriminant_share": 1.0, "text_backbone": "null"}
    given |= {"text_dropout": 0, "mixing_probability": 0, "freeze_audio": "true", "shuffled_label_baseline": "false"}
    names = {"labels", "majority_labels", "heads", "corpus_options"}
    options = [f"--{name}={json.dumps(value) if name in names else value}" for name, value in given.items()]
    assert main(["train", "demo", *options]) == 0
    folder = Path(recipe["output_dir"])
    tensors = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["discriminant_share"] == 1.0
    assert "discriminant of the mean speech state has a share of 1.0" in (folder / "README.md").read_text()
    clips = sorted(Path(recipe["data_dir"]).glob("*.wav"))[:3]
    assert main(["predict", str(folder), *map(str, clips), "--output", str(folder / "said.jsonl")]) == 0
    said = [json.loads(line) for line in (folder / "said.jsonl").read_text().splitlines()]
    processor = SailerProcessor.from_pretrained(folder)
    model = SailerForAudioClassification.from_pretrained(folder).eval()
    for clip, row in zip(clips, said, strict=True):
        inputs = processor(audio=[soundfile.read(clip, dtype="float32")[0]], sampling_rate=16000)
        with torch.no_grad():
            means = model(**inputs).speech_means
        scores = (means - tensors["discriminant.mean"]) @ tensors["discriminant.weight"].T
        expected = (scores + tensors["discriminant.bias"]).softmax(-1)[0]
        assert row["label"] == model.config.labels[int(expected.argmax())]
        assert row["score"] == pytest.approx(float(expected.max()), abs=1e-4)
