"""LoRA through the main job: what a run keeps and leaves, how it goes on from a checkpoint, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.data.rendering import rendering_key
from sailer.settings import Settings, load_recipe, resolve
from sailer.train import fit, prepare, run

from .sounds import noise

ADAPTER = Path("audio_adapter") / "adapter_model.safetensors"
LORA = {"audio_lora_rank": 2, "audio_lora_layers": 1, "lora_alpha": 4, "text_lora_rank": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 16 clips of noise."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["audio,split,votes,transcript,speaker"]
    for number in range(16):
        soundfile.write(folder / f"{number}.wav", noise(0.3, number), 16000)
        split = ("train", "train", "validation", "test")[number // 4]
        lines.append(f"{number}.wav,{split},{('Happy', 'Sad')[number % 2]},so it is,{split}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder / "clips.csv"


@pytest.fixture
def options(corpus: Path, tiny_whisper: Path, tiny_text: Path, tmp_path: Path) -> dict:
    return {
        **{"corpus": "manifest", "data_dir": str(corpus), "corpus_options": {}},
        **{"audio_backbone": str(tiny_whisper), "text_backbone": str(tiny_text), "heads": ["primary"]},
        **{"freeze_audio": True, "freeze_text": True, "hidden_size": 16, "mixing_probability": 0.0},
        **{"num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True},
        **{"output_dir": str(tmp_path / "out"), "shuffled_label_baseline": False, "save_total_limit": 5},
        **{"metric_for_best_model": "kl", "save_only_model": False},
    }


def settings(options: dict, **changes: object) -> Settings:
    return resolve(load_recipe("demo"), options | changes)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_checkpoint_holds_what_trains_and_a_run_goes_on_from_it(options: dict) -> None:
    trainer = fit(prepare(settings(options, **LORA, load_best_model_at_end=False)))
    expected, checkpoints = weights(trainer), Path(trainer.args.output_dir)
    first, last = (checkpoints / f"checkpoint-{step}" for step in (2, 4))
    saved = load_file(last / "trained.safetensors")
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert set(saved) & {name for name, _ in trainer.model.named_parameters()} == trained
    of_lora = {name for name in saved if ".lora_" in name}
    # One layer of the speech encoder, two of the text encoder; two matrices in each, A and B of each.
    assert len(of_lora) == (1 + 2) * 2 * 2 and {name for name in trained if "_encoder." in name} == of_lora
    assert not torch.equal(saved[min(of_lora)], load_file(first / "trained.safetensors")[min(of_lora)])

    options["resume_from_checkpoint"] = str(first)
    again = weights(fit(prepare(settings(options, **LORA, load_best_model_at_end=False))))
    assert all(torch.equal(value, again[name]) for name, value in expected.items())
    with pytest.raises(ValueError, match="audio_lora_rank \\(2 there, 3 here\\)"):
        fit(prepare(settings(options, **LORA | {"audio_lora_rank": 3}, load_best_model_at_end=False)))


@pytest.mark.slow
def test_a_run_leaves_the_whole_system_and_its_adapters(options: dict, tmp_path: Path, capsys) -> None:
    folder = run("demo", options | LORA)
    assert "could not be tried" not in capsys.readouterr().err
    whole = SailerForAudioClassification.from_pretrained(folder).eval()
    adapted = SailerForAudioClassification.from_pretrained(folder / "adapters").eval()
    assert whole.config.audio_lora is None and adapted.config.audio_lora["alpha"] == 4
    inputs = SailerProcessor.from_pretrained(folder)(noise(0.5), text="so it is", sampling_rate=16000)
    with torch.no_grad():
        torch.testing.assert_close(whole(**inputs).logits, adapted(**inputs).logits, atol=1e-5, rtol=0)
    assert (folder / "adapters" / ADAPTER).stat().st_size < 10_000 < (folder / "model.safetensors").stat().st_size

    second = tmp_path / "second"
    going_on = {"base_model": str(folder), "output_dir": str(second), "save_merged": False, "num_train_epochs": 1}
    run("demo", options | {"audio_lora_rank": 1} | going_on)
    assert (second / ADAPTER).is_file() and not (second / "adapters").exists()
    model = SailerForAudioClassification.from_pretrained(second)
    assert model.config.backbones["audio"]["source"] == str(folder)


def test_a_tiny_backbone_stays_for_the_adapters_that_are_of_it(options: dict, tmp_path: Path) -> None:
    changes = {"audio_backbone": "tiny-wavlm", "text_backbone": None, "text_dropout": 0.0, "num_train_epochs": 1}
    folder = run("demo", options | changes | {"audio_lora_rank": 2, "backbone_learning_rate": 1e-2})
    assert SailerForAudioClassification.from_pretrained(folder / "adapters").config.audio_config.model_type == "wavlm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LORA | {"cache_features": "memory"}, "cache_features is 'memory' but audio_lora_rank is 2: only a frozen"),
        (LORA | {"freeze_audio": False}, "audio_lora_rank is 2 but freeze_audio is false"),
        (LORA | {"freeze_text": False}, "text_lora_rank is 1 but freeze_text is false"),
        (
            LORA | {"text_backbone": None, "text_dropout": 0.0},
            "text_lora_rank is 1, but the system has no text encoder",
        ),
        (LORA | {"audio_lora_rank": 0}, "audio_lora_rank is a whole number from 1, got 0"),
        (LORA | {"lora_dropout": 1.5}, "lora_dropout is a share from 0 to below 1"),
        (LORA | {"gradient_checkpointing": True}, "gradient_checkpointing does nothing for a frozen encoder"),
        ({"audio_lora_layers": 2}, "audio_lora_layers is 2, which does nothing without LoRA: set audio_lora_rank"),
        (
            LORA | {"text_lora_rank": None, "text_lora_targets": ["query"]},
            "which does nothing without LoRA: set text_",
        ),
        ({"use_dora": True}, "use_dora is True, which does nothing without LoRA: set audio_lora_rank"),
        ({"save_merged": False}, "save_merged is False, which does nothing without LoRA"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(changes: dict, message: str, options: dict) -> None:
    with pytest.raises(ValueError, match=message):
        settings(options, **changes)


def test_states_are_kept_of_the_tower_without_lora_alone(options: dict) -> None:
    job = prepare(settings(options, text_lora_rank=1, cache_features="memory"))
    assert job.features is not None
    item = job.validation_rows[0]
    kept = job.features.inputs([rendering_key(item)], [item["transcript"]])
    assert set(kept) == {"audio_hidden_states", "attention_mask"}


def test_the_command_line_trains_it(options: dict, tmp_path: Path, capsys) -> None:
    given = {name: value for name, value in (options | LORA).items() if value != {} and not isinstance(value, list)}
    given |= {"heads": "[primary]", "corpus_options": "{}", "num_train_epochs": 1, "audio_lora_targets": "[attention]"}
    assert main(["train", "demo", *(f"--{name}={value}" for name, value in given.items())]) == 0
    names = list(load_file(tmp_path / "out" / "adapters" / ADAPTER))
    assert len(names) == 8 and all("layers.1.self_attn." in name for name in names)
    assert (
        main(["train", "demo", *(f"--{name}={value}" for name, value in given.items()), "--audio_lora_rank=-1"]) == 2
    )
    assert "audio_lora_rank is a whole number from 1, got -1" in capsys.readouterr().err
    assert np.isfinite(
        [float(value.sum()) for value in load_file(tmp_path / "out" / "model.safetensors").values()]
    ).all()
