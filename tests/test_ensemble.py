"""Several systems as one: their outputs combined as by hand, equal backbones run once, saved, served and refused."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from scipy.special import log_softmax
from transformers import AutoConfig, pipeline

import sailer
from sailer import SailerEnsemble, SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline
from sailer.cli import main
from sailer.data.schema import PRIMARY_LABELS, LabelSet
from sailer.ensemble_sailer import load_system
from sailer.hub.publishing import push
from sailer.processing_sailer import SailerEnsembleProcessor
from sailer.training.ensembling import build_ensemble, fit_weights

from .conftest import DIFFERENT_TEXTS


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_speech_sailer: Path) -> Path:
    """The speech-only system, but each class is taken for the next one, and the training was re-weighted."""
    folder = tmp_path_factory.mktemp("others") / "other"
    shutil.copytree(tiny_speech_sailer, folder)
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    last = model.heads["primary"][-1]
    last.weight.data, last.bias.data = last.weight.data.roll(1, 0), last.bias.data.roll(1, 0)
    model.config.label_weights, model.config.calibration_temperature = [3.0, *[1.0] * 8], 2.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def systems(tiny_sailer: Path, tiny_speech_sailer: Path, other: Path) -> list[Path]:
    """With and without transcripts, of one backbone; the first has every head."""
    return [tiny_sailer, tiny_speech_sailer, other]


@pytest.fixture
def waves(tmp_path: Path, different_clips: list[np.ndarray]) -> Path:
    """Eight clips, one of each class, and the same again for validation."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = ["audio,label,split"]
    for index, clip in enumerate(different_clips):
        for name, split in ((f"{index}.wav", "test"), (f"v{index}.wav", "validation")):
            soundfile.write(folder / name, clip, 16000, subtype="FLOAT")
            lines.append(f"{name},{PRIMARY_LABELS[index]},{split}")
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


def outputs_of(source: Path | list[Path], clips: list[np.ndarray], texts: tuple[str, ...] = DIFFERENT_TEXTS) -> dict:
    if isinstance(source, list):
        model, processor = SailerEnsemble.from_pretrained(source), SailerEnsembleProcessor.from_pretrained(source)
    else:
        model, processor = load_system(source)
    text = texts[: len(clips)] if processor.tokenizer is not None else None
    with torch.no_grad():
        return dict(model.eval()(**processor(clips, text=text, sampling_rate=16000)))


def test_outputs_are_the_means_of_the_members_that_have_them(
    systems: list[Path], different_clips: list[np.ndarray]
) -> None:
    own = [outputs_of(folder, different_clips) for folder in systems]
    found = outputs_of(systems, different_clips)
    mean = torch.stack([one["logits"].softmax(-1) for one in own]).mean(0)
    torch.testing.assert_close(found["logits"].softmax(-1), mean, atol=1e-6, rtol=0)
    assert (mean - own[0]["logits"].softmax(-1)).abs().max() > 0.05
    torch.testing.assert_close(found["member_logits"], torch.stack([one["logits"] for one in own], 1))
    torch.testing.assert_close(found["attributes"], own[0]["attributes"])
    torch.testing.assert_close(found["age"], own[0]["age"])
    torch.testing.assert_close(found["embeddings"], torch.cat([one["embeddings"] for one in own], 1))

    pair = SailerEnsemble.from_pretrained(systems[1:], combine="logits", weights=[3, 1])
    processor = SailerEnsembleProcessor.from_pretrained(systems[1:])
    with torch.no_grad():
        found = pair(**processor(different_clips, sampling_rate=16000))
    torch.testing.assert_close(found.logits, (3 * own[1]["logits"] + own[2]["logits"]) / 4)
    natural = [
        SailerForAudioClassification.from_pretrained(folder).probabilities(one["logits"], "natural").log()
        for folder, one in zip(systems[1:], own[1:], strict=True)
    ]
    expected = ((3 * natural[0] + natural[1]) / 4).softmax(-1)
    torch.testing.assert_close(pair.probabilities(found.member_logits, "natural"), expected)
    with pytest.raises(ValueError, match="member_logits"):
        pair.probabilities(found.logits, "natural")


def test_equal_backbones_run_once_and_others_by_themselves(
    systems: list[Path], different_clips: list[np.ndarray], tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(systems[1], changed)
    model = SailerForAudioClassification.from_pretrained(changed)
    next(model.sailer.audio_encoder.parameters()).data += 0.01
    model.save_pretrained(changed)
    sources = [*systems, changed]
    ensemble = SailerEnsemble.from_pretrained(sources)
    processor = SailerEnsembleProcessor.from_pretrained(sources)
    encoders = [member.sailer.audio_encoder for member in ensemble.members]
    assert encoders[0] is encoders[1] is encoders[2] and encoders[3] is not encoders[0]
    calls = []
    for encoder in {id(encoder): encoder for encoder in encoders}.values():
        encoder.register_forward_hook(lambda *_: calls.append(1))
    inputs = processor(different_clips[:2], text=DIFFERENT_TEXTS[:2], sampling_rate=16000)
    with torch.no_grad():
        found = ensemble(**inputs).member_logits
    assert len(calls) == 2 and set(inputs) == {
        *("input_features_0", "attention_mask_0", "input_ids_0", "text_attention_mask_0")
    }
    for index, source in enumerate(sources):
        torch.testing.assert_close(found[:, index], outputs_of(source, different_clips[:2])["logits"])


def test_members_of_other_encoders_and_layers(
    systems: list[Path], tiny_wavlm: Path, tiny_whisper: Path, different_clips: list[np.ndarray], tmp_path: Path
) -> None:
    from transformers import AutoFeatureExtractor

    torch.manual_seed(1)
    for name, backbone in (("wavlm", tiny_wavlm), ("layers", tiny_whisper)):
        model = SailerForAudioClassification.from_audio_text_pretrained(
            backbone, heads=["primary"], audio_layers="weighted_norm"
        )
        model.save_pretrained(tmp_path / name)
        SailerProcessor(AutoFeatureExtractor.from_pretrained(backbone)).save_pretrained(tmp_path / name)
    sources = [systems[1], tmp_path / "wavlm", tmp_path / "layers"]
    found = outputs_of(sources, different_clips)
    for index, source in enumerate(sources):
        torch.testing.assert_close(found["member_logits"][:, index], outputs_of(source, different_clips)["logits"])
    # A clip alone, and beside longer ones.
    alone = outputs_of(sources, different_clips[:1])
    assert (alone["logits"] - found["logits"][:1]).abs().max() < 1e-5
    assert SailerEnsemble.from_pretrained(sources)._hearing == [[0, 2], [1]]


def test_saved_it_is_one_system_for_the_pipeline_and_the_command_line(
    systems: list[Path], waves: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved, table = tmp_path / "ensemble", tmp_path / "predictions.csv"
    assert main(["ensemble", *map(str, systems[1:]), str(saved), "--weights", "3,1"]) == 0
    assert capsys.readouterr().out.endswith(f"Result: {saved}\n")
    assert "| other | primary | 0.250 |" in (saved / "README.md").read_text()
    member = SailerForAudioClassification.from_pretrained(saved / "member_1")
    assert member.config.calibration_temperature == 2.0
    assert not list(saved.glob("member_*/*.py"))

    model, processor = load_system(saved)
    classifier = SpeechEmotionPipeline(model=model, processor=processor, device="cpu")
    parts = [
        SpeechEmotionPipeline(**dict(zip(("model", "processor"), load_system(x), strict=True))) for x in systems[1:]
    ]
    clip = str(waves / "7.wav")
    for prior in ("balanced", "natural"):
        own = [{row["label"]: row["score"] for row in part(clip, prior=prior)} for part in parts]
        found = {row["label"]: row["score"] for row in classifier(clip, prior=prior)}
        assert found == pytest.approx({x: (3 * own[0][x] + own[1][x]) / 4 for x in PRIMARY_LABELS}, abs=1e-6)

    assert main(["predict", str(saved), str(waves), "--output", str(table)]) == 0
    with table.open(newline="") as file:
        rows = {Path(row["file"]).name: row for row in csv.DictReader(file)}
    found = {row["label"]: row["score"] for row in classifier(clip)}
    assert {x: float(rows["7.wav"][x]) for x in PRIMARY_LABELS} == pytest.approx(found, abs=1e-5)

    out = tmp_path / "figures"
    line = ["evaluate", str(saved), "--corpus", "manifest", "--data_dir", str(waves), "--output_dir", str(out)]
    assert main(line) == 0
    assert list(json.loads((out / "metrics.json").read_text())) == [str(saved)]


def test_windows_that_a_member_does_not_take_are_refused(systems: list[Path]) -> None:
    ensemble = SailerEnsemble.from_pretrained(systems[1:])
    ensemble.members[1].config.audio_config.max_source_positions = 50
    processor = SailerEnsembleProcessor.from_pretrained(systems[1:])
    classifier = SpeechEmotionPipeline(model=ensemble, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="this encoder takes 1 s"):
        classifier(np.zeros(32000))


@pytest.mark.parametrize("combine", ["probabilities", "stacked"])
def test_it_is_fitted_on_a_validation_split(
    combine: str, systems: list[Path], waves: Path, tmp_path: Path, different_clips: list[np.ndarray]
) -> None:
    saved = tmp_path / "fitted"
    how = ["--weights", "fit"] if combine == "probabilities" else []
    line = ["ensemble", *map(str, systems[1:]), str(saved), "--combine", combine, *how]
    assert main([*line, "--corpus", "manifest", "--data_dir", str(waves)]) == 0
    model, processor = load_system(saved)
    assert model.config.combine == combine and model.config.calibration_temperature != 1
    with torch.no_grad():
        outputs = model(**processor(different_clips, sampling_rate=16000))
    if combine == "stacked":  # on what it was fitted on, it is right
        assert outputs.logits.argmax(-1).tolist() == list(range(8))
        weights = torch.tensor(model.config.label_weights)
        expected = (outputs.logits[:, :8] - weights[:8].log()) / model.config.calibration_temperature
        torch.testing.assert_close(
            model.probabilities(outputs.member_logits, "natural")[:, :8], expected.softmax(-1), atol=1e-6, rtol=1e-4
        )
        assert (model.probabilities(outputs.logits, "natural")[:, 8] == 0).all()
    else:

        def likelihood(share: float) -> float:
            mixed = torch.einsum(
                "m,bml->bl", torch.tensor([share, 1 - share]).float(), outputs.member_logits.softmax(-1)
            )
            return float(mixed[range(8), range(8)].log().mean())

        best = max(np.linspace(0, 1, 1001), key=likelihood)
        assert model.weights.tolist() == pytest.approx([best, 1 - best], abs=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1"], "1 weights for 2 members"),
        (["--weights", "1,x"], "give a number for each member"),
        (["--weights", "0,0"], "not all of them 0"),
        (["--weights", "1,-1"], "numbers from 0"),
        (["--weights", "1,inf"], "numbers from 0"),
        (["--weights", "fit"], "no member trained on"),
        (["--combine", "stacked"], "no member trained on"),
        (["--heads", "primary,attributes"], "has no attributes head, which the ensemble needs"),
        (["--heads", "emotion"], "choose of"),
        (["--references"], "cannot be kept as a reference"),
    ],
)
def test_what_cannot_be_made_is_refused(
    arguments: list[str], message: str, systems: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["ensemble", *map(str, systems[1:]), str(tmp_path / "new"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_what_is_not_there_or_is_there_already_is_named(
    systems: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["ensemble", str(systems[1]), str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert "nowhere is not in its place" in capsys.readouterr().err
    assert main(["ensemble", *map(str, systems[1:]), str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="weights is 'best'; give a number for each member, or 'fit'"):
        build_ensemble(systems[1:], tmp_path / "new", weights="best")


def test_a_file_is_decoded_once_for_all_members(
    systems: list[Path], tiny_wavlm: Path, waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members that hear log-mels and one that hears waveforms."""
    from transformers import AutoFeatureExtractor

    SailerForAudioClassification.from_audio_text_pretrained(tiny_wavlm, heads=["primary"]).save_pretrained(tmp_path)
    SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_wavlm)).save_pretrained(tmp_path)
    sources = [*systems[1:], tmp_path]
    model, processor = SailerEnsemble.from_pretrained(sources), SailerEnsembleProcessor.from_pretrained(sources)
    classifier = SpeechEmotionPipeline(model=model, processor=processor, device="cpu")
    opened = []
    decode = soundfile.SoundFile

    def counting(*arguments, **options):
        opened.append(arguments)
        return decode(*arguments, **options)

    monkeypatch.setattr(soundfile, "SoundFile", counting)
    assert set(processor([np.zeros(8000)], sampling_rate=16000)) == {
        *("input_features_0", "attention_mask_0", "input_values_1", "attention_mask_1")
    }
    classifier(str(waves / "0.wav"))
    assert len(opened) == 1


def test_code_that_lies_beside_a_member_is_never_run(
    systems: list[Path], different_clips: list[np.ndarray], tmp_path: Path
) -> None:
    hostile, marker, saved = tmp_path / "hostile", tmp_path / "was_run", tmp_path / "saved"
    code = f"open({str(marker)!r}, 'w').close()\n"

    def corrupt(folder: Path) -> None:
        for name in ("configuration_sailer", "modeling_sailer", "processing_sailer", "evil"):
            (folder / f"{name}.py").write_text(code)
        for name in ("config.json", "processor_config.json"):
            settings = json.loads((folder / name).read_text())
            settings["auto_map"] = dict.fromkeys(settings["auto_map"], "evil.Evil")
            (folder / name).write_text(json.dumps(settings))

    shutil.copytree(systems[2], hostile)
    corrupt(hostile)
    with pytest.raises(AttributeError, match="Evil"):  # loaded by itself, it is run
        AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    marker.unlink()
    sources = [systems[1], hostile]
    expected = outputs_of(systems[1:], different_clips)["logits"]
    torch.testing.assert_close(outputs_of(sources, different_clips)["logits"], expected)
    SailerEnsemble.from_pretrained(sources, trust_remote_code=True).save_pretrained(saved)
    SailerEnsembleProcessor.from_pretrained(sources, trust_remote_code=True).save_pretrained(saved)
    corrupt(saved / "member_1")
    classifier = pipeline(model=str(saved), trust_remote_code=True)
    scores = {row["label"]: row["score"] for row in classifier(different_clips[0], top_k=9)}
    assert [scores[name] for name in PRIMARY_LABELS] == pytest.approx(expected[0].softmax(-1).tolist(), abs=1e-5)
    assert not marker.exists()


def test_shares_of_logits_are_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=60)
    labels[:3] = -1  # no agreement: left out
    logits = rng.normal(size=(60, 2, 4))
    logits[np.arange(60), 0, labels] += 1.5
    logits[np.arange(60), 1, labels] += 0.7
    label_set = LabelSet(("a", "b", "c", "Other"), ("a",))
    found = fit_weights(logits, labels, label_set, "logits")
    chosen = np.flatnonzero(labels >= 0)
    share = 1 / np.bincount(labels[chosen])[labels[chosen]] / 3  # each class counts the same

    def likelihood(weight: float) -> float:
        scores = log_softmax(logits[chosen], axis=2)
        mixed = log_softmax(weight * scores[:, 0] + (1 - weight) * scores[:, 1], axis=1)
        return float(share @ mixed[np.arange(len(chosen)), labels[chosen]])

    best = max(np.linspace(0, 1, 2001), key=likelihood)
    assert found == pytest.approx([best, 1 - best], abs=1e-3) and 0.55 < best < 0.99
    with pytest.raises(ValueError, match="nothing to fit on"):
        fit_weights(logits, np.full(60, 3), label_set, "logits")


def test_members_that_do_not_fit_or_are_gone_are_named(systems: list[Path], tmp_path: Path) -> None:
    labelled = tmp_path / "labelled"
    shutil.copytree(systems[1], labelled)
    settings = json.loads((labelled / "config.json").read_text())
    settings["labels"] = [*PRIMARY_LABELS[1:], PRIMARY_LABELS[0]]
    (labelled / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"Member 1 \(labelled\) has the labels \['Contempt'.*members must agree"):
        SailerEnsemble.from_pretrained([systems[1], labelled])

    saved = tmp_path / "saved"
    ensemble = SailerEnsemble.from_pretrained(systems[1:])
    with pytest.raises(ValueError, match="2 weights for 3 members"):
        SailerEnsemble.from_pretrained(systems, weights=[1, 1])
    ensemble.save_pretrained(saved)
    SailerEnsembleProcessor.from_pretrained(systems[1:]).save_pretrained(saved)
    with pytest.raises(ValueError, match="it is a 'sailer_ensemble' model"):
        SailerEnsemble.from_pretrained([systems[1], saved])
    settings = json.loads((saved / "config.json").read_text())
    for place in ("../elsewhere", "/", ".."):
        settings["members"][1]["subfolder"] = place
        (saved / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"Member 1 is at '.*': name a subfolder"):
            load_system(saved)
    settings["members"][1]["subfolder"] = "member_1"
    settings["members"][1]["heads"] = ["primary", "age"]
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"Member 1 \(other\) has no age head"):
        load_system(saved)
    shutil.rmtree(saved / "member_1")
    with pytest.raises(OSError, match=r"Member 1 \(other\) of .*saved is not in its place"):
        load_system(saved)
    with pytest.raises(OSError, match=r"Member 1 \(other\) of .*saved is not in its place"):
        SailerEnsembleProcessor.from_pretrained(saved)
    assert sailer.SailerEnsemble is SailerEnsemble


@pytest.mark.slow
def test_members_stay_on_the_hub_where_they_are_kept_as_references(
    systems: list[Path], tmp_path: Path, hub, different_clips: list[np.ndarray]
) -> None:
    for folder, name in zip(systems[1:], ("one", "two"), strict=True):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / "README.md").write_text("A system.")
        push(copy, f"me/{name}")
    saved = tmp_path / "ensemble"
    assert main(["ensemble", "me/one", "me/two@main", str(saved), "--references"]) == 0
    members = json.loads((saved / "config.json").read_text())["members"]
    assert [member["repo_id"] for member in members] == ["me/one", "me/two"]
    assert all(len(member["revision"]) == 40 for member in members)
    assert not [name for name in os.listdir(saved) if name.startswith("member_")]
    expected = outputs_of(systems[1:], different_clips)["logits"]
    torch.testing.assert_close(outputs_of(saved, different_clips)["logits"], expected)
    push(saved, "me/both")
    assert not [name for name in hub.files["me/both"] if name.startswith("member_")]
    torch.testing.assert_close(outputs_of("me/both", different_clips)["logits"], expected)
    settings = json.loads((saved / "config.json").read_text())
    settings["members"][1]["repo_id"] = "me/gone"
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(OSError, match=r"Member 1 \(two\) of .*ensemble is not in its place"):
        load_system(saved)
