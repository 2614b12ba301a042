"""What happened in training goes in, a model card for the Hub comes out."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sailer.data.atomic import replacing

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from sailer.configuration_sailer import SailerConfig, SailerEnsembleConfig
    from sailer.encoders_emotion2vec import Emotion2VecConfig

CARD_TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md.jinja"
CONVERTED_TEMPLATE = CARD_TEMPLATE.with_name("converted.md.jinja")
EMOTION2VEC_TEMPLATE = CARD_TEMPLATE.with_name("emotion2vec.md.jinja")
ENSEMBLE_TEMPLATE = CARD_TEMPLATE.with_name("ensemble.md.jinja")
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
}
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
        facts: what happened.
            model_name: the title. model_id: the folder or Hub id that the example loads.
            audio_backbone, text_backbone (None: speech only), audio_layers, heads, labels, scored_labels.
            corpus: its name. synthetic: whether its speech is.
            statistics: split -> {class: clips}.
            settings: the recipe as resolved, YAML.
            metrics: split -> figures of `sailer.training.metrics.emotion_report`.
            baselines: split -> {baseline: {metric: value}}, optional.
            groups: split -> figures by group of clips in Markdown (`sailer.training.groups.group_section`), optional.
            training: {what: value}, listed under Training, optional.
            files: {picture beside the card: caption}, optional.
            limits: further limits, a sentence each, optional.
            license, language, date, hardware, versions: optional; Apache-2.0, none, and those of this process.
        path: Markdown file to write.

    Raises:
        ValueError: a fact that the card needs is missing; the message names it.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import UndefinedError

    optional: dict[str, Any] = {
        "synthetic": False,
        "baselines": {},
        "groups": {},
        "training": {},
        "files": {},
        "limits": [],
        "license": "apache-2.0",
    }
    facts = optional | environment_facts() | dict(facts)
    try:
        backbones = (facts["audio_backbone"], facts["text_backbone"])
        card_data = ModelCardData(
            base_model=[name for name in backbones if _is_hub_id(name)] or None,
            eval_results=_evaluation_results(facts["corpus"], facts["metrics"]),
            language=facts.get("language"),
            library_name="transformers",
            license=facts["license"],
            metrics=[kind for kind, _ in CARD_METRICS.values()],
            model_name=facts["model_name"],
            pipeline_tag="audio-classification",
            tags=list(CARD_TAGS),
        )
        facts["card_data"] = card_data.to_yaml()
        facts["results"] = {
            split: _result_tables(values, facts["baselines"].get(split, {}), facts["scored_labels"])
            for split, values in facts["metrics"].items()
        }
        facts["statistics_table"] = _statistics_table(facts["statistics"])
        facts["versions"] = [" ".join(item) for item in facts["versions"].items()]
        return _render(CARD_TEMPLATE, facts, path)
    except (KeyError, UndefinedError) as error:
        raise ValueError(f"The model card lacks a fact: {error}.") from error


def render_converted_card(source: str, config: SailerConfig, name: str, path: str | Path) -> Path:
    """Write the card of a converted checkpoint.

    Args:
        source: the Hub id that it was, or its folder's name.
        config: the system's configuration.
        name: the folder's name.
        path: Markdown file to write.
    """
    from huggingface_hub import ModelCardData

    card_data = ModelCardData(
        base_model=[source] if _is_hub_id(source) and "/" in source else None,
        library_name="transformers",
        model_name=name,
        pipeline_tag="audio-classification",
        tags=list(CARD_TAGS),
    )
    backbone = getattr(config.audio_config, "model_type", "none")
    facts: dict[str, Any] = {"card_data": card_data.to_yaml(), "source": source, "model_name": name, "model_id": name}
    facts |= {"heads": config.heads, "labels": config.labels, "audio_backbone": backbone}
    return _render(CONVERTED_TEMPLATE, facts, path)


def render_ensemble_card(config: SailerEnsembleConfig, weights: Sequence[float], name: str, path: str | Path) -> Path:
    """Write the card of an ensemble.

    Args:
        config: the ensemble's configuration.
        weights: the members' shares of the primary emotions.
        name: the folder's name.
        path: Markdown file to write.
    """
    from huggingface_hub import ModelCardData

    references = [member["repo_id"] for member in config.members if "repo_id" in member]
    card_data = ModelCardData(
        base_model=references or None,
        library_name="transformers",
        model_name=name,
        pipeline_tag="audio-classification",
        tags=[*CARD_TAGS, "ensemble"],
    )
    shares = ["-" if config.combine == "stacked" else f"{weight / sum(weights):.3f}" for weight in weights]
    facts: dict[str, Any] = {"card_data": card_data.to_yaml(), "model_name": name, "model_id": name}
    facts |= {"heads": config.heads, "labels": config.labels, "combined": COMBINED[config.combine]}
    facts["members"] = [
        {"name": member["name"], "heads": member["heads"], "share": share}
        for member, share in zip(config.members, shares, strict=True)
    ]
    return _render(ENSEMBLE_TEMPLATE, facts, path)


def render_emotion2vec_card(
    source: str,
    config: Emotion2VecConfig,
    tokens: Sequence[str],
    left_out: Mapping[str, int],
    name: str,
    path: str | Path,
) -> Path:
    """Write the card of a converted emotion2vec model.

    Args:
        source: the Hub id that it was, or its folder's name.
        config: the model's configuration.
        tokens: the classes as the checkpoint names them; none of an encoder.
        left_out: part -> tensors of the checkpoint that are not in the model.
        name: the folder's name.
        path: Markdown file to write.
    """
    from huggingface_hub import ModelCardData

    card_data = ModelCardData(
        base_model=[source] if _is_hub_id(source) and "/" in source else None,
        library_name="transformers",
        model_name=name,
        pipeline_tag="audio-classification" if tokens else "feature-extraction",
        tags=[*CARD_TAGS, "emotion2vec"],
    )
    facts: dict[str, Any] = {"card_data": card_data.to_yaml(), "source": source, "model_name": name, "model_id": name}
    facts |= {"config": config, "tokens": list(tokens), "left_out": dict(left_out)}
    return _render(EMOTION2VEC_TEMPLATE, facts, path)


def _render(template: Path, facts: Mapping[str, Any], path: str | Path) -> Path:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    text = environment.from_string(template.read_text(encoding="utf-8")).render(facts)
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(path)


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
        if math.isfinite(values.get(name, math.nan))
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
    lines = [header, rules, *([name, *map(_number, numbers)] for name, *numbers in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    """Counts as they are, other numbers with three decimals, a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    return (
        f"{value:,.0f}" if float(value).is_integer() and (isinstance(value, int) or abs(value) > 1) else f"{value:.3f}"
    )


def _is_hub_id(name: str | None) -> bool:
    if name is None or name.startswith("tiny-") or Path(name).exists():
        return False
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None
