"""Corpora by name: `load_corpus(name, path, **options)` reads one into canonical rows (see `sailer.data.schema`).

A loader is a function `load(path, *, label_set, audio, strict, report, **options)`, which returns split -> columns for
`build_dataset`, or rows that are canonical already; `@corpus("name")` registers it. Those in the modules of this
package are always there; another one is known once its module has been imported. To every loader

- path is the corpus's folder, unless it says otherwise;
- label_set has the primary emotions that are wanted;
- audio is False where the labels alone are;
- strict has it raise on a row or recording that cannot be used, where it would else leave it out and count it;
- report counts what is left out, and takes notes.

The other parameters are its own options. Options of several loaders are a dataclass that each names as its
`shared_options` and takes by keyword.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sailer.data.schema import CorpusError, CorpusReport, LabelSet, build_dataset

if TYPE_CHECKING:
    from datasets import DatasetDict

# What every loader is given.
COMMON_ARGUMENTS = ("path", "label_set", "audio", "strict", "report")

Load = TypeVar("Load", bound=Callable[..., Any])


@dataclass(frozen=True)
class About:
    """What a model card has to say of a corpus.

    Args:
        title: its name as people write it.
        license: identifier of https://huggingface.co/docs/hub/repositories-licenses; "other" for terms of its own; ""
            where its page states none.
        link: where it, or its license, is to be had.
        languages: ISO 639-1 codes of what is spoken.
        license_name: what terms of its own ("other") are called.
        kin: what beside its own splits shares speakers or recordings with it, a sentence.
    """

    title: str
    license: str
    link: str
    languages: tuple[str, ...]
    license_name: str = ""
    kin: str = ""


@dataclass(frozen=True)
class Corpus:
    """A registered loader; see `corpus`."""

    load: Callable[..., Any]
    reads_folder: bool
    shared_options: type | None
    about: About | None = None


_REGISTERED: dict[str, Corpus] = {}


def corpus(
    name: str, *, reads_folder: bool = True, shared_options: type | None = None, about: About | None = None
) -> Callable[[Load], Load]:
    """Register the decorated function as the loader of a corpus.

    Args:
        name: what `load_corpus` and `--corpus` call it.
        reads_folder: whether its path is a folder, which is then checked to be there; False for a loader that reads a
            file, an id or nothing.
        shared_options: a dataclass of options that it takes by keyword beside its own.
        about: for the model cards of systems that are trained on it; None for a loader of any corpus.

    Raises:
        ValueError: another function has the name.
    """

    def register(load: Load) -> Load:
        known = _REGISTERED.get(name)
        if known is not None and (known.load.__module__, known.load.__qualname__) != (
            load.__module__,
            load.__qualname__,
        ):
            raise ValueError(f"Corpus {name!r} is {known.load.__module__} already: choose another name.")
        _REGISTERED[name] = Corpus(load, reads_folder, shared_options, about)
        return load

    return register


def load_corpus(
    name: str,
    path: str | Path | None = None,
    *,
    label_set: LabelSet | None = None,
    audio: bool = True,
    strict: bool = True,
    report: CorpusReport | None = None,
    **options: Any,
) -> DatasetDict:
    """Load a corpus in the canonical row.

    Args:
        name: a corpus of `corpus_names()`.
        path: its folder (or file, or dataset id, where the loader says so); None for a corpus that is generated.
        label_set: the primary emotions; by default the paper's nine.
        audio: False loads the labels alone, of a corpus whose recordings are not there or not wanted.
        strict: raise on the first malformed file or row; False leaves it out and counts it in the report.
        report: filled with what was left out and noticed; it is logged either way.
        **options: the loader's own options, see `corpus_options(name)`.

    Returns:
        `datasets.DatasetDict` with the splits that have clips (train, validation, test or test1, test2, ...).

    Raises:
        CorpusError: an unknown corpus or option (the message names the nearest one), a missing or empty folder, or
            whatever the loader refuses; the message names it and says what to do.
    """
    from datasets import Dataset, DatasetDict

    loader = _loader(name)
    known = corpus_options(name)
    for option in options:
        if option not in known:
            raise CorpusError(
                f"Corpus {name!r} has no option {option!r}{nearest(option, known)}; its options are {sorted(known)}."
            )
    label_set = label_set or LabelSet()
    report = CorpusReport() if report is None else report
    path = _checked_path(name, path, loader)
    splits = loader.load(path, label_set=label_set, audio=audio, strict=strict, report=report, **options)
    report.log(name)
    datasets = {
        split: columns if isinstance(columns, Dataset) else build_dataset(columns, label_set)
        for split, columns in splits.items()
        if len(columns["id"])
    }
    if not datasets:
        raise CorpusError(
            f"Corpus {name!r} at {path} gave no clips. " + " ".join([*report.lines(), "Check its path and options."])
        )
    return DatasetDict(datasets)


def corpus_names() -> list[str]:
    """Names that `load_corpus` takes: of the loaders of this package, and of others that were imported."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    return sorted(_REGISTERED)


def corpus_options(name: str) -> dict[str, Any]:
    """The options of one corpus and their defaults (`inspect.Parameter.empty` where one must be given)."""
    loader = _loader(name)
    parameters = inspect.signature(loader.load).parameters.values()
    own = [(option.name, option.default) for option in parameters if option.kind is not option.VAR_KEYWORD]
    shared = dataclasses.fields(loader.shared_options) if loader.shared_options else ()
    options = [*((option.name, option.default) for option in shared), *own]
    return {option: default for option, default in options if option not in COMMON_ARGUMENTS}


def about_corpus(name: str) -> About | None:
    """What is known of a corpus; None of one that is not registered, or whose loader reads any corpus."""
    return _REGISTERED[name].about if name in corpus_names() else None


def label_indices(emotions: Iterable[str], label_set: LabelSet, report: CorpusReport) -> dict[str, int | None]:
    """The class of each of a corpus's emotions: its own name, or else "Other", or else None.

    Emotions that count as "Other" are noted in the report; what a None means is for the loader to decide.
    """
    fallback = label_set.labels.index("Other") if "Other" in label_set.labels else None
    known = {emotion: emotion in label_set.labels for emotion in emotions}
    as_other = [emotion for emotion in known if not known[emotion]]
    if as_other and fallback is not None:
        report.note(f"{', '.join(as_other)}: not in the label set {list(label_set.labels)}, counted as Other.")
    return {emotion: label_set.index(emotion) if own else fallback for emotion, own in known.items()}


def nearest(word: str, known: Iterable[str]) -> str:
    """The words that point from a misspelt `word` to the nearest of `known`; empty if none is near."""
    match = get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _loader(name: str) -> Corpus:
    names = corpus_names()
    if name not in names:
        raise CorpusError(f"Unknown corpus {name!r}{nearest(name, names)}; the corpora are {names}.")
    return _REGISTERED[name]


def _checked_path(name: str, path: str | Path | None, loader: Corpus) -> Path | None:
    """`path` as a Path, of a folder that is there where the loader reads one."""
    if not loader.reads_folder:
        return Path(path) if path else None
    if not path:
        raise CorpusError(f"Corpus {name!r} is read from a folder: give its path.")
    path = Path(path).expanduser()
    if not path.is_dir():
        kind = "is a file, not a folder" if path.exists() else "does not exist"
        raise CorpusError(f"The folder {path} of corpus {name!r} {kind}. Check the path, or fetch the corpus first.")
    if next(path.iterdir(), None) is None:
        raise CorpusError(f"The folder {path} of corpus {name!r} is empty. Fetch the corpus into it first.")
    return path
