"""Where a system comes from: known corpora and backbones, cards of others, and the license that binds most."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sailer.data.corpora import about_corpus, corpus_names
from sailer.hub.origins import BACKBONES, LICENSES, Origin, most_restrictive, of_backbone, of_corpus, of_system

SPEECH, TEXT = "speech encoder", "text encoder"


def test_what_is_known_is_under_a_license_of_the_hub() -> None:
    known = [about for about in map(about_corpus, corpus_names()) if about is not None]
    assert {about.license for about in known} - {""} <= set(LICENSES)
    assert {backbone.license for backbone in BACKBONES} <= set(LICENSES)
    assert len(LICENSES) == len(set(LICENSES)) and LICENSES[-1] == "other"
    assert all(about.license_name and about.link for about in known if about.license == "other")
    assert all(language.isalpha() and len(language) == 2 for about in known for language in about.languages)


def test_every_corpus_with_a_loader_of_its_own_is_known() -> None:
    assert {name for name in corpus_names() if about_corpus(name) is None} <= {"hub", "manifest"}
    assert about_corpus("of-my-own") is None


@pytest.mark.parametrize(
    ("corpora", "backbones", "expected"),
    [
        (["ravdess"], ["openai/whisper-base"], {"license": "cc-by-nc-sa-4.0"}),
        (["synthetic"], ["openai/whisper-base", "FacebookAI/roberta-large"], {"license": "apache-2.0"}),
        (["synthetic"], ["microsoft/wavlm-large", "openai/whisper-large-v3"], {"license": "cc-by-sa-3.0"}),
        (["crema_d"], ["tiny-whisper"], {"license": "odbl"}),
        (["crema_d", "ravdess"], ["microsoft/wavlm-large"], {"license": "cc-by-nc-sa-4.0"}),
        (
            ["msp_podcast", "ravdess"],
            ["openai/whisper-large-v3"],
            {
                "license": "other",
                "license_name": "msp-podcast-agreement",
                "license_link": "https://ecs.utdallas.edu/research/researchlabs/msp-lab/MSP-Podcast.html",
            },
        ),
    ],
)
def test_the_license_that_binds_most_counts(corpora: list[str], backbones: list[str], expected: dict) -> None:
    origins = [*map(of_corpus, corpora), *(of_backbone(SPEECH, name) for name in backbones)]
    assert most_restrictive(origins) == most_restrictive(origins[::-1]) == expected


@pytest.mark.parametrize(
    "origin",
    [of_corpus("my_recordings"), of_corpus("emo_db"), Origin("system", "a-folder")],
    ids=lambda origin: origin.name,
)
def test_an_unknown_license_is_other_with_a_warning(origin: Origin, caplog) -> None:
    origins = [of_corpus("ravdess"), origin]
    assert most_restrictive(origins) == {"license": "other", "license_name": "unknown"}
    (warning,) = caplog.messages
    assert f"The license of the {origin.kind} {origin.name} is not known" in warning


@pytest.mark.parametrize(
    ("hub_id", "license_", "heard"),
    [
        ("openai/whisper-large-v3", "apache-2.0", "5 million hours"),
        ("openai/whisper-large-v3-turbo", "mit", "5 million hours"),
        ("openai/whisper-large-v2", "apache-2.0", "680,000 hours"),
        ("facebook/hubert-large-ll60k", "apache-2.0", "Libri-Light"),
        ("facebook/hubert-large-ls960-ft", "apache-2.0", "Libri-Light, and LibriSpeech with its transcripts"),
        ("facebook/wav2vec2-base-960h", "apache-2.0", "LibriSpeech"),
        ("facebook/wav2vec2-base-100k-voxpopuli", "cc-by-nc-4.0", "VoxPopuli"),
        ("facebook/wav2vec2-large-100k-voxpopuli", "cc-by-nc-4.0", "VoxPopuli"),
        ("microsoft/wavlm-base", "cc-by-sa-3.0", "LibriSpeech"),
        ("microsoft/wavlm-base-plus", "cc-by-sa-3.0", "Libri-Light, GigaSpeech and VoxPopuli"),
        # Fine-tuned on speakers' names: neither its license nor what it heard was looked up.
        ("microsoft/wavlm-base-plus-sv", "", ""),
    ],
)
def test_kin_of_a_backbone_are_not_taken_for_it(hub_id: str, license_: str, heard: str) -> None:
    found = of_backbone(SPEECH, hub_id)
    assert found.license == license_ and found.heard.startswith(heard) and bool(found.heard) == bool(heard)


def test_what_a_user_says_counts_where_nothing_is_known() -> None:
    assert most_restrictive([of_corpus("my_recordings", "cc-by-nc-4.0")]) == {"license": "cc-by-nc-4.0"}


def write_card(folder: Path, header: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Something\n")
    return folder


def test_a_copy_in_a_folder_is_known_by_the_id_that_it_is_said_to_have(tmp_path: Path, caplog) -> None:
    (tmp_path / "copy").mkdir()
    found = of_backbone(SPEECH, str(tmp_path / "copy"), "openai/whisper-base", "whisper")
    assert (found.license, found.hub_id) == ("apache-2.0", "openai/whisper-base")
    assert "680,000 hours" in found.heard
    unknown = of_backbone(SPEECH, str(tmp_path / "copy"))
    assert (unknown.license, unknown.hub_id, unknown.name, unknown.heard) == ("", "", "copy", "")
    assert not caplog.messages
    other = of_backbone(SPEECH, str(tmp_path / "copy"), "openai/whisper-base", "wavlm")
    assert (other.license, other.hub_id) == ("", "") and "is a model of type wavlm" in caplog.messages[0]


@pytest.mark.parametrize(
    ("header", "license_", "terms"),
    [
        ("license: mit", "mit", "mit"),
        ("license: llama3", "other", "llama3"),
        ("license: other\nlicense_name: house-rules\nlicense_link: https://x.y", "other", "house-rules"),
        ("license: other", "", "not known"),
        ("license: other\nlicense_name: unknown", "", "not known"),
        ("tags:\n- speech", "", "not known"),
    ],
)
def test_a_folder_s_own_card_says_its_license(header: str, license_: str, terms: str, tmp_path: Path) -> None:
    for found in (
        of_system(write_card(tmp_path / "system", header)),
        of_backbone(SPEECH, str(tmp_path / "system")),
    ):
        assert (found.license, found.terms, found.name) == (license_, terms, "system")
        assert "license" in most_restrictive([found])


def test_what_a_copy_was_made_from_says_what_it_has_heard(tmp_path: Path) -> None:
    folder = write_card(tmp_path / "a", "license: mit\nbase_model:\n- emotion2vec/emotion2vec_plus_base")
    found = of_backbone(SPEECH, str(folder))
    assert found.license == "mit" and {"ravdess", "msp_podcast"} <= set(found.corpora)
    plain = of_backbone(SPEECH, "emotion2vec/emotion2vec_base")
    assert "ravdess" not in plain.corpora and "iemocap" in plain.corpora


def test_a_card_that_cannot_be_read_says_nothing_and_is_named(tmp_path: Path, caplog) -> None:
    assert of_system(write_card(tmp_path / "a", "license: [")).license == ""
    assert str(tmp_path / "a" / "README.md") in caplog.messages[0]


def test_a_card_on_the_hub_is_read_there(hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.files["some/encoder"] = {"README.md": b"---\nlicense: cc-by-nc-4.0\n---\n"}
    found = of_backbone(SPEECH, "some/encoder")
    assert (found.license, found.hub_id, found.link) == (
        "cc-by-nc-4.0",
        "some/encoder",
        "https://huggingface.co/some/encoder",
    )
    assert of_system("some/gone").license == ""


def test_a_header_with_any_of_the_licenses_reads_back(tmp_path: Path) -> None:
    from huggingface_hub import ModelCardData

    for fields in map(most_restrictive, ([of_corpus("ravdess")], [of_corpus("msp_podcast")], [of_corpus("x")])):
        card = ModelCard(f"---\n{ModelCardData(**fields).to_yaml()}\n---\n")
        assert {name: card.data.get(name) for name in fields} == fields
