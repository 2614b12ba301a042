"""A saved system is pushed to a Hub on this machine, and only what belongs there."""

from pathlib import Path

import pytest

from sailer.hub.publishing import push

SYSTEM = {
    "config.json": b'{"model_type": "sailer"}',
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
    assert hub.created["me/it"]["visibility"] == "private"
    assert list(hub.large.values()) == [SYSTEM["model.safetensors"]]


def test_a_second_push_to_the_same_model_replaces_what_changed(folder: Path, hub) -> None:
    push(folder, "group/it")
    add(folder, {"README.md": b"Better.\n", "audio_tower/config.json": b"{}"})
    assert push(folder, "group/it") == f"{hub.endpoint}/group/it"
    assert hub.files == {"group/it": {**SYSTEM, "README.md": b"Better.\n", "audio_tower/config.json": b"{}"}}
    assert hub.created["group/it"].get("visibility") != "private"


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
