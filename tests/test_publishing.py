from pathlib import Path
from types import SimpleNamespace

import pytest

from sailer.hub.publishing import push

SYSTEM = ("config.json", "model.safetensors", "processor_config.json", "README.md", "modeling_sailer.py", "curve.png")


class Address(str):
    repo_id = "me/it"


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Calls of the Hub's client: no network, and none is wanted when the folder is refused."""
    noted: list[dict] = []
    client = SimpleNamespace(
        create_repo=lambda repo_id, **options: (
            noted.append({"create": repo_id} | options) or Address("https://hub/me/it")
        ),
        upload_folder=lambda **options: noted.append(options),
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: client)
    return noted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in SYSTEM:
        (tmp_path / name).write_text("x")
    return tmp_path


def test_push_makes_the_repository_and_uploads_the_system(folder: Path, uploads: list[dict]) -> None:
    assert push(folder, "it", private=True) == "https://hub/me/it"
    made, uploaded = uploads
    assert made == {"create": "it", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/it"
    assert sorted(uploaded["allow_patterns"]) == sorted(SYSTEM)


def test_training_state_and_features_stay_here(folder: Path, uploads: list[dict]) -> None:
    kept_back = ("training_args.bin", "checkpoints/checkpoint-3/optimizer.pt", "checkpoint-3/model.safetensors")
    for name in (*kept_back, "features/0.safetensors", "preview/a.wav", ".cache/x.json", "audio_tower/config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    push(folder, "it")
    assert sorted(uploads[1]["allow_patterns"]) == sorted([*SYSTEM, "audio_tower/config.json"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "best.pt", "inner/weights.pkl"])
def test_a_pickle_is_refused_by_name(name: str, folder: Path, uploads: list[dict]) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(ValueError, match=rf"{name}: not pushed.*safetensors"):
        push(folder, "it")
    assert uploads == []


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "README.md", "model.safetensors"])
def test_an_incomplete_system_is_refused(name: str, folder: Path, uploads: list[dict]) -> None:
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}"):
        push(folder, "it")
    assert uploads == []


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path: Path, uploads: list[dict]) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(ValueError, match="is not a folder with files"):
            push(folder, "it")
    assert uploads == []
