import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sailer.data.atomic import adding_to_folder, replacing, replacing_folder


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    path.write_text("before")
    with pytest.raises(RuntimeError), replacing(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["card.md"]


def test_a_file_gets_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "ours") as beside:
        save_file({"a": torch.zeros(1)}, beside)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_takes_the_others_place_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for content in ("first", "second"):
        with replacing_folder(folder) as beside:
            (beside / content).write_text(content)
        assert [path.name for path in folder.iterdir()] == [content]
        assert os.listdir(tmp_path / "new") == ["folder"]
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "before").touch()
    for writer in (replacing_folder, adding_to_folder):
        with pytest.raises(RuntimeError), writer(folder) as beside:
            (beside / "half").touch()
            raise RuntimeError
        assert os.listdir(tmp_path) == ["folder"]
        assert os.listdir(folder) == ["before"]


def test_added_files_replace_their_names_and_leave_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for name in ("kept", "replaced", "below/kept"):
        (folder / name).write_text("old")
    with adding_to_folder(folder) as beside:
        (beside / "below").mkdir()
        for name in ("replaced", "below/added"):
            (beside / name).write_text("new")
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"kept": "old", "replaced": "new", "below/kept": "old", "below/added": "new"}
    assert os.listdir(tmp_path) == ["folder"]
