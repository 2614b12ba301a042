import math
from pathlib import Path

import pytest

from sailer.hub.card import environment_facts, render_card

LABELS = ["Angry", "Happy", "Sad", "Other"]


@pytest.fixture
def facts() -> dict:
    return {
        "model_name": "a-system",
        "model_id": "me/a-system",
        "audio_backbone": "openai/whisper-base",
        "text_backbone": "tiny-text",
        "audio_layers": "last",
        "heads": ["primary", "sex"],
        "labels": LABELS,
        "scored_labels": LABELS[:-1],
        "corpus": "ravdess",
        "statistics": {"train": {"Angry": 1200, "No agreement": 2}, "test": {"Angry": 1, "Sad": 4}},
        "settings": "corpus: ravdess\nseed: 0\n",
        "metrics": {
            "validation": {"macro_f1": 0.25, "accuracy": math.nan},
            "test": {
                "clips": 400.0,
                "loss": 1.5,
                "loss_primary": 1.5,
                "macro_f1": 0.41237,
                "accuracy": 0.5,
                "uar": 0.375,
                "f1_Angry": 0.125,
                "ap_Angry": 0.0,
                "f1_Sad": 1.0,
                "runtime": 3.0,
            },
        },
        "baselines": {"test": {"always the commonest class": {"macro_f1": 0.0625}}},
        "training": {"epochs": 15},
        "groups": {"test": "| | clips |\n|---|---:|\n| sex: female | 3 |\n\nThe largest gap is by sex."},
        "files": {"training_curve.png": "Losses"},
        "limits": ["Actors, not talkers."],
    }


def test_card_metadata_is_what_the_hub_reads(facts: dict, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(render_card(facts, tmp_path / "README.md"))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "audio-classification",
    )
    assert data.base_model == ["openai/whisper-base"]
    assert data.model_name == "a-system"
    assert {"speech-emotion-recognition", "sailer"} <= set(data.tags)
    results = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    assert results == {
        ("validation", "f1"): 0.25,
        ("test", "f1"): 0.4124,
        ("test", "accuracy"): 0.5,
        ("test", "recall"): 0.375,
    }


def sections(text: str) -> dict[str, str]:
    parts = ("\n" + text).split("\n## ")
    return {part.split("\n", 1)[0]: part for part in parts[1:]}


def test_card_sections_hold_what_happened(facts: dict, tmp_path: Path) -> None:
    text = render_card(facts, tmp_path / "README.md").read_text()
    found = sections(text)
    assert list(found) == ["How to use", "Results", "By group", "Data", "Training", "Limits"]
    assert 'pipeline(model="me/a-system", trust_remote_code=True)' in found["How to use"]
    assert '"text":' in found["How to use"]
    for row in (
        "|  | this system | always the commonest class |",
        "| macro_f1 | 0.412 | 0.062 |",
        "| clips | 400 | - |",
        "| accuracy | - |",
        "| Angry | 0.125 | 0.000 |",
        "| Sad | 1.000 | - |",
    ):
        assert row in found["Results"].splitlines()
    assert not {"loss", "runtime", "Happy"} & set(found["Results"].replace("|", " ").split())
    assert "![Losses](training_curve.png)" in found["Results"]
    assert "| Angry | 1,200 | 1 |\n| No agreement | 2 | 0 |\n| Sad | 0 | 4 |\n| all | 1,202 | 5 |" in found["Data"]
    assert "- epochs: 15" in found["Training"]
    assert "```yaml\ncorpus: ravdess\nseed: 0\n```" in found["Training"]
    assert "torch 2." in found["Training"]
    assert "- Actors, not talkers." in found["Limits"]
    assert "{" not in text.replace('{"audio"', "")
    assert "\n\n\n" not in text


def test_card_of_a_speech_only_and_synthetic_system(facts: dict, tmp_path: Path) -> None:
    facts |= {"text_backbone": None, "synthetic": True}
    for name in ("baselines", "training", "files", "groups", "limits"):
        del facts[name]
    text = render_card(facts, tmp_path / "README.md").read_text()
    assert 'recognise("clip.wav")' in text
    assert '"text"' not in text
    assert "**synthetic speech**" in text
    assert "| macro_f1 | 0.412 |" in text


def test_a_backbone_that_is_a_folder_is_no_base_model(facts: dict, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    facts["audio_backbone"] = str(tmp_path)
    assert ModelCard.load(render_card(facts, tmp_path / "README.md")).data.base_model is None


@pytest.mark.parametrize("name", ["corpus", "heads", "metrics", "model_id"])
def test_card_without_a_fact_is_refused_by_name(name: str, facts: dict, tmp_path: Path) -> None:
    del facts[name]
    with pytest.raises(ValueError, match=f"The model card lacks a fact: .*'{name}'"):
        render_card(facts, tmp_path / "README.md")
    assert not any(tmp_path.iterdir())


def test_environment_facts_are_of_this_process() -> None:
    import torch

    facts = environment_facts()
    assert facts["versions"]["torch"] == torch.__version__
    assert "cores" in facts["hardware"]


def test_figures_by_group_say_what_they_are_for(facts: dict, tmp_path: Path) -> None:
    text = render_card(facts, tmp_path / "README.md").read_text()
    section = text[text.index("## By group") : text.index("## Data")]
    assert "### test" in section and "| sex: female | 3 |" in section and "The largest gap is by sex." in section
    assert "no decision about anyone is to be drawn from them" in section.replace("\n", " ")
    del facts["groups"]
    assert "By group" not in render_card(facts, tmp_path / "README.md").read_text()
