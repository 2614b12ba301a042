"""What happened in training goes in, a model card for the Hub comes out."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailer.data.atomic import write_json
from sailer.hub.origins import Origin, file_of, hub_ids, most_restrictive, of_system, read_card
from sailer.hub.templates import number, render

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from sailer.configuration_sailer import SailerConfig, SailerEnsembleConfig
    from sailer.encoders_emotion2vec import Emotion2VecConfig

# Beside a card: what it was rendered from.
FACTS_FILE = "card.json"
COMBINED = {
    "probabilities": "the mean of the members' probabilities",
    "logits": "the softmax of the mean of the members' logits",
    "stacked": "a logistic regression on the members' log probabilities, fitted on a validation set",
}
CARD_TAGS = ("speech-emotion-recognition", "emotion", "sailer")
# What the card's metadata calls each figure of the report: the Hub's name of the metric, and the one it shows.
CARD_METRICS = {
    "macro_f1": ("f1", "Macro-F1"),
    "accuracy": ("accuracy", "Accuracy"),
    "uar": ("recall", "Unweighted recall"),
    "min_map": ("mean_average_precision", "Min. mAP"),
    "ccc": ("concordance_correlation", "CCC of the attributes"),
}
# What a split was used for.
TRAINING, SELECTION, TEST, NOTHING = USES = ("training", "choosing the epoch, calibration", "test", "nothing")
# Keys of an evaluation that say how long it took.
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
PACKAGES = ("sailer", "torch", "transformers", "datasets", "accelerate", "numpy")


def environment_facts() -> dict[str, Any]:
    """The card's `date`, `hardware` and `versions` of this process."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    packages = {name: version(name) for name in PACKAGES}
    return {
        "date": date.today().isoformat(),
        "hardware": f"{device}, {os.cpu_count()} cores",
        "versions": {"Python": platform.python_version()} | packages,
    }


def render_card(facts: Mapping[str, Any], path: str | Path) -> Path:
    """Write the model card.

    Args:
        facts: what happened; plain values, so that they can be kept as JSON.
            model_name: the title. model_id: the folder or Hub id that the example loads.
            audio_backbone, text_backbone (None: speech only), audio_layers, heads, labels, scored_labels.
            discriminant_share: of the primary logits, optional.
            corpus: its name. synthetic: whether its speech is.
            origins: of what the system is made, the fields of `sailer.hub.origins.Origin` each.
            splits: of each split its `use` (one of `USES`) and what `sailer.data.statistics.split_speakers` says.
            statistics: split -> {class: clips}.
            settings: the recipe as resolved, YAML.
            metrics: split -> figures of `sailer.training.metrics.emotion_report`.
            baselines: split -> {baseline: {metric: value}}, optional.
            groups: split -> figures by group of clips in Markdown (`sailer.training.groups.group_section`), optional.
            training: {what: value}, listed under Training, optional.
            files: {picture beside the card: caption}, optional.
            seeds: the figures of the same recipe with other seeds, as `sailer.training.seeds.summarize` has them,
                with `own`, the seed of this one; optional.
            limits: further limits, a sentence each, optional.
            license: the header's fields of it, optional: by default what `most_restrictive` says of the origins.
            kin: what shares speakers or recordings with the corpus, a sentence, optional.
            language, datasets, tags: for the header, optional.
            date, hardware, versions: optional, those of this process.
        path: Markdown file to write.

    Raises:
        ValueError: a fact that the card needs is missing; the message names it.
    """
    from jinja2 import UndefinedError

    optional: dict[str, Any] = {"synthetic": False, "baselines": {}, "training": {}, "files": {}, "limits": []}
    optional |= {"groups": {}, "kin": "", "seeds": None, "language": None, "datasets": None, "tags": []}
    facts = optional | environment_facts() | dict(facts)
    try:
        origins = [Origin(**{**origin, "corpora": tuple(origin["corpora"])}) for origin in facts["origins"]]
        results = _evaluation_results(facts["corpus"], facts["metrics"])
        facts["header"] = _header(
            facts["model_name"],
            origins,
            facts.get("license") or most_restrictive(origins),
            tags=facts["tags"],
            eval_results=results or None,
            language=facts["language"],
            datasets=facts["datasets"],
            metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        )
        facts["origins"] = origins
        facts["results"] = {
            split: _result_tables(values, facts["baselines"].get(split, {}), facts["scored_labels"])
            for split, values in facts["metrics"].items()
        }
        facts["statistics_table"] = _statistics_table(facts["statistics"])
        facts["trained_on"] = _trained_on(facts)
        facts["unfit"] = list(_unfit(facts))
        facts["seed_tables"] = seed_tables(facts["seeds"]) if facts["seeds"] else {}
        facts["versions"] = [" ".join(item) for item in facts["versions"].items()]
        return render("template.md.jinja", facts, path)
    except (KeyError, UndefinedError) as error:
        raise ValueError(f"The model card lacks a fact: {error}.") from error


def write_card(facts: Mapping[str, Any], folder: str | Path) -> Path:
    """`render_card` to the README.md of a folder, with the facts beside it (card.json), to render it from again.

    Returns:
        The card.
    """
    folder = Path(folder)
    facts = environment_facts() | dict(facts)
    card = render_card(facts, folder / "README.md")
    write_json(facts, folder / FACTS_FILE)
    return card


def origin_facts(origins: Sequence[Origin]) -> dict[str, Any]:
    """The card's `origins` and `license`; a warning says of what the license is not known."""
    return {"origins": [asdict(origin) for origin in origins], "license": most_restrictive(origins)}


def render_converted_card(source: str | Path, config: SailerConfig, name: str, path: str | Path) -> Path:
    """Write the card of a converted checkpoint.

    Args:
        source: the Hub id or folder that it was; its own card says its license.
        config: the system's configuration.
        name: the folder's name.
        path: Markdown file to write.
    """
    backbone = getattr(config.audio_config, "model_type", "none")
    facts = {"heads": config.heads, "labels": config.labels, "audio_backbone": backbone}
    return _render_copy("converted", source, name, facts, path)


def render_emotion2vec_card(
    source: str | Path,
    config: Emotion2VecConfig,
    tokens: Sequence[str],
    left_out: Mapping[str, int],
    name: str,
    path: str | Path,
) -> Path:
    """Write the card of a converted emotion2vec model.

    Args:
        source: the Hub id or folder that it was; its own card says its license.
        config: the model's configuration.
        tokens: the classes as the checkpoint names them; none of an encoder.
        left_out: part -> tensors of the checkpoint that are not in the model.
        name: the folder's name.
        path: Markdown file to write.
    """
    facts = {"config": config, "tokens": list(tokens), "left_out": dict(left_out)}
    task = "audio-classification" if tokens else "feature-extraction"
    return _render_copy("emotion2vec", source, name, facts, path, tags=["emotion2vec"], pipeline_tag=task)


def render_ensemble_card(
    config: SailerEnsembleConfig,
    weights: Sequence[float],
    sources: Sequence[str | Path],
    name: str,
    path: str | Path,
) -> Path:
    """Write the card of an ensemble.

    Args:
        config: the ensemble's configuration.
        weights: the members' shares of the primary emotions.
        sources: the members' folders or Hub ids; their own cards say their licenses, languages and data.
        name: the folder's name.
        path: Markdown file to write.
    """
    origins = [of_system(source) for source in sources]
    cards = [read_card(source) or {} for source in sources]
    header = _header(
        name,
        origins,
        most_restrictive(origins),
        tags=["ensemble"],
        language=_together(cards, "language"),
        datasets=_together(cards, "datasets"),
    )
    shares = ["-" if config.combine == "stacked" else f"{weight / sum(weights):.3f}" for weight in weights]
    facts: dict[str, Any] = {"header": header, "model_name": name, "model_id": name, "origins": origins}
    facts |= {"heads": config.heads, "labels": config.labels, "combined": COMBINED[config.combine]}
    facts["members"] = [
        {"name": member["name"], "heads": member["heads"], "share": share}
        for member, share in zip(config.members, shares, strict=True)
    ]
    facts |= _heard_by([member["name"] for member in config.members], sources)
    return render("ensemble.md.jinja", facts, path)


def _heard_by(members: Sequence[str], sources: Sequence[str | Path]) -> dict[str, Any]:
    """What each member was trained on (`heard`), and what none of them may be judged on (`unfit`): their own cards do
    not come along with them."""
    heard: list[dict[str, Any]] = []
    unfit: dict[str, None] = {}
    for name, source in zip(members, sources, strict=True):
        file = file_of(source, FACTS_FILE)
        if file is None:
            heard.append({"name": name, "corpus": None})
            unfit[f"what {name} was trained on, which no card says here."] = None
            continue
        facts = {"kin": ""} | json.loads(file.read_text(encoding="utf-8"))
        facts["origins"] = [Origin(**{**origin, "corpora": tuple(origin["corpora"])}) for origin in facts["origins"]]
        clips = sum(split["clips"] for split in facts["splits"] if split["use"] == TRAINING)
        heard.append({"name": name, "corpus": facts["corpus"], "clips": clips, "trained_on": _trained_on(facts)})
        unfit |= dict.fromkeys(_unfit(facts))
    return {"heard": heard, "unfit": list(unfit)}


def _trained_on(facts: Mapping[str, Any]) -> list[str]:
    """The speakers in training."""
    return sorted({name for split in facts["splits"] if split["use"] == TRAINING for name in split["speakers"]})


def _render_copy(
    template: str, source: str | Path, name: str, facts: Mapping[str, Any], path: str | Path, **header: Any
) -> Path:
    """The card of what was converted from a checkpoint and is under that one's license."""
    origin = of_system(source, "checkpoint")
    text = _header(name, [origin], most_restrictive([origin]), **header)
    common = {"header": text, "source": origin.name, "origins": [origin], "model_name": name, "model_id": name}
    return render(f"{template}.md.jinja", common | dict(facts), path)


def _header(
    name: str,
    origins: Sequence[Origin],
    license_: Mapping[str, Any],
    tags: Sequence[str] = (),
    pipeline_tag: str = "audio-classification",
    **more: Any,
) -> str:
    """The card's metadata, YAML."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=hub_ids(origins) or None,
        library_name="transformers",
        model_name=name,
        pipeline_tag=pipeline_tag,
        tags=[*CARD_TAGS, *tags],
        **license_,
        **more,
    ).to_yaml()


def _together(cards: Sequence[Mapping[str, Any]], field: str) -> list[str] | None:
    """What several cards have in a field, each once."""
    lists = [card.get(field) or [] for card in cards]
    found = [str(value) for values in lists for value in ([values] if isinstance(values, str) else values)]
    return list(dict.fromkeys(found)) or None


def _unfit(facts: Mapping[str, Any]) -> Iterator[str]:
    """What the system must not be judged on, and why: a clause each."""
    corpus = facts["corpus"]
    yield "any recording of the speakers in training, in whatever split, release or corpus it stands;"
    for split in facts["splits"]:
        if split["use"] == SELECTION:
            yield f"{split['split']} of {corpus}: the epoch was chosen and the scores were calibrated on it;"
        if split["use"] in (TEST, NOTHING) and split["shared"]:
            yield f"{split['split']} of {corpus}: {len(split['shared'])} of its speakers are in training;"
        if split["use"] == TRAINING and split["unknown"]:
            yield (
                f"recordings from where those {split['unknown']:,} clips of {split['split']} come from whose speakers "
                "are not known;"
            )
    if facts["kin"]:
        yield f"what shares speakers or recordings with {corpus}: {facts['kin']}"
    for origin in facts["origins"]:
        if origin.corpora:
            own = ", so no figure above is of speech that is new to it" if corpus in origin.corpora else ""
            yield f"{', '.join(origin.corpora)}: {origin.name} was itself trained on them{own}."


def seed_tables(summary: Mapping[str, Any]) -> dict[str, str]:
    """Split -> a Markdown table of what `sailer.training.seeds.summarize` gives: mean, interval, and each seed's."""
    tables = {}
    for split, figures in summary["splits"].items():
        header = ["", "mean", "low", "high", "deviation", *(f"seed {seed}" for seed in summary["seeds"])]
        rows = [
            [name, found["mean"], *(found["interval"] or (None, None)), found["deviation"], *found["values"]]
            for name, found in figures.items()
        ]
        tables[split] = _table(header, rows)
    return tables


def _evaluation_results(corpus: str, metrics: Mapping[str, Mapping[str, float]]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="audio-classification",
            dataset_type=corpus,
            dataset_name=f"{corpus} ({split})",
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(values[name], 4),
        )
        for split, values in metrics.items()
        for name, (kind, title) in CARD_METRICS.items()
        if values.get(name) is not None and math.isfinite(values[name])
    ]


def _result_tables(
    values: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]], scored_labels: Sequence[str]
) -> list[str]:
    """The figures of a whole split beside the baselines, and those of each class."""
    overall = [name for name in values if not name.startswith(("f1_", "ap_", "loss", *NOT_METRICS))]
    tables = [
        _table(
            ["", "this system", *baselines],
            [[name, values[name], *(baseline.get(name) for baseline in baselines.values())] for name in overall],
        )
    ]
    by_class = [[label, values.get(f"f1_{label}"), values.get(f"ap_{label}")] for label in scored_labels]
    by_class = [row for row in by_class if row[1:] != [None, None]]
    return [*tables, _table(["emotion", "F1", "average precision"], by_class)] if by_class else tables


def _statistics_table(statistics: Mapping[str, Mapping[str, int]]) -> str:
    names = dict.fromkeys(name for counts in statistics.values() for name in counts)
    rows = [[name, *(counts.get(name, 0) for counts in statistics.values())] for name in names]
    return _table(["", *statistics], [*rows, ["all", *(sum(counts.values()) for counts in statistics.values())]])


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column holds names, the others numbers."""
    rules = ["---", *["---:"] * (len(header) - 1)]
    lines = [header, rules, *([name, *map(number, numbers)] for name, *numbers in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
