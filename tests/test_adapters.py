"""LoRA in the towers: what it adds, what trains, how it is saved and loaded, merged and exported; what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoTokenizer,
    WhisperForAudioClassification,
)

import sailer
from sailer import SailerConfig, SailerEnsemble, SailerForAudioClassification, SailerProcessor
from sailer.adapters_sailer import add_lora, base_state, checked_lora, lora_parts, lora_targets
from sailer.cli import main
from sailer.encoders_sailer import build_encoder
from sailer.hub.merging import merge
from sailer.hub.publishing import PushError, check_system
from sailer.layers_sailer import FusedWavLMAttention
from sailer.training.tiny_backbones import make_tiny_whisper

BOTH = {"audio_lora": {"rank": 2, "targets": ["attention", "feed_forward"]}, "text_lora": {"rank": 3}}
# A tiny encoder of each family: layers, width and inner width.
SIZES = {
    **{"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4},
    **{"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
    **{"d_model": 32, "encoder_layers": 3, "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_layers": 1},
    **{"vocab_size": 50, "position_embeddings_type": None},
}
WAV2VEC2 = ("attention.q_proj", "feed_forward.output_dense", 4, 2)
CONFORMER = ("self_attn.linear_q", "ffn2.output_dense", 4, 4)
BERT = ("attention.self.query", "output.dense", 4, 2)
# A name of the attention and one of the feed-forward part, and how many layers of each there are.
FAMILIES = {
    "whisper": ("self_attn.out_proj", "fc2", 4, 2),
    **dict.fromkeys(("wavlm", "hubert", "wav2vec2", "unispeech", "unispeech-sat", "data2vec-audio"), WAV2VEC2),
    **dict.fromkeys(("sew", "emotion2vec"), WAV2VEC2),
    **dict.fromkeys(("wav2vec2-bert", "wav2vec2-conformer"), CONFORMER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
}


def tiny_encoder(model_type: str) -> Any:
    plain = AutoConfig.for_model(model_type)
    sizes = {name: value for name, value in SIZES.items() if hasattr(plain, name)}
    sizes |= {"sew": {"conv_dim": [16] * 13}, "emotion2vec": {"prenet_layers": 1}}.get(model_type, {})
    torch.manual_seed(0)
    return build_encoder(AutoConfig.for_model(model_type, **sizes))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_targets_of_each_family(model_type: str) -> None:
    encoder = tiny_encoder(model_type)
    attention, feed_forward, of_attention, of_feed_forward = FAMILIES[model_type]
    layers = encoder.config.num_hidden_layers
    chosen = lora_targets(encoder, "audio", ["feed_forward"], None)
    assert len(chosen) == layers * of_feed_forward
    assert sum(name.endswith(f".{feed_forward}") for name in chosen) == layers
    both = lora_targets(encoder, "audio", ["attention", "feed_forward"], 1)
    assert len(both) == of_attention + of_feed_forward and all(f".{layers - 1}." in name for name in both)
    assert (
        any(name.endswith(f".{attention}") for name in both) and not set(both) - dict(encoder.named_modules()).keys()
    )
    add_lora(encoder, "audio", checked_lora("audio", {"rank": 2, "targets": ["attention", "feed_forward"]}, True))
    shapes = [value.shape for part in lora_parts(encoder) for value in part.parameters()]
    assert len(shapes) == layers * (of_attention + of_feed_forward) * 2 and all(2 in shape for shape in shapes)


def test_names_of_layers_are_targets_too() -> None:
    encoder = tiny_encoder("roberta")
    names = [f"encoder.layer.{index}.attention.self.{part}" for index in (1, 2) for part in ("query", "value")]
    assert lora_targets(encoder, "text", ["query", "self.value"], 2) == names
    assert lora_targets(encoder, "text", ["output.dense"], 1) == [
        *("encoder.layer.2.attention.output.dense", "encoder.layer.2.output.dense")
    ]


@pytest.mark.parametrize(("options", "scale"), [({}, 1), ({"alpha": 1}, 1 / 4), ({"alpha": 6, "use_rslora": True}, 3)])
def test_a_layer_with_lora_by_hand(options: dict[str, Any], scale: float) -> None:
    encoder = tiny_encoder("whisper")
    plain = {name: value.clone() for name, value in encoder.state_dict().items()}
    add_lora(encoder, "audio", checked_lora("audio", {"rank": 4, "layers": 1} | options, True))
    layer = encoder.layers[2].fc1
    down, up = (torch.randn(shape) for shape in ((4, 32), (48, 4)))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
        x = torch.randn(5, 32)
        expected = x @ plain["layers.2.fc1.weight"].T + plain["layers.2.fc1.bias"] + scale * (x @ down.T @ up.T)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)
    assert base_state(encoder).keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in base_state(encoder).items())


@pytest.fixture
def system(
    tiny_whisper: Path, tiny_wavlm: Path, tiny_text: Path, different_clips: list[np.ndarray]
) -> Callable[..., tuple[Any, Any, Any]]:
    """A system, its processor and inputs: speech of the backbone of that name, and text."""

    def build(backbone: str = "whisper", seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
        audio = {"whisper": tiny_whisper, "wavlm": tiny_wavlm}[backbone]
        torch.manual_seed(seed)
        options = {"heads": ["primary"], "hidden_size": 16} | options
        model = SailerForAudioClassification.from_audio_text_pretrained(audio, tiny_text, **options)
        processor = SailerProcessor(
            AutoFeatureExtractor.from_pretrained(audio), AutoTokenizer.from_pretrained(tiny_text)
        )
        return model, processor, processor(different_clips[:2], text=["so happy", "leave me"], sampling_rate=16000)

    return build


def train(model: Any, inputs: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def answers(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def same(answers: torch.Tensor, others: torch.Tensor) -> bool:
    """Up to the last digits, which products may owe to where in memory the weights lie."""
    return torch.allclose(answers, others, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", ["whisper", "wavlm"])
def test_at_first_it_changes_nothing_and_then_it_alone_trains(backbone: str, system: Callable) -> None:
    model, _, inputs = system(backbone, audio_layers="weighted", **BOTH)
    plain, *_ = system(backbone, audio_layers="weighted")
    own = {name: value for name, value in model.state_dict().items() if ".lora_" not in name}
    plain.load_state_dict({name.replace(".base_layer.", "."): value for name, value in own.items()})
    assert same(answers(model, inputs), answers(plain, inputs))
    before = {name: value.clone() for name, value in model.named_parameters()}
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name in trained if "_encoder." in name} == {name for name in before if ".lora_" in name}
    train(model, inputs)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == trained
    assert sum("text_encoder" in name for name in changed) == 2 * 2 * 2  # two layers' two matrices, A and B


def test_only_lora_hears_dropout(system: Callable) -> None:
    model, _, inputs = system("wavlm", audio_lora={"rank": 2, "dropout": 0.5}, conv_dropout=0.0)
    model.train()
    assert not model.sailer.audio_encoder.training
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)  # what it gives is zero yet
    train(model, inputs).train()
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    assert same(answers(model, inputs), answers(model, inputs))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "alpha": 3.5}], ids=str)
@pytest.mark.parametrize("backbone", ["whisper", "wavlm"])
def test_saved_as_adapters_and_merged(backbone: str, options: dict, system: Callable, tmp_path: Path) -> None:
    audio = {"rank": 2, "targets": ["attention", "feed_forward"], "layers": 1, **options}
    model, processor, inputs = system(backbone, audio_lora=audio, text_lora={"rank": 2})
    expected = answers(train(model, inputs), inputs)
    plain, *_ = system(backbone)
    assert (expected - answers(plain, inputs)).abs().max() > 0.01

    model.save_pretrained(tmp_path / "adapters")
    processor.save_pretrained(tmp_path / "adapters")
    files = {str(path.relative_to(tmp_path / "adapters")) for path in (tmp_path / "adapters").rglob("*.safetensors")}
    assert files == {"model.safetensors", *(f"{name}_adapter/adapter_model.safetensors" for name in ("audio", "text"))}
    assert not [name for name in load_file(tmp_path / "adapters" / "model.safetensors") if "_encoder." in name]
    again = SailerForAudioClassification.from_pretrained(tmp_path / "adapters")
    assert same(answers(again, inputs), expected)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name, value in again.named_parameters() if value.requires_grad} == trained
    again.save_pretrained(tmp_path / "copy")
    copies = [path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*.safetensors")]
    for name in copies:
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapters" / name).read_bytes()

    again.merge_lora().save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(answers(again, inputs), expected, atol=1e-5, rtol=0)
    whole = SailerForAudioClassification.from_pretrained(tmp_path / "whole")
    assert same(answers(whole, inputs), answers(again, inputs))
    assert whole.state_dict().keys() == plain.state_dict().keys() and whole.config.backbones is None
    assert "peft" in (tmp_path / "adapters" / "requirements.txt").read_text()
    assert "peft" not in (tmp_path / "whole" / "requirements.txt").read_text()
    if backbone == "wavlm":
        kinds = {type(part) for part in whole.sailer.audio_encoder.modules() if "Attention" in type(part).__name__}
        assert kinds == {FusedWavLMAttention}


def test_the_adapter_is_pefts_own(system: Callable, tiny_whisper: Path, tmp_path: Path) -> None:
    model, _, inputs = system(audio_lora={"rank": 2})
    train(model, inputs).save_pretrained(tmp_path)
    options = json.loads((tmp_path / "audio_adapter" / "adapter_config.json").read_text())
    assert options["peft_type"] == "LORA" and options["base_model_name_or_path"] == str(tiny_whisper)
    stock = WhisperForAudioClassification.from_pretrained(tiny_whisper).encoder
    adapted = peft.PeftModel.from_pretrained(stock, tmp_path / "audio_adapter").merge_and_unload()
    model.merge_lora()
    ours = model.sailer.audio_encoder.state_dict()
    assert adapted.state_dict().keys() == ours.keys()
    for name, value in adapted.state_dict().items():
        torch.testing.assert_close(value, ours[name], atol=1e-6, rtol=0)


def test_oddly_built_ones_round_trip_too(system: Callable, tmp_path: Path) -> None:
    """A text encoder that is trained whole is in the file, and batch normalisation's state; new heads start afresh."""
    model, _, inputs = system(audio_lora={"rank": 2}, freeze_text=False, frame_norm=True)
    expected = answers(train(model, inputs), inputs)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert [name for name in saved if "text_encoder." in name] and "sailer.audio_frame_norm.running_mean" in saved
    assert same(answers(SailerForAudioClassification.from_pretrained(tmp_path), inputs), expected)
    more = SailerForAudioClassification.from_pretrained(tmp_path, heads=["primary", "sex"], dtype=torch.bfloat16)
    assert {value.dtype for value in more.parameters()} == {torch.bfloat16} and "sex" in more.heads
    base = sailer.SailerModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert same(base(**inputs).embeddings, model(**inputs).embeddings)
    auto = AutoModelForAudioClassification.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert same(answers(auto, inputs), expected)


def test_training_goes_on_from_a_saved_system(system: Callable, tmp_path: Path) -> None:
    first, _, inputs = system(freeze_audio=False)
    train(first, inputs).save_pretrained(tmp_path / "first")
    first.config.freeze_audio = True
    first.save_pretrained(tmp_path / "first")
    model = SailerForAudioClassification.from_pretrained(tmp_path / "first")
    model.add_lora(audio={"rank": 2}, source=tmp_path / "first")
    assert same(answers(model, inputs), answers(first, inputs))
    train(model, inputs).save_pretrained(tmp_path / "second")
    assert not [name for name in load_file(tmp_path / "second" / "model.safetensors") if "_encoder." in name]
    second = SailerForAudioClassification.from_pretrained(tmp_path / "second")
    assert same(answers(second, inputs), answers(model, inputs))
    with pytest.raises(ValueError, match=r"The audio encoder has LoRA already: merge it first"):
        second.add_lora(audio={"rank": 2})
    second.merge_lora().add_lora(audio={"rank": 2})
    with pytest.raises(ValueError, match=r"not known where its weights are: set config\.backbones"):
        second.save_pretrained(tmp_path / "third")


def test_a_backbone_that_moved_or_is_another(system: Callable, tiny_text: Path, tmp_path: Path) -> None:
    make_tiny_whisper(tmp_path / "here")
    model = SailerForAudioClassification.from_audio_text_pretrained(
        tmp_path / "here", tiny_text, heads=["primary"], hidden_size=16, audio_lora={"rank": 2}
    )
    _, processor, inputs = system()
    expected = answers(train(model, inputs), inputs)
    model.save_pretrained(tmp_path / "adapters")
    processor.save_pretrained(tmp_path / "adapters")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(
        ValueError, match=r"The audio encoder of these adapters cannot be loaded: .*backbones=\{'audio'"
    ):
        SailerForAudioClassification.from_pretrained(tmp_path / "adapters")
    moved = {"backbones": {"audio": {"source": str(tmp_path / "there")}}}
    for kind in (SailerForAudioClassification, AutoModelForAudioClassification):
        options = moved if kind is SailerForAudioClassification else moved | {"trust_remote_code": True}
        assert same(answers(kind.from_pretrained(tmp_path / "adapters", **options), inputs), expected)
    other = str(make_tiny_whisper(tmp_path / "other", seed=1))
    with pytest.raises(
        ValueError, match=r"other are not those that the adapters of the audio encoder were trained on"
    ):
        SailerForAudioClassification.from_pretrained(tmp_path / "adapters", backbones={"audio": {"source": other}})

    assert main(["merge", str(tmp_path / "adapters"), str(tmp_path / "whole")]) == 2
    command = [
        "merge",
        str(tmp_path / "adapters"),
        str(tmp_path / "whole"),
        "--audio_backbone",
        str(tmp_path / "there"),
    ]
    assert main(command) == 0
    whole = SailerForAudioClassification.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(answers(whole, inputs), expected, atol=1e-5, rtol=0)
    assert SailerProcessor.from_pretrained(tmp_path / "whole").tokenizer is not None
    with pytest.raises(FileExistsError, match="whole is there already"):
        merge(tmp_path / "adapters", tmp_path / "whole")
    with pytest.raises(ValueError, match="has no adapters: it is whole as it is"):
        merge(tmp_path / "whole", tmp_path / "twice")


def test_damaged_adapters_are_named(system: Callable, tmp_path: Path) -> None:
    model, _, inputs = system(**BOTH)
    train(model, inputs).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "text_adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"text_adapter/adapter_model\.safetensors"):
        SailerForAudioClassification.from_pretrained(tmp_path / "b")
    shutil.copy(tmp_path / "a" / "audio_adapter" / "adapter_model.safetensors", tmp_path / "b" / "text_adapter")
    with pytest.raises(ValueError, match="The adapter of the text encoder lacks"):
        SailerForAudioClassification.from_pretrained(tmp_path / "b")
    (tmp_path / "b" / "text_adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="the file is truncated or damaged"):
        SailerForAudioClassification.from_pretrained(tmp_path / "b")


def test_an_ensemble_of_adapters(system: Callable, different_clips: list[np.ndarray], tmp_path: Path) -> None:
    folders = []
    for seed in (0, 1):
        model, processor, inputs = system(seed=seed, audio_lora={"rank": 2})
        folders.append(tmp_path / f"system_{seed}")
        train(model, inputs).save_pretrained(folders[-1])
        processor.save_pretrained(folders[-1])
    assert main(["ensemble", *map(str, folders), str(tmp_path / "both")]) == 0
    assert max(path.stat().st_size for path in (tmp_path / "both").rglob("*.safetensors")) < 100_000
    ensemble = SailerEnsemble.from_pretrained(tmp_path / "both")
    own = [answers(SailerForAudioClassification.from_pretrained(folder), inputs).softmax(-1) for folder in folders]
    assert (own[0] - own[1]).abs().max() > 0.01
    assert all(member.config.audio_lora for member in ensemble.members)
    said = sailer.load(tmp_path / "both")({"audio": different_clips[0], "text": "so happy"}, top_k=9)
    shares = {item["label"]: item["score"] for item in said}
    mean = (own[0] + own[1])[0] / 2
    np.testing.assert_allclose([shares[label] for label in ensemble.config.labels], mean.numpy(), atol=1e-5)


def test_it_runs_in_every_way_of_running(system: Callable, different_clips: list[np.ndarray], tmp_path: Path) -> None:
    model, processor, inputs = system("wavlm", onednn_linear="on", **BOTH)
    expected = answers(train(model, inputs), inputs)
    model.sailer.config.onednn_linear = "off"
    torch.testing.assert_close(answers(model, inputs), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classifier = sailer.load(tmp_path)
    assert not lora_parts(classifier.model.sailer.audio_encoder)
    said = classifier({"audio": different_clips[0], "text": "so happy"}, top_k=9)
    shares = {item["label"]: item["score"] for item in said}
    np.testing.assert_allclose(
        [shares[label] for label in model.config.labels], expected[0].softmax(-1).numpy(), atol=1e-5
    )


@pytest.mark.slow
def test_exported_it_gives_the_same(system: Callable, different_clips: list[np.ndarray], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="exports need the onnx extra")
    model, processor, inputs = system("wavlm", **BOTH)
    train(model, inputs).save_pretrained(tmp_path / "adapters")
    processor.save_pretrained(tmp_path / "adapters")
    assert main(["export", str(tmp_path / "adapters"), str(tmp_path / "onnx")]) == 0
    item = {"audio": different_clips[0], "text": "so happy"}
    ours, theirs = (sailer.load(tmp_path / "adapters")(item), sailer.load(tmp_path / "onnx", backend="onnx")(item))
    assert [one["label"] for one in ours] == [one["label"] for one in theirs]
    np.testing.assert_allclose([one["score"] for one in ours], [one["score"] for one in theirs], atol=1e-5)


# Run with -S and only site-packages on the path: .pth files, and with them an editable install, are not followed.
STRANGER = """
import sys
try:
    import sailer
except ImportError:
    pass
else:
    raise SystemExit("the sailer package is visible here: this would prove nothing")
folder, inputs, answers, has_peft = sys.argv[1:]
if has_peft == "False":
    sys.modules["peft"] = None
import torch
from transformers import AutoModelForAudioClassification
model = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, answers)
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_merged", [False, True], ids=["adapters", "merged"])
def test_without_the_package(is_merged: bool, system: Callable, tmp_path: Path) -> None:
    """As adapters with peft alone, merged without it."""
    model, processor, inputs = system(**BOTH)
    train(model, inputs)
    if is_merged:
        model.merge_lora()
    folder, given, said = tmp_path / "system", tmp_path / "inputs.pt", tmp_path / "answers.pt"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.save(dict(inputs), given)
    site = Path(np.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", STRANGER, *map(str, (folder, given, said)), str(not is_merged)],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert same(torch.load(said), answers(model, inputs))


def test_a_missing_peft_is_named(system: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, *_ = system(**BOTH)
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    for run in (lambda: system(**BOTH), lambda: SailerForAudioClassification.from_pretrained(tmp_path)):
        with pytest.raises(ImportError, match=r"LoRA needs peft: pip install 'sailer\[lora\]'"):
            run()


def test_adapters_of_an_encoder_on_this_machine_are_not_pushed(system: Callable, tmp_path: Path, caplog) -> None:
    model, processor, _ = system(**BOTH)
    for folder in (tmp_path, tmp_path / "adapters"):
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text("A system.")
    with pytest.raises(PushError, match=r"holds adapters of /.*, which nobody else has: push the whole system"):
        check_system(tmp_path)
    model.merge_lora().save_pretrained(tmp_path)
    caplog.set_level("INFO", "sailer")
    files = check_system(tmp_path)
    assert tmp_path / "model.safetensors" in files and not [path for path in files if "adapters" in path.parts]
    assert "adapters is not uploaded: its adapters are of an encoder on this machine" in caplog.text
    settings = json.loads((tmp_path / "adapters" / "config.json").read_text())
    for entry in settings["backbones"].values():
        entry["source"] = "me/backbone"
    (tmp_path / "adapters" / "config.json").write_text(json.dumps(settings))
    assert tmp_path / "adapters" / "audio_adapter" / "adapter_model.safetensors" in check_system(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio_lora": {"rank": 0}}, r"audio_lora_rank is a whole number from 1, got 0"),
        ({"audio_lora": {"rank": True}}, r"audio_lora_rank is a whole number from 1, got True"),
        ({"audio_lora": {"alpha": 1}}, r"audio_lora is \{'alpha': 1\}; give a mapping with rank"),
        ({"audio_lora": {"rank": 1, "beta": 1}}, r"give a mapping with rank, and of \['alpha'"),
        ({"audio_lora": {"rank": 1, "layers": 3}}, r"audio_lora_layers is 3, and this encoder has 2 layers"),
        ({"audio_lora": {"rank": 1, "layers": 0}}, r"audio_lora_layers is a whole number from 1, got 0"),
        ({"audio_lora": {"rank": 1, "alpha": -1}}, r"lora_alpha must be positive and finite, got -1"),
        ({"audio_lora": {"rank": 1, "dropout": 1}}, r"lora_dropout is a share from 0 to below 1, got 1"),
        ({"audio_lora": {"rank": 1, "use_dora": 1}}, r"use_dora is true or false, got 1"),
        ({"audio_lora": {"rank": 1, "targets": "fc1"}}, r"audio_lora_targets is 'fc1'; give a list"),
        ({"audio_lora": {"rank": 1, "targets": []}}, r"audio_lora_targets is \[\]; give a list"),
        (
            {"audio_lora": {"rank": 1, "targets": ["fc3"]}},
            r"audio_lora_targets names 'fc3', which no linear layer of this 'whisper' encoder is: choose of "
            r"attention, feed_forward, or self_attn\.k_proj",
        ),
        ({"audio_lora": {"rank": 1}, "freeze_audio": False}, r"audio_lora_rank is 1 but freeze_audio is false"),
        ({"text_lora": {"rank": 1}, "freeze_text": False}, r"text_lora_rank is 1 but freeze_text is false"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, system: Callable) -> None:
    with pytest.raises(ValueError, match=message):
        system(**options)


def test_text_lora_needs_a_text_encoder_and_layers_that_can_be_told_apart() -> None:
    with pytest.raises(ValueError, match="text_lora_rank is 2, but the system has no text encoder"):
        SailerConfig(text_lora={"rank": 2})
    encoder = AutoModel.from_config(AutoConfig.for_model("sew-d", **{**SIZES, "conv_dim": [16] * 13}))
    with pytest.raises(
        ValueError, match="The layers of a 'sew-d' encoder cannot be told apart: leave audio_lora_rank"
    ):
        lora_targets(encoder, "audio", ["attention"], None)
