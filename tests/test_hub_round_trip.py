"""A saved folder works for people who do not have the sailer package, and keeps its code when it is saved again."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

# Run with -S and only site-packages on the path: .pth files, and with them an editable install, are not followed.
STRANGER = """
import sys
try:
    import sailer
except ImportError:
    pass
else:
    raise SystemExit("the sailer package is visible here: this would prove nothing")
import torch
from transformers import AutoConfig, AutoModelForAudioClassification, AutoProcessor, pipeline

folder, clip, copy, text = sys.argv[1:]
item = {"audio": clip, "text": text} if text else clip
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "sailer" and type(processor).__name__ == "SailerProcessor"
import soundfile
wave = soundfile.read(clip, dtype="float32")[0]
inputs = processor(audio=wave, sampling_rate=16000)
expected = torch.load(sys.argv[2] + ".pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected), "logits differ from those of the model that was saved"
for arguments in ({}, {"task": "audio-classification"}):
    classifier = pipeline(model=folder, trust_remote_code=True, **arguments)
    assert type(classifier).__name__ == "SpeechEmotionPipeline", type(classifier)
    predictions = classifier(item)
    assert abs(sum(p["score"] for p in predictions) - 1) < 1e-5 and len(predictions) == 9
model.save_pretrained(copy)
processor.save_pretrained(copy)
again = pipeline(model=copy, trust_remote_code=True)(item)
assert [p["label"] for p in again] == [p["label"] for p in predictions]
print("stranger is served")
"""
CODE = {
    "audio_sailer.py",
    "configuration_sailer.py",
    "encoders_sailer.py",
    "layers_sailer.py",
    "modeling_sailer.py",
    "pipeline_sailer.py",
    "processing_sailer.py",
    "windows_sailer.py",
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 20000), 16000)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("system", "text"), [("tiny_sailer", "so happy"), ("tiny_speech_sailer", "")])
def test_without_the_package(
    system: str, text: str, clip: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import torch

    from sailer import SailerForAudioClassification, SailerProcessor
    from sailer.audio_sailer import load_audio

    folder = request.getfixturevalue(system)
    model = SailerForAudioClassification.from_pretrained(folder).eval()
    processor = SailerProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(audio=load_audio(clip), sampling_rate=16000)).logits
    torch.save(logits, f"{clip}.pt")

    site_packages = Path(np.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(site_packages), "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [sys.executable, "-S", "-c", STRANGER, str(folder), str(clip), str(tmp_path / "copy"), text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "stranger is served" in result.stdout, result.stderr[-3000:]
    assert {path.name for path in (tmp_path / "copy").glob("*.py")} == CODE
    assert {path.name for path in Path(folder).glob("*.py")} == CODE
    assert not list((tmp_path / "copy").glob("*.bin"))
