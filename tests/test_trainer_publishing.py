"""What `sailer push`, `--push_to_hub` and `trainer.push_to_hub()` publish is the same, on a Hub of this machine."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from sailer import SailerForAudioClassification, SailerProcessor, SailerTrainer
from sailer.cli import main
from sailer.hub.publishing import HANDLER, PushError
from sailer.settings import load_recipe, parse_overrides, resolve
from sailer.train import evaluate, fit, prepare, save

from .small_runs import run_options, write_corpus
from .test_trainer import rows, trainer  # noqa: F401


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def card_of(files: dict[str, bytes]) -> ModelCard:
    return ModelCard(files["README.md"].decode())


@pytest.mark.slow
def test_all_three_ways_publish_the_same(corpus: Path, hub, tmp_path: Path, capsys) -> None:
    extra = {"corpus_license": "cc-by-nc-4.0", "corpus_languages": "[de]", "hub_model_id": "me/it"}
    options = run_options(corpus, tmp_path / "out", push_to_hub="true", hub_private_repo="true", **extra)
    assert main(options) == 0
    assert f"Published: {hub.endpoint}/me/it" in capsys.readouterr().out
    assert hub.is_private("me/it")
    published = dict(hub.files["me/it"])
    system = {"config.json", "model.safetensors", "processor_config.json", "modeling_sailer.py", "pipeline_sailer.py"}
    assert system | {"README.md", "handler.py", "requirements.txt", "metrics.json"} <= set(published)
    assert published["handler.py"] == HANDLER.read_bytes()
    assert not [name for name in published if name.endswith((".bin", ".pt"))]

    assert main(["push", str(tmp_path / "out"), "me/again"]) == 0
    assert hub.files["me/again"] == published

    # In Python, step by step.
    settings = resolve(load_recipe("demo"), parse_overrides(options[2:]) | {"push_to_hub": False})
    job = prepare(settings)
    ours = fit(job)
    save(job, ours, evaluate(job, ours))
    ours.args.hub_model_id = "me/third"
    ours.push_to_hub(commit_message="Third")
    third = hub.files["me/third"]
    assert set(third) == set(published)
    same = set(published) - {"README.md", "card.json", "metrics.json", "training_log.json", "recipe.yaml"}
    assert {name for name in same if third[name] != published[name]} == set()  # times differ, and push_to_hub
    facts = [json.loads(files["card.json"]) for files in (published, third)]
    for found in facts:
        for name in ("settings", "training", "date"):
            del found[name]
    assert facts[0] == facts[1]

    card = card_of(published)
    assert (card.data.license, card.data.language) == ("cc-by-nc-4.0", ["de"])
    figures = json.loads(published["metrics.json"])
    found = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["test", "f1"] == pytest.approx(figures["test"]["macro_f1"], abs=5e-5)
    assert found["validation", "accuracy"] == pytest.approx(figures["validation"]["accuracy"], abs=5e-5)
    assert 'pipeline(model="me/it", trust_remote_code=True)' in card.text
    assert "Speakers in training: s0, s1, s2, s3." in card.text and "| test | test | 6 | 1 | 0 |" in card.text


@pytest.mark.slow
def test_an_unknown_corpus_says_other_with_a_warning(corpus: Path, tmp_path: Path, caplog) -> None:
    assert main(run_options(corpus, tmp_path / "out", num_train_epochs="1")) == 0
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (data.license, data.license_name, data.language) == ("other", "unknown", None)
    assert [message for message in caplog.messages if "license of the corpus manifest is not known" in message]


def test_who_may_not_write_hears_of_it_before_the_corpus_is_read(corpus: Path, hub, tmp_path: Path, capsys) -> None:
    hub.tokens = {"hf_of_somebody_else"}
    options = run_options(corpus.with_name("gone.csv"), tmp_path / "out", push_to_hub="true")
    assert main(options) == 2
    assert "hf auth login" in capsys.readouterr().err and hub.files == {}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (
            "corpus_license",
            "cc-by-nc-sa",
            "corpus_license is 'cc-by-nc-sa', which the Hub does not know (did you mean",
        ),
        ("corpus_languages", "[English]", "corpus_languages has 'English': name languages as en, de, cmn"),
        ("hub_strategy", "every_save", "checkpoints hold pickles"),
        ("hub_revision", "dev", "systems are pushed to the main branch"),
    ],
)
def test_facts_for_the_card_are_checked(option: str, value: str, message: str, corpus: Path, tmp_path, capsys) -> None:
    assert main(run_options(corpus, tmp_path / "out", **{option: value})) == 2
    assert message in capsys.readouterr().err


def test_a_known_corpus_keeps_its_license(tmp_path: Path, capsys) -> None:
    assert main(["train", "ravdess_whisper_base", "--data_dir", str(tmp_path), "--corpus_license", "mit"]) == 2
    assert "corpus_license is 'mit', but RAVDESS is under cc-by-nc-sa-4.0: leave it out" in capsys.readouterr().err


def test_a_trainer_in_a_script_publishes_the_same_card(hub, tmp_path, tiny_sailer, rows, caplog) -> None:  # noqa: F811
    ours = trainer(tmp_path / "mine", tiny_sailer, rows, eval_strategy="epoch", push_to_hub=True, hub_model_id="me/it")
    ours.train()
    (tmp_path / "mine" / "checkpoint-1").mkdir()
    (tmp_path / "mine" / "checkpoint-1" / "optimizer.pt").write_bytes(b"secret")
    ours.push_to_hub(commit_message="Mine", license="cc-by-4.0", dataset="talks", language="fr", tags="mine")
    files = hub.files["me/it"]
    assert {"config.json", "processor_config.json", "tokenizer.json", "handler.py", "modeling_sailer.py"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt"))]
    card = card_of(files)
    assert card.data.language == "fr" and card.data.datasets == ["talks"] and "mine" in card.data.tags
    # The backbone of a saved system is not known by its name: nothing is claimed of it.
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert any("license of the speech encoder whisper is not known" in message for message in caplog.messages)
    measured = [entry for entry in ours.state.log_history if "eval_macro_f1" in entry][-1]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["f1"] == pytest.approx(measured["eval_macro_f1"], abs=5e-5)
    assert "| train | training | 16 | 0 and 16 clips of unknown ones | 0 |" in card.text


def test_what_a_script_says_of_its_system_is_on_the_card(tmp_path, tiny_sailer, rows) -> None:  # noqa: F811
    plain = trainer(tmp_path / "mine", tiny_sailer, rows)
    said = {"corpus": "ravdess", "audio_backbone": "openai/whisper-base", "text_backbone": "FacebookAI/roberta-large"}
    ours = SailerTrainer(
        plain.model,
        plain.args,
        objective=plain.training_objective,
        train_dataset=plain.train_dataset,
        eval_dataset=plain.eval_dataset,
        data_collator=plain.data_collator,
        processing_class=plain.processor,
        card=said,
    )
    ours.create_model_card(model_name="Ours")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "cc-by-nc-sa-4.0" and card.data.language == ["en"]
    assert card.data.base_model == ["openai/whisper-base", "FacebookAI/roberta-large"]
    assert "# Ours\n" in card.text and not card.data.eval_results  # nothing was measured


def test_a_push_that_would_not_be_one_commit_to_main_is_refused(hub, tmp_path, tiny_sailer, rows) -> None:  # noqa: F811
    ours = trainer(tmp_path / "mine", tiny_sailer, rows)
    for options in ({"blocking": False}, {"revision": "dev"}):
        with pytest.raises(ValueError, match="leave out blocking and revision"):
            ours.push_to_hub(**options)
    assert hub.files == {}
    hub.failing = ["repos/create"]
    with pytest.raises(PushError, match="mine cannot be written to"):
        ours.push_to_hub()


def test_the_processor_and_the_model_come_back(hub, tmp_path, tiny_sailer, rows, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    trainer(tmp_path / "mine", tiny_sailer, rows, hub_model_id="me/it").push_to_hub()
    model = SailerForAudioClassification.from_pretrained("me/it")
    assert model.config.labels and SailerProcessor.from_pretrained("me/it").tokenizer is not None
