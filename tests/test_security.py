"""What a folder from elsewhere cannot do: run its code, or be loaded with values that no system can have."""

import builtins
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor
from sailer.encoders_sailer import load_encoder
from sailer.hub.conversion import ConversionError, convert

HOSTILE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast, SequenceFeatureExtractor
Path({mark!r}).write_text("ran")
class Config(PretrainedConfig):
    model_type = "hostile"
class Extractor(SequenceFeatureExtractor):
    pass
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts code into a folder that tells when it runs; whoever is asked whether to run it answers yes."""
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    mark = tmp_path / "it-ran"

    def plant(folder: Path, file: str, part: str | None, change: dict) -> None:
        (folder / "hostile.py").write_text(HOSTILE.format(mark=str(mark)))
        content = json.loads((folder / file).read_text())
        (content[part] if part else content).update(change)
        (folder / file).write_text(json.dumps(content))

    yield plant
    assert questions == [] and not mark.exists()


def copy(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


def test_a_processors_parts_run_no_code(tiny_sailer: Path, tmp_path: Path, hostile) -> None:
    # A known class beside code of its own: the known one is taken.
    folder = copy(tiny_sailer, tmp_path / "known")
    hostile(
        folder,
        "processor_config.json",
        "feature_extractor",
        {"auto_map": {"AutoFeatureExtractor": "hostile.Extractor"}},
    )
    for processor in (
        SailerProcessor.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder, trust_remote_code=True),
    ):
        assert type(processor.feature_extractor).__name__ == "WhisperFeatureExtractor"
    unknown = {"feature_extractor_type": "HostileExtractor", "auto_map": {"AutoFeatureExtractor": "hostile.Extractor"}}
    hostile(folder, "processor_config.json", "feature_extractor", unknown)
    for load in (
        SailerProcessor.from_pretrained,
        lambda path: AutoProcessor.from_pretrained(path, trust_remote_code=True),
    ):
        with pytest.raises(ValueError, match=r"code of its own"):
            load(folder)


def test_a_tokenizer_runs_no_code(tiny_sailer: Path, tmp_path: Path, hostile) -> None:
    folder = copy(tiny_sailer, tmp_path / "system")
    change = {"tokenizer_class": "HostileTokenizer", "auto_map": {"AutoTokenizer": [None, "hostile.Tokenizer"]}}
    hostile(folder, "tokenizer_config.json", None, change)
    for load in (
        SailerProcessor.from_pretrained,
        lambda path: AutoProcessor.from_pretrained(path, trust_remote_code=True),
    ):
        try:
            processor = load(folder)
        except ValueError as error:
            assert "code of its own" in str(error)
        else:
            assert type(processor.tokenizer).__module__.startswith("transformers.")


@pytest.mark.parametrize("model_type", ["hostile", "whisper"])
def test_a_backbone_runs_no_code(model_type: str, tiny_whisper: Path, tmp_path: Path, hostile) -> None:
    folder = copy(tiny_whisper, tmp_path / "backbone")
    auto_map = {"AutoConfig": "hostile.Config", "AutoModel": "hostile.Model"}
    hostile(folder, "config.json", None, {"model_type": model_type, "auto_map": auto_map})
    if model_type == "whisper":
        assert load_encoder(folder, None).config.d_model == 64
    else:
        with pytest.raises(ValueError, match=r"backbone.*cannot be loaded"):
            load_encoder(folder, None)


def test_conversion_runs_no_code(shared: Path, tmp_path: Path, hostile) -> None:
    folder = copy(shared / "reference" / "vox_profile" / "whisper_frozen", tmp_path / "released")
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    shutil.copyfile(folder / "backbone_config.json", backbone / "config.json")
    (folder / "backbone_config.json").unlink()
    auto_map = {"AutoConfig": "hostile.Config"}
    hostile(backbone, "config.json", None, {"model_type": "hostile", "auto_map": auto_map})
    with pytest.raises(ConversionError, match="No backbone configuration could be read"):
        convert(folder, tmp_path / "converted", audio_backbone=str(backbone))
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sex_labels": ["a", "b", "c"]}, "sex_labels names 3.*two"),
        ({"label_weights": [math.nan] * 9}, "label_weights.*finite"),
        ({"label_weights": [-1.0] * 9}, "label_weights.*0 or more"),
        ({"label_prior": [math.inf] * 9}, "label_prior.*finite"),
        ({"max_seconds": -1}, "max_seconds.*-1"),
        ({"max_seconds": math.inf}, "max_seconds.*inf"),
        ({"max_seconds": "long"}, "max_seconds.*'long'"),
        ({"sampling_rate": 0}, "sampling_rate.*0"),
        ({"sampling_rate": None}, "sampling_rate.*None"),
        ({"hidden_size": -4}, "hidden_size.*-4"),
        ({"hidden_size": 2.5}, "hidden_size.*2.5"),
        ({"hidden_size": True}, "hidden_size.*True"),
        ({"conv_dropout": 1.5}, "conv_dropout.*1.5"),
        ({"text_dropout": math.nan}, "text_dropout.*nan"),
        ({"calibration_temperature": math.inf}, "calibration_temperature.*inf"),
        ({"heads": "primary"}, "heads.*list"),
        ({"labels": "Angry"}, "labels.*list"),
        ({"frame_norm": "yes"}, "frame_norm.*true or false"),
        ({"secondary_labels": []}, "secondary_labels.*empty"),
    ],
)
def test_a_configuration_with_values_that_cannot_be(
    options: dict, message: str, tmp_path: Path, tiny_sailer: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        SailerConfig(**options)
    saved = json.loads((tiny_sailer / "config.json").read_text())
    if "labels" in options:
        return
    (tmp_path / "config.json").write_text(json.dumps(saved | options))
    with pytest.raises(ValueError, match=message):
        SailerConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ({"model_type": "whisper", "d_model": -4}, "audio_config: d_model is -4"),
        ({"model_type": "whisper", "d_model": "wide"}, "audio_config: .*d_model"),
        ({"model_type": "whisper", "encoder_layers": None}, "audio_config: .*encoder_layers"),
        ({"model_type": "wavlm", "num_attention_heads": 0}, "audio_config: num_attention_heads is 0"),
        ({"model_type": 3}, "audio_config has no model_type"),
        ([], "audio_config has no model_type"),
    ],
)
def test_a_backbone_with_sizes_that_cannot_be(audio: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SailerConfig(audio_config=audio)


def test_saved_folders_say_what_they_require(tiny_sailer: Path) -> None:
    import configparser

    from packaging.requirements import Requirement

    stated = {r.name: r for r in map(Requirement, (tiny_sailer / "requirements.txt").read_text().split("\n")[:-1])}
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).resolve().parents[1] / "setup.cfg")
    ours = {r.name: r for r in map(Requirement, setup["options"]["install_requires"].strip().split("\n"))}
    assert {"torch", "transformers", "numpy", "soundfile", "soxr", "safetensors"} == set(stated)
    assert {name: stated[name].specifier for name in stated} == {name: ours[name].specifier for name in stated}


def test_not_a_number_in_the_weights_is_refused_when_converting(shared: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy(shared / "reference" / "vox_profile" / "whisper_frozen", tmp_path / "released")
    folder.chmod(0o755)
    (folder / "model.safetensors").chmod(0o644)
    tensors = load_file(folder / "model.safetensors")
    tensors["emotion_layer.0.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=r"emotion_layer\.0\.weight.*not finite"):
        convert(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_system_loads_without_its_code_being_trusted(tiny_sailer: Path, hostile) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer)
    assert type(model).__module__ == "sailer.modeling_sailer"
