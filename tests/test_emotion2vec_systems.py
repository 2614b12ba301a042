"""emotion2vec as a system's speech encoder, as a classifier in every runtime, and for people without sailer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sailer
from sailer import SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline
from sailer.cli import main
from sailer.encoders_emotion2vec import Emotion2VecFeatureExtractor, Emotion2VecModel
from sailer.encoders_sailer import encode_audio, masks_padding, transformer_layers
from sailer.hub.conversion import convert

from .conftest import spread_out
from .emotion2vec_checkpoints import TOKENS, options_with, tensors_of, write
from .sounds import noise


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, options = tmp_path_factory.mktemp("plus"), options_with()
    return convert(write(folder / "released", options, tensors_of(options, classes=5), TOKENS), folder / "plus")


def system(plus: Path, clips: list[np.ndarray], folder: Path, **options) -> Path:
    torch.manual_seed(0)
    model = SailerForAudioClassification.from_audio_text_pretrained(plus, heads=["primary"], **options)
    assert type(model.sailer.audio_encoder) is Emotion2VecModel
    processor = SailerProcessor(Emotion2VecFeatureExtractor.from_pretrained(plus))
    spread_out(model, processor, clips).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("audio_layers", ["last", "weighted", "weighted_norm", "concat_norm"])
@pytest.mark.parametrize("packed", [True, False])
def test_as_an_encoder(
    audio_layers: str,
    packed: bool,
    plus: Path,
    different_clips: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Emotion2VecModel, "_is_packed", lambda *_: packed)
    folder = system(plus, different_clips, tmp_path / "system", audio_layers=audio_layers)
    model, processor = (
        SailerForAudioClassification.from_pretrained(folder).eval(),
        SailerProcessor.from_pretrained(folder),
    )
    encoder = model.sailer.audio_encoder
    assert masks_padding(encoder.config) and len(transformer_layers(encoder)) == 3
    original = Emotion2VecModel.from_pretrained(plus).state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        together = model(**processor(different_clips, sampling_rate=16000))
        alone = [model(**processor(clip, sampling_rate=16000)) for clip in different_clips]
    for row, outputs in enumerate(alone):
        # The head is scaled up a hundredfold (`spread_out`) and the last digit with it: what it sees must be closer.
        torch.testing.assert_close(together.embeddings[[row]], outputs.embeddings, atol=1e-6, rtol=0)
        torch.testing.assert_close(together.logits[[row]].softmax(1), outputs.logits.softmax(1), atol=1e-5, rtol=0)
    assert together.logits.std(0).min() > 0.3
    inputs = processor(different_clips, sampling_rate=16000)
    states, mask = encode_audio(encoder, inputs["input_values"], inputs["attention_mask"], all_layers=True)
    assert states.shape[:2] == (8, 4) and mask.sum(1).tolist() == [len(clip) // 320 - 1 for clip in different_clips]


def test_fine_tuned_from_the_output_on(plus: Path, different_clips: list[np.ndarray]) -> None:
    model = SailerForAudioClassification.from_audio_text_pretrained(
        plus, heads=["primary"], freeze_audio=False, trainable_audio_layers=1
    ).train()
    processor = SailerProcessor(Emotion2VecFeatureExtractor.from_pretrained(plus))
    model(**processor(different_clips[:3], sampling_rate=16000), labels=torch.tensor([0, 1, 2])).loss.backward()
    trained = {name for name, parameter in model.sailer.audio_encoder.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith("encoder.layers.2.") for name in trained)


def test_adapters_fit_its_linear_layers(plus: Path) -> None:
    peft = pytest.importorskip("peft")
    encoder = Emotion2VecModel.from_pretrained(plus).eval()
    names = ["q_proj", "v_proj", "feed_forward.intermediate_dense", "feed_forward.output_dense"]
    inputs = Emotion2VecFeatureExtractor()([noise(0.4)], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        before = encoder(**inputs).last_hidden_state
    adapted = peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    assert len([name for name, _ in adapted.named_parameters() if "lora_A" in name]) == 4 * 3
    with torch.no_grad():
        after = adapted(**inputs).last_hidden_state
        merged = adapted.merge_and_unload()(**inputs).last_hidden_state
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(merged, after, atol=1e-4, rtol=1e-4)


def test_predictions_and_timelines_from_the_command_line(plus: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2.5), 16000, subtype="FLOAT")
    arguments = ["predict", str(plus), str(tmp_path / "a.wav"), "--output", str(tmp_path / "out.jsonl")]
    arguments += ["--timeline", "--chunk_length_s", "1", "--stride_length_s", "0"]
    assert main(arguments) == 0
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    pipeline = SpeechEmotionPipeline(*load(plus))
    expected = pipeline(str(tmp_path / "a.wav"), chunk_length_s=1, stride_length_s=0, return_all=True)
    assert row["label"] == expected["label"]
    (timeline,) = tmp_path.glob("*timeline*.jsonl")
    assert [json.loads(line)["start"] for line in timeline.read_text().splitlines()] == [
        0,
        1,
        1.5,
    ]  # the last window is whole


def load(folder: Path):
    from sailer.inference.backends.torch import load_torch

    return load_torch(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "system"])
def test_exported(kind: str, plus: Path, different_clips: list[np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = plus if kind == "classifier" else system(plus, different_clips, tmp_path / "s", audio_layers="weighted")
    assert main(["export", str(source), str(tmp_path / "exported")]) == 0
    torch_pipeline, onnx_pipeline = sailer.load(source), sailer.load(tmp_path / "exported", backend="onnx")
    clips = [*different_clips, noise(3.3, 9)]
    expected, got = (pipeline(clips, batch_size=4, return_all=True) for pipeline in (torch_pipeline, onnx_pipeline))
    for ours, theirs in zip(expected, got, strict=True):
        assert [row["label"] for row in ours["primary"]] == [row["label"] for row in theirs["primary"]]
        np.testing.assert_allclose(theirs["embedding"], ours["embedding"], atol=1e-4)


# Run with -S and only site-packages on the path: .pth files, and with them an editable install, are not followed.
STRANGER = """
import json, sys
try:
    import sailer
except ImportError:
    pass
else:
    raise SystemExit("the sailer package is visible here: this would prove nothing")
import soundfile, torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

plus, encoder, system, clip, longer, copy = sys.argv[1:]
waves = [soundfile.read(path, dtype="float32")[0] for path in (clip, longer)]
told = {}
for name in (encoder, plus):
    model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
    extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        inputs = extractor(waves, sampling_rate=16000, padding=True, return_tensors="pt")
        told[name] = model(**inputs).last_hidden_state[0, :20].mean(0).tolist()
AutoModelForAudioClassification.from_pretrained(plus, trust_remote_code=True).save_pretrained(copy)
recogniser = pipeline("audio-classification", model=plus, trust_remote_code=True)
recogniser.processor.save_pretrained(copy)
for name, arguments in ((plus, {}), (plus, {"task": "audio-classification"}), (copy, {}), (system, {})):
    recogniser = pipeline(model=name, trust_remote_code=True, **arguments)
    assert type(recogniser).__name__ == "SpeechEmotionPipeline", type(recogniser)
    told.setdefault(name, []).append(recogniser(clip)) if name != plus else told.update(
        {f"{name} scores": recogniser(clip)})
print(json.dumps(told))
"""


@pytest.mark.slow
def test_without_the_package(plus: Path, different_clips: list[np.ndarray], tmp_path: Path) -> None:
    options = options_with()
    encoder = convert(write(tmp_path / "released", options, tensors_of(options)), tmp_path / "encoder")
    whole = system(plus, different_clips, tmp_path / "system")
    assert (whole / "encoders_emotion2vec.py").is_file()
    clips = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for path, clip in zip(clips, (noise(0.9), noise(1.7, 1)), strict=True):
        soundfile.write(path, clip, 16000, subtype="FLOAT")
    environment = os.environ | {"PYTHONPATH": str(Path(np.__file__).parents[1]), "HF_HOME": str(tmp_path / "hf")}
    arguments = [plus, encoder, whole, *clips, tmp_path / "copy"]
    done = subprocess.run(
        [sys.executable, "-S", "-c", STRANGER, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    waves = [noise(0.9), noise(1.7, 1)]
    inputs = Emotion2VecFeatureExtractor()(waves, sampling_rate=16000, padding=True, return_tensors="pt")
    for name in (plus, encoder):
        with torch.no_grad():
            states = Emotion2VecModel.from_pretrained(name).eval()(**inputs).last_hidden_state[0, :20].mean(0)
        assert told[str(name)] == pytest.approx(states.tolist(), abs=1e-5)
    ours = SpeechEmotionPipeline(*load(plus))(str(clips[0]))
    assert told[f"{plus} scores"] == [
        {"label": row["label"], "score": pytest.approx(row["score"], abs=1e-6)} for row in ours
    ]
    assert told[str(tmp_path / "copy")] == [told[f"{plus} scores"]]
    ours = SpeechEmotionPipeline(*load(whole))(str(clips[0]))
    assert [row["label"] for row in told[str(whole)][0]] == [row["label"] for row in ours]
    assert not list((tmp_path / "copy").glob("*.bin"))


@pytest.mark.slow
def test_a_recipe_with_it_and_kept_hidden_states(plus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = {"train_clips": 32, "validation_clips": 16, "test_clips_per_class": 2}
    arguments = ["train", "demo", "--audio_backbone", str(plus), "--text_backbone", "null"]
    arguments += [f"--corpus_options.{name}={value}" for name, value in sizes.items()]
    arguments += [
        "--num_train_epochs",
        "2",
        "--freeze_audio",
        "true",
        "--cache_features",
        "memory",
        "--audio_layers",
        "weighted",
    ]
    arguments += [
        "--mixing_probability",
        "0",
        "--shuffled_label_baseline",
        "false",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "epoch 2: loss" in printed
    assert (tmp_path / "run" / "encoders_emotion2vec.py").is_file()
    SpeechEmotionPipeline(*load(tmp_path / "run"))(noise(1.0))
