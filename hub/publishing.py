"""A saved system in, a model repository on the Hub out: weights as safetensors, code, card and figures; no pickles."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

logger = logging.getLogger(__name__)

# What stays here: the Trainer's own state, which is for resuming and holds pickles, and what was derived from clips.
KEPT_BACK = (
    *(
        "checkpoint-*",
        "checkpoints",
        "training_args.bin",
        "optimizer.*",
        "scheduler.pt",
        "scaler.pt",
        "rng_state*.pth",
    ),
    *("features", "preview", ".*", "__pycache__"),
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
REQUIRED = ("config.json", "processor_config.json", "README.md")


def push(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a saved system to the Hub, as the user that `hf auth login` or HF_TOKEN names.

    Args:
        folder: what `sailer train` or `sailer convert` wrote.
        repo_id: "user/name"; made if it is not there yet.
        private: whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        ValueError: the folder is not a complete system, or holds a pickle; the message names the files.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    files = list(_files(folder))
    _check(folder, files)
    api = HfApi()
    address = api.create_repo(repo_id, private=private, exist_ok=True)
    # File by file: upload_folder takes names for patterns, and one file named * would bring all that stays here.
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    api.create_commit(address.repo_id, operations, commit_message="Upload a SAILER system")
    return str(address)


def _files(folder: Path) -> Iterator[Path]:
    """What is uploaded: every file but those that stay here, which the log names."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if any(fnmatch(path.name, pattern) for pattern in KEPT_BACK):
            logger.info("%s is not uploaded.", path)
        elif path.is_dir():
            yield from _files(path)
        else:
            yield path


def _check(folder: Path, files: list[Path]) -> None:
    if not files:
        raise ValueError(f"{folder} is not a folder with files: name what `sailer train` or `sailer convert` wrote.")
    pickles = [str(path) for path in files if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{', '.join(pickles)}: not pushed, because loading a pickle can run any code. Save as safetensors "
            "(model.save_pretrained does) and remove these files."
        )
    names = {path.name for path in files if path.parent == folder}
    missing = [name for name in REQUIRED if name not in names]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("model.safetensors")
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: it is not a complete system.")
