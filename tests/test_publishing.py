"""A saved system is pushed to a Hub on this machine, and only what belongs there."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import pytest
import torch

from sailer import SailerForAudioClassification, SailerProcessor
from sailer.cli import main
from sailer.hub.publishing import HANDLER, LOOKED_AT, PushError, is_pickle, push

SYSTEM = {
    "config.json": b'{"model_type": "sailer", "auto_map": {"AutoModel": "modeling_sailer.SailerModel"}}',
    "model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    "processor_config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\nA system.\n",
    "modeling_sailer.py": b"",
    "curve.png": b"\x89PNG\r\n\x1a\n\x00",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "system"
    add(folder, SYSTEM)
    return folder


def add(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_push_makes_the_model_and_uploads_the_system(folder: Path, hub) -> None:
    assert push(folder, "it", private=True) == f"{hub.endpoint}/me/it"
    assert hub.files == {"me/it": SYSTEM}
    assert hub.is_private("me/it")
    assert list(hub.large.values()) == [SYSTEM["model.safetensors"]]


def test_a_second_push_to_the_same_model_replaces_what_changed(folder: Path, hub) -> None:
    push(folder, "group/it")
    add(folder, {"README.md": b"Better.\n", "audio_tower/config.json": b"{}"})
    assert push(folder, "group/it") == f"{hub.endpoint}/group/it"
    assert hub.files == {"group/it": {**SYSTEM, "README.md": b"Better.\n", "audio_tower/config.json": b"{}"}}
    assert not hub.is_private("group/it")


def test_training_state_features_and_hidden_files_stay_here(folder: Path, hub) -> None:
    kept_back = ("training_args.bin", "checkpoints/checkpoint-3/optimizer.pt", "checkpoint-3/model.safetensors")
    kept_back += ("optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "__pycache__/train.pyc")
    kept_back += ("features/0.safetensors", "preview/a.wav", ".cache/x.json", ".env", "audio_tower/.env")
    add(folder, dict.fromkeys(kept_back, b"secret"))
    add(folder, {"audio_tower/config.json": b"{}"})
    push(folder, "it")
    assert hub.files == {"me/it": {**SYSTEM, "audio_tower/config.json": b"{}"}}


@pytest.mark.parametrize("name", ["*", "?env", "[.]env", "**", "[!a]env", "features*", "*/*", "x\\.env", "a b#%é"])
def test_a_files_name_is_a_name_and_no_pattern(name: str, folder: Path, hub) -> None:
    add(folder, dict.fromkeys((".env", "features/0.safetensors", "x/.env"), b"secret") | {name: b"curious"})
    push(folder, "it")
    assert hub.files == {"me/it": {**SYSTEM, name: b"curious"}}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "best.pt", "inner/weights.pkl"])
def test_a_pickle_is_refused_by_name(name: str, folder: Path, hub) -> None:
    add(folder, {name: b"x"})
    with pytest.raises(ValueError, match=rf"{name}: not pushed.*safetensors"):
        push(folder, "it")
    assert hub.files == {}


def torch_file(zipped: bool) -> bytes:
    content = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, content, _use_new_zipfile_serialization=zipped)
    return content.getvalue()


def packed(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        member = tarfile.TarInfo("weights")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


PICKLED = {f"protocol {number}": pickle.dumps({"a": [1, (2, "x")]}, protocol=number) for number in range(6)}
PICKLED |= {"long": pickle.dumps([(f"word {number}", number) for number in range(10_000)], protocol=0)}
PICKLED |= {"zipped": torch_file(True), "older torch": torch_file(False), "gzip": gzip.compress(PICKLED["protocol 0"])}
PICKLED |= {"tar": packed(PICKLED["protocol 4"]), "shell": b"cos\nsystem\n(S'echo hello'\ntR."}
HARMLESS = {
    "requirements": b"torch>=2.6\ntransformers>=5.17\n",
    "one dot": b".",
    "empty": b"",
    "prose": b"- A long list of one thing after the other.\n" * LOOKED_AT,
    "one long line": b"I" * 2 * LOOKED_AT,
    "damaged gzip": b"\x1f\x8bno more",
    "compressed prose": gzip.compress(b"a sentence"),
    "text like zlib": b"x = 3\n",
}


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_known_by_its_bytes(name: str, folder: Path, hub) -> None:
    assert name != "long" or len(PICKLED[name]) > LOOKED_AT
    add(folder, {"notes.txt": PICKLED[name]})
    with pytest.raises(PushError, match=r"notes\.txt: not pushed"):
        push(folder, "it")
    assert hub.files == {}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_no_pickle_is_let_through(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(HARMLESS[name])
    assert not is_pickle(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["WEIGHTS.PT", "a.pkl.gz", "model.pth.tar", "state.dill", "b.joblib.xz"])
def test_a_pickle_is_known_by_its_name(name: str, folder: Path, hub) -> None:
    add(folder, {name: b"anything"})
    with pytest.raises(PushError, match=r"not pushed"):
        push(folder, "it")


def test_a_classifier_gets_what_endpoints_run_it_by(folder: Path, hub) -> None:
    config = b'{"auto_map": {"AutoModelForAudioClassification": "modeling_sailer.SailerForAudioClassification"}}'
    before = contents(folder)
    add(folder, {"config.json": config})
    push(folder, "it")
    assert hub.files["me/it"] == SYSTEM | {"config.json": config, "handler.py": HANDLER.read_bytes()}
    assert contents(folder) == before | {"config.json": config}  # nothing in it is changed
    add(folder, {"handler.py": b"of my own"})
    push(folder, "it")
    assert hub.files["me/it"]["handler.py"] == b"of my own"


def test_a_configuration_that_is_no_json_is_refused(folder: Path, hub) -> None:
    add(folder, {"config.json": b"{"})
    with pytest.raises(PushError, match=r"config\.json cannot be read"):
        push(folder, "it")
    assert hub.files.get("me/it", {}) == {}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["repos/create", "preupload", "lfs/objects/batch", "/large/", "/commit/"])
def test_a_hub_that_fails_half_way_publishes_nothing(stage: str, folder: Path, hub, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    before = contents(folder)
    hub.failing = [stage]
    with pytest.raises(PushError, match=r"Nothing of .*published to me/it.*try again: sailer push .*system me/it"):
        push(folder, "me/it")
    assert hub.files.get("me/it", {}) == {} and contents(folder) == before
    hub.failing = []
    push(folder, "me/it")
    assert hub.files == {"me/it": SYSTEM}


def test_who_may_not_write_is_told_how_to(folder: Path, hub, monkeypatch, capsys) -> None:
    hub.tokens = {"hf_of_somebody_else"}
    assert main(["push", str(folder), "me/it", "--private"]) == 2
    told = capsys.readouterr().err
    assert "hf auth login" in told and f"sailer push {folder} me/it --private" in told
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    with pytest.raises(PushError, match="hf auth login"):
        push(folder, "me/it")
    assert hub.files == {}


def test_a_public_model_does_not_take_what_is_private(folder: Path, hub) -> None:
    push(folder, "it")
    add(folder, {"README.md": b"Secret.\n"})
    with pytest.raises(PushError, match="public already"):
        push(folder, "it", private=True)
    assert hub.files == {"me/it": SYSTEM}
    push(folder, "hidden", private=True)
    push(folder, "hidden", private=True)
    assert hub.files["me/hidden"]["README.md"] == b"Secret.\n"


def test_saving_and_pushing_at_once_leaves_nothing_out(tiny_sailer: Path, tmp_path: Path, hub) -> None:
    model, processor = (
        SailerForAudioClassification.from_pretrained(tiny_sailer),
        SailerProcessor.from_pretrained(tiny_sailer),
    )
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / ".env").write_text("secret")
    processor.save_pretrained(tmp_path / "it", push_to_hub=True)
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(hub.files["me/it"])
    model.save_pretrained(str(tmp_path / "it"), push_to_hub=True, repo_id="me/it", commit_message="Model")
    files = contents(tmp_path / "it")
    pushed = hub.files["me/it"]
    assert set(files) - {".env"} == set(pushed) - {"README.md"}
    assert all(pushed[name] == content for name, content in files.items() if name != ".env")


@pytest.mark.slow
def test_a_pipeline_pushes_the_tokenizer_too(tiny_sailer: Path, tmp_path: Path, hub) -> None:
    from transformers import pipeline

    classifier = pipeline(model=str(tiny_sailer), trust_remote_code=True)
    classifier.save_pretrained(tmp_path / "it", push_to_hub=True)
    assert set(contents(tmp_path / "it")) == set(hub.files["me/it"]) - {"README.md"}
    classifier.push_to_hub("again")
    assert {"tokenizer.json", "model.safetensors", "pipeline_sailer.py"} <= set(hub.files["me/again"])


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "README.md", "model.safetensors"])
def test_an_incomplete_system_is_refused(name: str, folder: Path, hub) -> None:
    (folder / name).unlink()
    add(folder, {f"inner/{name}": b"x"})
    with pytest.raises(ValueError, match=f"lacks {name}"):
        push(folder, "it")
    assert hub.files == {}


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path: Path, hub) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(ValueError, match="is not a folder with files"):
            push(folder, "it")
    assert hub.files == {}
