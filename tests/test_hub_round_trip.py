"""A pushed system works for people who do not have the sailer package, and keeps its code when it is saved again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sailer import SailerEnsemble, SpeechEmotionPipeline
from sailer.ensemble_sailer import load_system
from sailer.hub.publishing import push
from sailer.processing_sailer import SailerEnsembleProcessor
from sailer.training.ensembling import build_ensemble

# Run with -S and only site-packages on the path: .pth files, and with them an editable install, are not followed.
STRANGER = """
import json
import sys
try:
    import sailer
except ImportError:
    pass
else:
    raise SystemExit("the sailer package is visible here: this would prove nothing")
import soundfile
import torch
from transformers import AutoConfig, AutoModelForAudioClassification, AutoProcessor, pipeline

system, clip, answers, copy, *text = sys.argv[1:]
config = AutoConfig.from_pretrained(system, trust_remote_code=True)
model = AutoModelForAudioClassification.from_pretrained(system, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(system, trust_remote_code=True)
assert config.model_type.startswith("sailer") and type(processor).__name__.startswith("Sailer")
wave = soundfile.read(clip, dtype="float32")[0]
with torch.no_grad():
    outputs = dict(model(**processor(audio=wave, text=text or None, sampling_rate=16000)))
item = {"audio": clip, "text": text[0]} if text else clip
model.save_pretrained(copy)
processor.save_pretrained(copy)
results = []
for name, arguments in ((system, {}), (system, {"task": "audio-classification"}), (copy, {})):
    classifier = pipeline(model=name, trust_remote_code=True, **arguments)
    assert type(classifier).__name__ == "SpeechEmotionPipeline", type(classifier)
    results.append([classifier(item), classifier(item, return_all=True, prior="natural")])
torch.save(outputs, answers)
print(json.dumps(results, default=lambda array: array.tolist()))
"""
WEIGHTS = [3.0, *[1.0] * 8]
CODE = {path.name for path in Path(__file__).resolve().parents[1].glob("*_sailer.py")} | {"encoders_emotion2vec.py"}


@pytest.fixture
def tiny_ensemble(tiny_sailer: Path, tiny_speech_sailer: Path, tmp_path: Path) -> Path:
    systems = [tiny_sailer, tiny_speech_sailer]
    SailerEnsemble.from_pretrained(systems).save_pretrained(tmp_path / "ensemble")
    SailerEnsembleProcessor.from_pretrained(systems).save_pretrained(tmp_path / "ensemble")
    return tmp_path / "ensemble"


@pytest.fixture
def tiny_references(tiny_sailer: Path, tiny_speech_sailer: Path, tmp_path: Path, hub) -> Path:
    """An ensemble of which the Hub has the members."""
    for folder, name in ((tiny_sailer, "one"), (tiny_speech_sailer, "two")):
        model, processor = load_system(folder)
        model.config.label_weights = WEIGHTS if name == "one" else None
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text("A system.")
        push(tmp_path / name, name)
    systems = ["me/one", "me/two"]
    build_ensemble(systems, tmp_path / "references", references=True)
    return tmp_path / "references"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("system", "texts"),
    [
        ("tiny_sailer", ("so happy", "leave me")),
        ("tiny_speech_sailer", ()),
        ("tiny_ensemble", ("so happy", "leave me")),
        ("tiny_references", ("so happy", "leave me")),
    ],
)
def test_without_the_package(
    system: str,
    texts: tuple[str, ...],
    different_clips: list[np.ndarray],
    hub,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(system)
    model, processor = load_system(folder)
    getattr(model, "members", [model.eval()])[0].config.label_weights = WEIGHTS
    saved, clip, answers = tmp_path / "system", tmp_path / "clip.wav", tmp_path / "answers.pt"
    model.save_pretrained(saved)
    processor.save_pretrained(saved)
    (saved / "README.md").write_text("A system.")
    push(saved, "it")
    soundfile.write(clip, different_clips[0], 16000, subtype="FLOAT")

    environment = os.environ | {
        "PYTHONPATH": str(Path(np.__file__).parents[1]),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    arguments = ["me/it", str(clip), str(answers), str(tmp_path / "copy"), *texts[:1]]
    done = subprocess.run(
        [sys.executable, "-S", "-c", STRANGER, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = torch.load(answers, weights_only=True)

    def ours(wave: np.ndarray, text: str | None) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return dict(model(**processor(audio=wave, text=text, sampling_rate=16000)))

    expected = ours(different_clips[0], *(texts[:1] or [None]))
    assert outputs.keys() == expected.keys()
    others = [ours(different_clips[1], *(texts[:1] or [None])), *(ours(different_clips[0], t) for t in texts[1:])]
    for name, value in expected.items():
        assert torch.equal(outputs[name], value), f"{name} differs from that of the model that was saved"
        different = others[:1] if name == "speech_means" else others  # which a transcript does not change
        assert all((value - other[name]).abs().max() > 0.01 for other in different), f"{name} is always the same"

    classifier = SpeechEmotionPipeline(model=model, processor=processor, device="cpu")
    item = {"audio": str(clip), "text": texts[0]} if texts else str(clip)
    expected = [classifier(item), classifier(item, return_all=True, prior="natural")]
    assert expected[0] != expected[1]["primary"] and expected[1].get("transcript") == (texts[0] if texts else None)
    expected = json.loads(json.dumps(expected, default=np.ndarray.tolist))
    assert json.loads(done.stdout.splitlines()[-1]) == [expected] * 3
    code = CODE if system in ("tiny_ensemble", "tiny_references") else CODE - {"ensemble_sailer.py"}
    assert {path.name for path in (tmp_path / "copy").glob("*.py")} == code
    assert {name for name in hub.files["me/it"] if name.endswith(".py")} == code | {"handler.py"}
    assert not list((tmp_path / "copy").glob("*.bin"))
