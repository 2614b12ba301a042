"""The `sailer` command: each subcommand reads its options here and leaves the work to the module that does it."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sailer.settings import DataSettings, SettingsError, bundled_recipes, option_help, parse_overrides

DEFAULT_RECIPE = "recipes/demo.yaml"
EXPECTED_ERRORS = (ValueError, OSError, ImportError)
# Commands whose options are not known here: those of a recipe, and those of a corpus.
OPEN_COMMANDS = ("train", "data")
LABEL_OPTIONS = ("labels", "majority_labels", "scored_labels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; by default that of this process.

    Returns:
        Exit status: 0, 2 for a wrong input (told on stderr, with a traceback only if SAILER_DEBUG=1), 130 for an
        interruption, or what the command returns.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("sailer").setLevel(logging.INFO)
    words, options = _split(list(sys.argv[1:] if arguments is None else arguments))
    command = _parser().parse_args(words)
    command.options = options
    try:
        result = command.run(command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except EXPECTED_ERRORS as error:
        if os.environ.get("SAILER_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    if isinstance(result, str | Path):
        print(f"Result: {result}")
    return result if isinstance(result, int) else 0


def train(command: argparse.Namespace) -> None:
    """Train, evaluate and save a system."""
    _from("train", "run")(command.recipe, parse_overrides(command.options))


def evaluate(command: argparse.Namespace) -> Path | None:
    """Evaluate one system, or the mean of several, on a split of a corpus; or each on several corpora."""
    options = _mapping("corpus_options", command.corpus_options)
    if command.corpora is not None:
        for name in ("data_dir", "submission", "file_list", "embed_audio"):
            if getattr(command, name):
                raise SettingsError(f"--{name} is of one corpus, and --corpora names several: leave it out.")
        return _from("training.cross_corpus", "evaluate_across")(
            command.models,
            command.corpora,
            command.output_dir,
            command.split,
            corpus_options=options,
            batch_size=command.batch_size,
            bootstrap=command.bootstrap,
        )
    return _from("training.evaluation", "evaluate_models")(
        command.models,
        command.corpus,
        command.data_dir,
        command.split,
        command.output_dir,
        corpus_options=options,
        batch_size=command.batch_size,
        bootstrap=command.bootstrap,
        embed_audio=command.embed_audio,
        submission=command.submission,
        file_list=command.file_list,
    )


def calibrate(command: argparse.Namespace) -> Path:
    """Fit a system's temperature and prediction sets anew; on clips that it was not trained on."""
    return _from("training.evaluation", "recalibrate")(
        command.model,
        command.corpus,
        command.data_dir,
        command.split,
        corpus_options=_mapping("corpus_options", command.corpus_options),
        batch_size=command.batch_size,
    )


def ensemble(command: argparse.Namespace) -> Path:
    """Make one system of several."""
    weights: str | list[float] | None = command.weights
    if command.weights not in (None, "fit"):
        try:
            weights = [float(weight) for weight in command.weights.split(",")]
        except ValueError as error:
            raise SettingsError(f"--weights is {weights!r}; give a number for each member, 2,1,1, or fit.") from error
    return _from("training.ensembling", "build_ensemble")(
        command.models,
        command.folder,
        combine=command.combine,
        weights=weights,
        corpus=command.corpus,
        data_dir=command.data_dir,
        split=command.split,
        corpus_options=_mapping("corpus_options", command.corpus_options),
        batch_size=command.batch_size,
        heads=command.heads if command.heads in ("union", "common") else command.heads.split(","),
        references=command.references,
    )


def predict(command: argparse.Namespace) -> Path | int | None:
    """Predict the emotions of recordings."""
    return _from("inference.predict", "main")(command)


def listen(command: argparse.Namespace) -> int:
    """Show emotions as they are heard, from a file, a pipe or a microphone."""
    return _from("inference.listen", "main")(command)


def page(command: argparse.Namespace) -> int:
    """Show a page on this machine that judges recordings, or compares two systems."""
    return _from("inference.page", "main")(command)


def space(command: argparse.Namespace) -> Path:
    """Write a Space for the Hub: the page of one system, with all that it needs."""
    return _from("inference.space", "write_space")(command.model, command.folder, examples=command.examples)


def convert(command: argparse.Namespace) -> Path:
    """Convert a checkpoint in the authors' format."""
    return _from("hub.conversion", "convert")(
        command.source, command.destination, audio_backbone=command.audio_backbone, lora=command.lora
    )


def merge(command: argparse.Namespace) -> Path:
    """Merge the adapters of a system with LoRA into its encoders."""
    return _from("hub.merging", "merge")(
        command.adapters, command.folder, audio_backbone=command.audio_backbone, text_backbone=command.text_backbone
    )


def export(command: argparse.Namespace) -> Path:
    """Export a system as one ONNX file, which runs without torch."""
    return _from("inference.export", "export")(command.model, command.folder, precision=command.precision)


def data(command: argparse.Namespace) -> Path | None:
    """Print a corpus's statistics; with an output folder, save its rows there too."""
    from sailer.data import load_corpus
    from sailer.data.schema import CorpusReport

    options = parse_overrides(command.options)
    output_dir, transcriber = options.pop("output_dir", None), options.pop("transcriber", None)
    if transcriber and not output_dir:
        raise SettingsError("--transcriber needs --output_dir, where it marks the transcripts that it makes.")
    if output_dir:
        _from("data.statistics", "check_output_dir")(Path(output_dir))
    label_set = DataSettings(**{name: options.pop(name) for name in LABEL_OPTIONS if name in options}).label_set()
    report, machine_made = CorpusReport(), None
    corpus = load_corpus(command.name, command.data_dir, label_set=label_set, report=report, **options)
    if transcriber:
        file = Path(output_dir) / _from("data.statistics", "TRANSCRIPTS_FILE")
        corpus, machine_made = _from("data.transcription", "fill_transcripts")(corpus, transcriber, file)
    print(_from("data.statistics", "describe")(corpus, label_set, report, machine_made))
    if not output_dir:
        return None
    return _from("data.statistics", "save")(corpus, output_dir, label_set, report, machine_made)


def push(command: argparse.Namespace) -> str:
    """Upload a saved system, or a Space, to the Hub; its address."""
    if (command.repo_id is None) == (command.space is None):
        raise SettingsError(
            "Name where to: USER/NAME for a system, or --space USER/NAME for what `sailer space` wrote."
        )
    if command.space is not None:
        return _from("hub.publishing", "push_space")(command.folder, command.space, private=command.private)
    return _from("hub.publishing", "push")(command.folder, command.repo_id, private=command.private)


def recipes(command: argparse.Namespace) -> None:
    """List the recipes that come with the package, each with the first line of its file."""
    files = bundled_recipes()
    width = max(map(len, files), default=0)
    for name, path in files.items():
        with path.open(encoding="utf-8") as file:
            print(f"{name:{width}}  {file.readline().lstrip('# ').rstrip()}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sailer",
        description="Emotion recognition in natural speech: train, evaluate and use SAILER systems.",
        epilog="SAILER_DEBUG=1 shows the traceback of an error.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        run: Callable[[argparse.Namespace], Any], usage: str, details: Callable[[], str] | None = None
    ) -> argparse.ArgumentParser:
        summary = (run.__doc__ or "").split(";")[0].rstrip(".")
        added = commands.add_parser(
            run.__name__, help=summary, description=f"{summary}.", usage=f"sailer {usage}", add_help=not details
        )
        added.set_defaults(run=run)
        if details:
            added.add_argument("-h", "--help", action=_DetailedHelp, details=details, help="show this and the options")
        return added

    added = add(train, "train [RECIPE] [--option value ...]", option_help)
    added.add_argument("recipe", nargs="?", default=DEFAULT_RECIPE, help="a YAML file, or a name of `sailer recipes`")

    added = add(evaluate, "evaluate MODEL... (--corpus NAME [--data_dir DIR] | --corpora NAME=DIR...) [options]")
    added.add_argument("models", nargs="+", metavar="MODEL", help="folders or Hub ids; several are averaged")
    which = added.add_mutually_exclusive_group(required=True)
    which.add_argument("--corpus", metavar="NAME", help="see `sailer data --help`")
    across = "NAME[:SPLIT][=DIR] each: a table of every system on every corpus"
    which.add_argument("--corpora", nargs="+", metavar="CORPUS", help=across)
    added.add_argument("--data_dir", metavar="DIR", help="the corpus's folder")
    added.add_argument("--split", default="test", metavar="S")
    added.add_argument("--output_dir", type=Path, metavar="DIR", help="for the report, its figures and pictures")
    added.add_argument("--corpus_options", default="{}", metavar="YAML", help="as in a recipe: '{option: value}'")
    added.add_argument("--batch_size", type=int, default=8, metavar="N")
    added.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="draws of the speakers, for intervals")
    added.add_argument("--embed_audio", action="store_true", help="hold the worst clips' audio in the report")
    added.add_argument("--submission", choices=("categorical", "attributes"), help="write the challenge's file too")
    added.add_argument("--file_list", type=Path, metavar="FILE", help="what it must have: a CSV with FileName")

    added = add(calibrate, "calibrate MODEL --corpus NAME [--data_dir DIR] [options]")
    added.add_argument("model", metavar="MODEL", help="folder of a system or ensemble, whose config.json is rewritten")
    added.add_argument("--corpus", required=True, metavar="NAME", help="clips that it was not trained on")
    added.add_argument("--data_dir", metavar="DIR", help="the corpus's folder")
    added.add_argument("--split", default="validation", metavar="S")
    added.add_argument("--corpus_options", default="{}", metavar="YAML", help="as in a recipe: '{option: value}'")
    added.add_argument("--batch_size", type=int, default=8, metavar="N")

    added = add(ensemble, "ensemble MODEL... FOLDER [options]")
    added.add_argument("models", nargs="+", metavar="MODEL", help="folders or Hub ids (user/name@revision) of systems")
    added.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    added.add_argument(
        "--combine", choices=("probabilities", "logits", "stacked"), default="probabilities", help="how"
    )
    added.add_argument("--weights", metavar="W", help="shares of the members, 2,1,1; or fit, on the clips named next")
    added.add_argument("--corpus", metavar="NAME", help="clips to fit on, which no member trained on")
    added.add_argument("--data_dir", metavar="DIR", help="the corpus's folder")
    added.add_argument("--split", default="validation", metavar="S")
    added.add_argument("--corpus_options", default="{}", metavar="YAML", help="as in a recipe: '{option: value}'")
    added.add_argument("--batch_size", type=int, default=8, metavar="N")
    added.add_argument("--heads", default="union", metavar="H", help="union, common, or names: primary,attributes")
    added.add_argument("--references", action="store_true", help="keep members as Hub ids and commits, not as copies")

    added = add(predict, "predict MODEL PATH... [options]")
    added.add_argument("model", metavar="MODEL", help="folder or Hub id")
    added.add_argument("paths", nargs="+", metavar="PATH", help="audio files, folders or globs")
    added.add_argument(
        "--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help=".csv, .jsonl; .parquet"
    )
    added.add_argument("--format", choices=("csv", "jsonl", "parquet"), help="where the output's name does not say it")
    added.add_argument("--timeline", action="store_true", help="a row per window, and a PNG of the emotions over time")
    added.add_argument("--submission", choices=("categorical", "attributes"), help="write the challenge's file too")
    added.add_argument("--file_list", type=Path, metavar="FILE", help="judge just these: a CSV with a column FileName")
    added.add_argument(
        "--speaker_from",
        metavar="WHERE",
        help="adapt to each speaker's other recordings: folder, or a column of the --file_list",
    )
    added.add_argument("--embeddings", type=Path, metavar="FILE", help="save the embeddings too")
    added.add_argument(
        "--min_confidence", type=float, default=0.0, metavar="P", help="mark clips below it as undecided"
    )
    added.add_argument("--coverage", type=float, metavar="P", help="add the sets that have so many clips' emotions")
    added.add_argument("--coverage_by_class", action="store_true", help="of the clips of each emotion")
    added.add_argument("--transcriber", metavar="MODEL", help="speech recognition for systems that read transcripts")
    added.add_argument("--prior", choices=("balanced", "natural"), default="balanced", help="what the scores mean")
    added.add_argument("--batch_size", type=int, default=8, metavar="N")
    added.add_argument("--num_workers", type=int, default=2, metavar="N", help="threads that decode ahead")
    added.add_argument("--chunk_length_s", type=float, metavar="S", help="window over long audio; 0 for none")
    added.add_argument("--stride_length_s", type=float, metavar="S", help="what a window shares with each neighbour")
    added.add_argument(
        "--backend", choices=("torch", "onnx", "openvino"), default="torch", help="the runtime; see docs/use.md"
    )
    added.add_argument("--precision", metavar="NAME", help="float32, bfloat16 or int8, as far as the backend has it")
    added.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
    added.add_argument("--dtype", default="auto", metavar="NAME", help="float32, bfloat16, ...; as saved by default")

    added.add_argument("--engine", choices=("ray",), help="judge an archive on a Ray cluster; see docs/archives.md")
    added.add_argument("--actors", type=int, metavar="N", help="of the cluster; by default one per GPU, or two CPUs")
    added.add_argument("--part_size", type=int, metavar="N", help="recordings of each part of a Parquet output")
    added.add_argument("--audio_column", metavar="NAME", help="of recordings in Parquet files; audio by default")

    added = add(listen, "listen MODEL [FILE] [options]")
    added.add_argument("model", metavar="MODEL", help="folder or Hub id")
    added.add_argument(
        "source", nargs="?", metavar="FILE", help="audio file, or - for a pipe; by default a microphone"
    )
    added.add_argument("--chunk_s", type=float, default=3.0, metavar="S", help="what a result hears")
    added.add_argument("--hop_s", type=float, default=1.0, metavar="S", help="from one result to the next")
    added.add_argument("--smooth_s", type=float, default=0.0, metavar="S", help="time constant; 0 for no smoothing")
    added.add_argument("--style", choices=("bars", "lines", "json"), help="bars in a terminal, else a line per result")
    added.add_argument("--rate", type=float, metavar="HZ", help="of raw samples in a pipe, which no header tells")
    added.add_argument("--channels", type=int, metavar="N", help="of raw samples; 1 by default")
    added.add_argument("--sample_format", choices=("int16", "int32", "float32"), help="of raw samples, little-endian")
    added.add_argument("--microphone", metavar="NAME", help="number, or part of the name, of an input device")
    added.add_argument("--transcriber", metavar="MODEL", help="speech recognition for systems that read transcripts")
    added.add_argument("--prior", choices=("balanced", "natural"), help="what the scores mean")
    added.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")
    added.add_argument(
        "--backend", choices=("torch", "onnx", "openvino"), default="torch", help="the runtime; see docs/use.md"
    )
    added.add_argument("--precision", metavar="NAME", help="float32, bfloat16 or int8, as far as the backend has it")

    added = add(page, "page MODEL [MODEL2] [options]")
    added.add_argument("models", nargs="*", metavar="MODEL", help="folders or Hub ids: one, or two side by side")
    added.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="by default this machine alone")
    added.add_argument("--port", type=int, default=7860, metavar="N", help="0 for any that is free")
    added.add_argument("--examples", type=Path, metavar="DIR", help="clips to try; by default synthetic ones")
    added.add_argument("--transcriber", metavar="MODEL", help="speech recognition for systems that read transcripts")
    added.add_argument("--max_minutes", type=float, default=60.0, metavar="M", help="longest recording")
    added.add_argument("--max_megabytes", type=int, default=200, metavar="N", help="largest upload")
    added.add_argument("--max_files", type=int, default=200, metavar="N", help="recordings of a folder")
    added.add_argument("--max_waiting", type=int, default=100, metavar="N", help="visitors in the queue")
    added.add_argument("--keep_minutes", type=float, default=30.0, metavar="M", help="how long an unused upload stays")
    added.add_argument("--window_s", type=float, default=3.0, metavar="S", help="what a result over time hears")
    added.add_argument("--hop_s", type=float, default=1.0, metavar="S", help="from one result to the next")
    added.add_argument(
        "--backend", choices=("torch", "onnx", "openvino"), default="torch", help="the runtime; see docs/use.md"
    )
    added.add_argument("--precision", metavar="NAME", help="float32, bfloat16 or int8, as far as the backend has it")
    added.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")

    added = add(space, "space MODEL FOLDER [--examples DIR]")
    added.add_argument("model", metavar="MODEL", help="folder or Hub id of a trained system")
    added.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    added.add_argument("--examples", type=Path, metavar="DIR", help="clips to try; by default synthetic ones")

    added = add(convert, "convert SRC DST [--audio_backbone DIR] [--lora MODE]")
    added.add_argument("source", metavar="SRC", help="folder or Hub id")
    added.add_argument("destination", type=Path, metavar="DST", help="folder to write")
    added.add_argument("--audio_backbone", metavar="DIR", help="backbone, where it is not the released one")
    added.add_argument(
        "--lora",
        choices=("auto", "merged", "unmerged"),
        default="auto",
        help="whether the weights hold their LoRA factors",
    )

    added = add(merge, "merge ADAPTERS FOLDER [--audio_backbone DIR] [--text_backbone DIR]")
    added.add_argument("adapters", metavar="ADAPTERS", help="folder or Hub id of a system that was saved as adapters")
    added.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    added.add_argument("--audio_backbone", metavar="DIR", help="speech encoder, where it is not where it was")
    added.add_argument("--text_backbone", metavar="DIR", help="text encoder, where it is not where it was")

    added = add(export, "export MODEL FOLDER [--format onnx] [--precision float32|int8]")
    added.add_argument("model", metavar="MODEL", help="folder or Hub id of a trained system")
    added.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    added.add_argument("--format", choices=("onnx",), default="onnx", help="which OpenVINO reads too")
    added.add_argument("--precision", choices=("float32", "int8"), default="float32", help="of the weights")

    added = add(data, "data NAME [DIR] [--output_dir DIR] [--option value ...]", _corpus_help)
    added.add_argument("name", metavar="NAME", help="the corpus")
    added.add_argument("data_dir", nargs="?", metavar="DIR", help="its folder, or for some a file or Hub id")

    added = add(push, "push DIR (REPO_ID | --space REPO_ID) [--private]")
    added.add_argument("folder", type=Path, metavar="DIR")
    added.add_argument("repo_id", nargs="?", metavar="REPO_ID", help="USER/NAME")
    added.add_argument("--space", metavar="REPO_ID", help="USER/NAME of a Space: DIR is what `sailer space` wrote")
    added.add_argument("--private", action="store_true", help="make a new repository private")

    add(recipes, "recipes")
    return parser


class _DetailedHelp(argparse.Action):
    """Help that ends with what takes time to look up, and is looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, details: Callable[[], str], **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)
        self.details = details

    def __call__(self, parser: argparse.ArgumentParser, *ignored: Any) -> None:
        parser.print_help()
        print(f"\n{self.details()}", end="")
        parser.exit()


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words that argparse reads, and the options of an open command."""
    if not arguments or arguments[0] not in OPEN_COMMANDS:
        return arguments, []
    if {"-h", "--help"} & set(arguments):
        return [arguments[0], "--help"], []
    first = next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments))
    return arguments[:first], arguments[first:]


def _corpus_help() -> str:
    from sailer.data.corpora import corpus_names, corpus_options

    lines = (f"  {name}: {', '.join(corpus_options(name)) or 'no options'}" for name in corpus_names())
    return "\n".join(
        [f"options of every corpus: {', '.join((*LABEL_OPTIONS, 'audio', 'strict'))}", "options of each:", *lines, ""]
    )


def _mapping(option: str, text: str) -> dict[str, Any]:
    value = parse_overrides([f"--{option}", text])[option]
    if not isinstance(value, dict):
        raise SettingsError(f"--{option} is {text!r}, expected a mapping such as '{{option: value}}'.")
    return value


def _from(module: str, name: str) -> Any:
    # Imported when called: `sailer --help` must not wait for torch.
    return getattr(importlib.import_module(f"sailer.{module}"), name)


if __name__ == "__main__":
    sys.exit(main())
