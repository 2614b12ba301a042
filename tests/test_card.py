import json
import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sailer.hub.card import (
    FACTS_FILE,
    NOTHING,
    SELECTION,
    TEST,
    TRAINING,
    environment_facts,
    render_card,
    render_ensemble_card,
    write_card,
)
from sailer.hub.origins import Origin, of_backbone, of_corpus

LABELS = ["Angry", "Happy", "Sad", "Other"]


def split(name: str, use: str, clips: int, speakers: list[str], shared: list[str] | None = None, unknown: int = 0):
    names = {"speakers": speakers, "shared": shared or []}
    return {"split": name, "use": use, "clips": clips, "unknown": unknown, **names}


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
        "origins": [asdict(of_corpus("ravdess")), asdict(of_backbone("speech encoder", "openai/whisper-base"))],
        "splits": [
            {
                "split": "train",
                "use": TRAINING,
                "clips": 1202,
                "speakers": ["a", "b"],
                "unknown": 3,
                "shared": ["a", "b"],
            },
            {"split": "validation", "use": SELECTION, "clips": 7, "speakers": ["c"], "unknown": 0, "shared": []},
            {"split": "test", "use": TEST, "clips": 5, "speakers": ["b", "d"], "unknown": 0, "shared": ["b"]},
            {"split": "test2", "use": NOTHING, "clips": 4, "speakers": ["e"], "unknown": 0, "shared": []},
        ],
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
        "cc-by-nc-sa-4.0",
        "transformers",
        "audio-classification",
    )
    assert data.base_model == ["openai/whisper-base"]
    assert data.model_name == "a-system"
    assert {"speech-emotion-recognition", "sailer"} <= set(data.tags)
    assert data.metrics == ["f1", "accuracy", "recall"]  # those that there are
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


def unfit_of(heard: str) -> list[str]:
    """What a system must not be judged on, of the section that says what it has heard."""
    lines = heard.split("Do not judge it on")[1].split("\n\n")[1].splitlines()
    return [line.removeprefix("- ") for line in lines]


def test_card_sections_hold_what_happened(facts: dict, tmp_path: Path) -> None:
    text = render_card(facts, tmp_path / "README.md").read_text()
    found = sections(text)
    assert list(found) == [
        *("How to use", "Results", "By group", "Data", "What it has heard", "Training", "License", "Limits")
    ]
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
    assert "![Losses](training_curve.png)" in found["By group"]
    assert "| Angry | 1,200 | 1 |\n| No agreement | 2 | 0 |\n| Sad | 0 | 4 |\n| all | 1,202 | 5 |" in found["Data"]
    assert "- epochs: 15" in found["Training"]
    assert "```yaml\ncorpus: ravdess\nseed: 0\n```" in found["Training"]
    assert "torch 2." in found["Training"]
    assert "- Actors, not talkers." in found["Limits"]
    assert "{" not in text.replace('{"audio"', "")
    assert "\n\n\n" not in text


def test_the_card_tells_of_a_discriminant(facts: dict, tmp_path: Path) -> None:
    text = "a linear discriminant of the mean speech state has a share of 0.25"
    assert text in render_card(facts | {"discriminant_share": 0.25}, tmp_path / "with.md").read_text()
    for without in ({}, {"discriminant_share": 0.0}):
        assert "discriminant" not in render_card(facts | without, tmp_path / "without.md").read_text()


def test_card_of_a_speech_only_and_synthetic_system(facts: dict, tmp_path: Path) -> None:
    facts |= {"text_backbone": None, "synthetic": True}
    for name in ("baselines", "training", "files", "groups", "limits"):
        del facts[name]
    text = render_card(facts, tmp_path / "README.md").read_text()
    assert 'recognise("clip.wav")' in text
    assert '"text"' not in text
    assert "**synthetic speech**" in text
    assert "| macro_f1 | 0.412 |" in text


def test_the_card_says_what_was_heard_and_what_must_not_be_judged(facts: dict, tmp_path: Path) -> None:
    facts["kin"] = "Its songs are of the same actors."
    facts["origins"].append(asdict(Origin("text encoder", "e2v", "mit", heard="RAVDESS", corpora=("ravdess", "meld"))))
    heard = sections(render_card(facts, tmp_path / "README.md").read_text())["What it has heard"]
    assert "| train | training | 1,202 | 2 and 3 clips of unknown ones | 2 |" in heard
    assert "| test | test | 5 | 2 | 1 |" in heard and "| test2 | nothing | 4 | 1 | 0 |" in heard
    assert "Speakers in training: a, b. `card.json` has those of every split." in heard
    unfit = unfit_of(heard)
    assert [line.split(":")[0] for line in unfit] == [
        "any recording of the speakers in training, in whatever split, release or corpus it stands;",
        "recordings from where those 3 clips of train come from whose speakers are not known;",
        "validation of ravdess",
        "test of ravdess",
        "what shares speakers or recordings with ravdess",
        "ravdess, meld",
    ]
    assert "1 of its speakers are in training" in unfit[3] and "of the same actors" in unfit[4]
    assert "so no figure above is of speech that is new to it" in unfit[5]
    assert "openai/whisper-base was itself trained on 680,000 hours" in heard


def test_an_ensemble_s_card_says_what_its_members_heard(facts: dict, tmp_path: Path) -> None:
    """The members' own cards do not come along: theirs is all that is left of what they were trained on."""
    for name in ("one", "two", "bare"):
        (tmp_path / name).mkdir()
    other = [split("train", TRAINING, 9, ["b", "z"]), split("development", SELECTION, 7, ["y"])]
    write_card(facts, tmp_path / "one")
    write_card(facts | {"corpus": "crema_d", "splits": other, "kin": "Its videos are of the same."}, tmp_path / "two")
    members = [{"name": name, "heads": ["primary"]} for name in ("one", "two", "bare")]
    config: Any = SimpleNamespace(combine="probabilities", heads=["primary"], labels=LABELS, members=members)
    sources = [tmp_path / name for name in ("one", "two", "bare")]
    card = render_ensemble_card(config, [1, 1, 2], sources, "all", tmp_path / "README.md").read_text()
    heard = sections(card)["What its members have heard"]
    assert "| one | ravdess | 1,202 | a, b |" in heard and "| two | crema_d | 9 | b, z |" in heard
    assert "| bare | not known | not known | not known |" in heard
    unfit = unfit_of(heard)
    assert [line.split(":")[0] for line in unfit] == [
        "any recording of the speakers in training, in whatever split, release or corpus it stands;",
        "recordings from where those 3 clips of train come from whose speakers are not known;",
        "validation of ravdess",
        "test of ravdess",
        "development of crema_d",
        "what shares speakers or recordings with crema_d",
        "what bare was trained on, which no card says here.",
    ]


def test_many_speakers_are_not_all_on_the_card(facts: dict, tmp_path: Path) -> None:
    facts["splits"][0]["speakers"] = [f"s{number:02d}" for number in range(45)]
    assert "s39 and 5 more." in render_card(facts, tmp_path / "README.md").read_text()
    facts["splits"][0]["speakers"] = []
    assert "Who speaks in training is not known." in render_card(facts, tmp_path / "README.md").read_text()


def test_every_license_is_listed_and_an_unknown_one_is_other(facts: dict, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    path = render_card(facts, tmp_path / "README.md")
    listed = sections(path.read_text())["License"]
    assert "- corpus RAVDESS: cc-by-nc-sa-4.0 (https://zenodo.org/records/1188976)" in listed
    assert "- speech encoder openai/whisper-base: apache-2.0 (https://huggingface.co/openai/whisper-base)" in listed
    assert "ask whose it is" not in listed
    facts["origins"][0] = asdict(of_corpus("mine"))
    path = render_card(facts, path)
    assert "- corpus mine: not known\n" in path.read_text() and "ask whose it is" in path.read_text()
    data = ModelCard.load(path).data
    assert (data.license, data.license_name) == ("other", "unknown")


def test_a_card_is_rendered_again_from_the_facts_beside_it(facts: dict, tmp_path: Path) -> None:
    written = write_card(facts, tmp_path).read_text()
    kept = json.loads((tmp_path / FACTS_FILE).read_text())
    assert kept["splits"][0]["speakers"] == ["a", "b"] and kept["versions"]["torch"]
    (tmp_path / "README.md").unlink()
    assert write_card(kept, tmp_path).read_text() == written


def test_the_figures_of_other_seeds_stand_beside(facts: dict, tmp_path: Path) -> None:
    figures = {"mean": 0.5, "deviation": 0.1, "interval": [0.25, 0.75], "values": [0.4, 0.6]}
    facts["seeds"] = {"own": 1, "seeds": [0, 1], "splits": {"test": {"macro_f1": figures}}, "method": "By t."}
    found = sections(render_card(facts, tmp_path / "README.md").read_text())["With other seeds"]
    assert "This system is that of seed 1; others were trained by the same recipe with the seeds 0." in found
    assert "| macro_f1 | 0.500 | 0.250 | 0.750 | 0.100 | 0.400 | 0.600 |" in found and "By t." in found


def test_a_backbone_that_is_a_folder_is_no_base_model(facts: dict, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    facts["origins"][1] = asdict(of_backbone("speech encoder", str(tmp_path)))
    assert ModelCard.load(render_card(facts, tmp_path / "README.md")).data.base_model is None


@pytest.mark.parametrize("name", ["corpus", "origins", "splits", "heads", "metrics", "model_id"])
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
