"""A saved system in, a model repository on the Hub out: weights as safetensors, code, card and figures; no pickles."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import pickletools
import shlex
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, RepoUrl

logger = logging.getLogger(__name__)

# What stays here: the Trainer's own state, which is for resuming and holds pickles, and what was derived from clips.
KEPT_BACK = (
    *("checkpoint-*", "checkpoints", "training_args.bin", "optimizer.*", "scheduler.pt", "scaler.pt"),
    *("rng_state*.pth", "features", "preview", "backbones", ".*", "__pycache__"),
)
# In a report that holds recordings (`sailer evaluate --embed_audio`): corpora are licensed.
AUDIO_IN_HTML = b'src="data:audio/'
# Names that pickles go by; a file of any other name is known by its bytes.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
# By which Inference Endpoints run a system.
HANDLER = Path(__file__).with_name("handler.py")
REQUIRED = ("config.json", "processor_config.json", "README.md")
SPACE_FILES = ("app.py", "README.md", "requirements.txt")
# How much of a file, unpacked, is looked at for a pickle's beginning.
LOOKED_AT = 2**16
UNPACKERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


class PushError(ValueError):
    """What could not be published; the message says why, and with which command to try again."""


def push(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a saved system to the Hub in one commit, as the user that `hf auth login` or HF_TOKEN names.

    Args:
        folder: what `sailer train` or `sailer convert` wrote; nothing in it is changed.
        repo_id: "user/name"; made if it is not there yet.
        private: whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        PushError: the folder is not a complete system or holds a pickle (the message names the files), the repository
            is public where a private one was wanted, nobody is logged in, or the Hub failed; nothing is published.
    """
    return str(publish(folder, repo_id, private).repo_url)


def publish(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a SAILER system",
) -> CommitInfo:
    """`push`, as the user of a token and with a commit message, if they are given.

    On the Hub a classifier gets the `handler.py` by which Inference Endpoints run it, unless the folder has one.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    files = check_system(folder)
    again = shlex.join(["sailer", "push", str(folder), repo_id, *["--private"] * private])
    with _told(f"Nothing of {folder} was published to {repo_id}", again):
        address = make_repository(repo_id, private, token)
        # File by file: upload_folder takes names for patterns, and one file named * would bring all that stays here.
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        if _wants_handler(folder):
            operations.append(CommitOperationAdd(HANDLER.name, HANDLER))
        return HfApi(token=token).create_commit(address.repo_id, operations, commit_message=message)


def push_space(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload what `sailer space` wrote, in one commit; the Space's address. See `push`.

    Raises:
        PushError: the folder is not such a Space or holds a pickle, a Space of that name is public where a private one
            was wanted, nobody is logged in, or the Hub failed; nothing is published.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder, api = Path(folder), HfApi()
    files = _without_pickles(folder, "`sailer space`")
    names = {path.name for path in files if path.parent == folder}
    if missing := [name for name in SPACE_FILES if name not in names]:
        raise PushError(f"{folder} lacks {', '.join(missing)}: it is not a Space; `sailer space` writes one.")
    again = shlex.join(["sailer", "push", str(folder), "--space", repo_id, *["--private"] * private])
    with _told(f"Nothing of {folder} was published to {repo_id}", again):
        address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="space", space_sdk="gradio")
        if private and api.space_info(address.repo_id).private is False:
            raise PushError(f"{address} is public already and would stay so: make it private there, or name another.")
        operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
        message = "Upload the page of a SAILER system"
        api.create_commit(address.repo_id, operations, commit_message=message, repo_type="space")
    return str(address)


def _wants_handler(folder: Path) -> bool:
    """Whether it holds a classifier without a handler of its own."""
    try:
        code = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    except (OSError, ValueError, AttributeError) as error:
        raise PushError(f"{folder / 'config.json'} cannot be read ({error}): it is not a complete system.") from error
    return "AutoModelForAudioClassification" in code and not (folder / HANDLER.name).exists()


def make_repository(repo_id: str, private: bool = False, token: str | None = None) -> RepoUrl:
    """Make a repository, if it is not there yet.

    Raises:
        PushError: it is public where a private one is wanted, or cannot be written to.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _told(f"{repo_id} cannot be written to"):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and api.model_info(address.repo_id).private is False:
            raise PushError(f"{address} is public already and would stay so: make it private there, or name another.")
        return address


@contextmanager
def _told(what: str, again: str | None = None) -> Iterator[None]:
    """Failures of the Hub as a PushError that says what came of it, why, and with which command to try again."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except PushError as error:
        raise PushError(f"{what}: {error}" + (f" Then try again: {again}" if again else "")) from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            reason = "the Hub does not know you as someone who may write there: run `hf auth login`, or set HF_TOKEN"
        else:
            reason = " ".join(str(error).split())
        raise PushError(f"{what}: {reason}." + (f" Then try again: {again}" if again else "")) from error


def check_system(folder: Path) -> list[Path]:
    """The files of a saved system that are published, all but those that stay here, which the log names.

    Raises:
        PushError: it is not a complete system, or holds a pickle; the message names the files.
    """
    files = _without_pickles(folder, "`sailer train` or `sailer convert`")
    if path := _local_backbone(folder):
        raise PushError(
            f"{folder} holds adapters of {path}, which nobody else has: push the whole system (sailer merge {folder} "
            "WHOLE), or train on a backbone of the Hub."
        )
    with_audio = [str(path) for path in files if path.suffix == ".html" and AUDIO_IN_HTML in path.read_bytes()]
    if with_audio:
        raise PushError(
            f"{', '.join(with_audio)}: not pushed, because it holds recordings of a corpus. Remove it, or evaluate "
            "again without --embed_audio."
        )
    names = {path.name for path in files if path.parent == folder}
    missing = [name for name in REQUIRED if name not in names]
    if not any(name.endswith(".safetensors") for name in names):
        missing.append("model.safetensors")
    if missing:
        raise PushError(f"{folder} lacks {', '.join(missing)}: it is not a complete system.")
    return files


def _without_pickles(folder: Path, maker: str) -> list[Path]:
    """The files below a folder, but for those that stay here."""
    files = list(_files(folder))
    if not files:
        raise PushError(f"{folder} is not a folder with files: name what {maker} wrote.")
    pickles = [str(path) for path in files if is_pickle(path)]
    if pickles:
        raise PushError(
            f"{', '.join(pickles)}: not pushed, because loading a pickle can run any code. Save as safetensors "
            "(model.save_pretrained does) and remove these files."
        )
    return files


def is_pickle(path: Path) -> bool:
    """Whether a file is, or packs (zip, tar, gzip, bzip2, xz, zlib), a pickle: by its name's suffixes or its bytes."""
    if any(suffix.lower() in PICKLES for suffix in path.suffixes):
        return True
    with path.open("rb") as file:
        return _holds_pickle(file.read(LOOKED_AT), path)


def _holds_pickle(head: bytes, path: Path) -> bool:
    """Whether a file that begins with `head` is a pickle or packs one."""
    if _is_pickled(head):
        return True
    try:
        if zipfile.is_zipfile(path):  # torch.save's files are zips
            with zipfile.ZipFile(path) as packed:
                return any(_is_pickled(packed.open(name).read(LOOKED_AT)) for name in packed.namelist())
        for magic, unpack in UNPACKERS.items():
            if head.startswith(magic):
                with unpack(path) as file:
                    head = file.read(LOOKED_AT)
        if tarfile.is_tarfile(path):
            with tarfile.open(path) as packed:
                members = (packed.extractfile(member) for member in packed if member.isfile())
                return any(_is_pickled(member.read(LOOKED_AT)) for member in members if member is not None)
        if head[:1] == b"\x78":  # joblib's default compression
            head = zlib.decompressobj().decompress(head, LOOKED_AT)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, tarfile.TarError):
        return False  # damaged, so that no unpickler reads it either
    return _is_pickled(head)


def _is_pickled(head: bytes) -> bool:
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 2:
        return True
    # Protocols 0 and 1 have no mark: a pickle is what disassembles, its stack in order, up to its end.
    content, operations = BytesIO(head), StringIO()
    try:
        pickletools.dis(content, out=operations)
    except (ValueError, IndexError, OverflowError):
        # Of a longer file it must be what was not read that is missed.
        return len(head) == LOOKED_AT == content.tell() and operations.getvalue().count("\n") > 10
    return not content.read().strip() and len(head) > 2


def _local_backbone(folder: Path) -> str | None:
    """Path of an encoder on this machine that a system's adapters are of, if they are."""
    try:
        backbones = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("backbones") or {}
    except (OSError, ValueError):
        return None  # what is missing is told where that is looked at
    return next((entry["source"] for entry in backbones.values() if os.path.isabs(entry["source"])), None)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if any(fnmatch(path.name, pattern) for pattern in KEPT_BACK):
            logger.info("%s is not uploaded.", path)
        elif path.is_dir() and _local_backbone(path):
            logger.info("%s is not uploaded: its adapters are of an encoder on this machine.", path)
        elif path.is_dir():
            yield from _files(path)
        else:
            yield path
