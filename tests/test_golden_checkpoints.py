"""Checkpoints that older versions saved (tests/golden/README.md) load and answer as they did when they were made."""

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import pipeline

from sailer import SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline

GOLDEN = Path(__file__).parent / "golden"
SYSTEMS = sorted(path.parent for path in GOLDEN.glob("checkpoint_*/*/config.json"))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}  # of an age in years the relative one: it is a float32 of two digits
# A key's bias adds the same to all of a row's attention scores; the others are for training alone.
WITHOUT_PART = ("key.bias", "k_proj.bias", "masked_spec_embed", "num_batches_tracked")

pytestmark = pytest.mark.parametrize("folder", SYSTEMS, ids=lambda path: f"{path.parent.name}-{path.name}")


def load(folder: Path) -> tuple[SailerForAudioClassification, SailerProcessor]:
    return SailerForAudioClassification.from_pretrained(folder), SailerProcessor.from_pretrained(folder)


def kept(folder: Path, how: str) -> list[dict[str, list[float]]]:
    return json.loads((folder / "outputs.json").read_text())[how]


def same(found: list[dict], expected: list[dict]) -> None:
    assert [clip.keys() for clip in found] == [clip.keys() for clip in expected]
    for position, (clip, before) in enumerate(zip(found, expected, strict=True)):
        for name, values in before.items():
            np.testing.assert_allclose(clip[name], values, **TOLERANCE, err_msg=f"clip {position}: {name}")


def test_it_answers_as_it_did(folder: Path, golden_maker: ModuleType) -> None:
    model, processor = load(folder)
    clips = golden_maker.clips(with_text=processor.tokenizer is not None)
    same([golden_maker.outputs(model, processor, [clip])[0] for clip in clips], kept(folder, "alone"))
    same(golden_maker.outputs(model, processor, clips), kept(folder, "batch"))


@pytest.mark.parametrize("saved_again", [False, True])
def test_its_pipeline_answers_as_it_did(
    folder: Path, saved_again: bool, golden_maker: ModuleType, tmp_path: Path
) -> None:
    model, processor = load(folder)
    if saved_again:  # by this version, with its code beside the weights, as anyone loads it
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        classifier = pipeline(model=str(tmp_path), trust_remote_code=True)
    else:
        classifier = SpeechEmotionPipeline(model=model, processor=processor)
    has_text = processor.tokenizer is not None
    clips = [{"audio": heard, "text": text} if has_text else heard for heard, text in golden_maker.clips(has_text)]
    config = model.config

    def answers(batch_size: int) -> list[dict[str, list[float]]]:
        balanced, natural = (
            classifier(clips, return_all=True, prior=prior, batch_size=batch_size) for prior in ("balanced", "natural")
        )
        found = []
        for clip, other in zip(balanced, natural, strict=True):
            values = {"balanced": in_order(clip["primary"], config.labels), "embedding": clip["embedding"]}
            values["natural"] = in_order(other["primary"], config.labels)
            for name, labels in (("secondary", config.secondary_labels), ("sex", config.sex_labels)):
                if name in clip:
                    values[name] = in_order(clip[name], labels)
            if "attributes" in clip:
                values["attributes"] = [clip["attributes"][name] for name in ("arousal", "valence", "dominance")]
            if "age" in clip:
                values["age"] = [clip["age"]]
            found.append(values)
            scored = dict(zip(config.labels, values["balanced"], strict=True))
            assert clip["label"] == max(config.scored_labels, key=scored.__getitem__)
        return found

    same(answers(batch_size=1), kept(folder, "alone"))
    same(answers(batch_size=4), kept(folder, "batch"))


def in_order(ranked: list[dict], labels: list[str]) -> list[float]:
    scores = {item["label"]: item["score"] for item in ranked}
    return [scores[label] for label in labels]


def test_its_answers_tell_clips_and_tensors_apart(folder: Path, golden_maker: ModuleType) -> None:
    """Else the tests above would pass with any weights: clips get different answers, and every tensor has its part."""
    clips = kept(folder, "alone")
    for first, second in pairwise(clips):
        for name in first.keys() - {"embedding"}:
            assert np.abs(np.subtract(first[name], second[name])).max() > 0.05, name
    model, processor = load(folder)
    items = golden_maker.clips(with_text=processor.tokenizer is not None)

    def changed() -> bool:
        try:
            same(golden_maker.outputs(model, processor, items), kept(folder, "batch"))
        except AssertionError:
            return True
        return False

    unheard = []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            before = tensor.clone()
            tensor.mul_(-0.7).add_(0.1) if tensor.is_floating_point() else tensor.add_(1)
            if not changed():
                unheard.append(name)
            tensor.copy_(before)
    assert not changed()
    assert [name for name in unheard if not name.endswith(WITHOUT_PART)] == []
