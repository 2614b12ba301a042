"""emotion2vec's speed and outputs beside FunASR's own code, on the same random weights and clips of mixed length.

FunASR's code is not installed: give its wheel, unpacked (the modules that its model file wants besides are stood in).

    pip download --no-deps --dest wheel funasr && python -m zipfile -e wheel/funasr-*.whl funasr
    python benchmarks/emotion2vec.py --funasr funasr
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sailer.hub.conversion import convert

SECONDS = (1.2, 2.0, 2.6, 3.1, 3.7, 4.4, 5.6, 7.9)  # of the clips of a batch; the mean is near that of acted corpora
CONV_SPEC = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] + [(512, 2, 2)]"
TOKENS = ("生气/angry", "厌恶/disgusted", "恐惧/fearful", "开心/happy", "中立/neutral", "其他/other", "难过/sad")
TOKENS += ("吃惊/surprised", "<unk>")


class Options(dict):
    """What omegaconf makes of nested dictionaries, as far as the model asks: attributes, or None."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name)
        return Options(value) if isinstance(value, dict) else value


def peer(folder: Path) -> Any:
    """FunASR's Emotion2vec class from an unpacked wheel, with what else it imports stood in."""
    packages = ("funasr", "funasr.models", "funasr.models.emotion2vec", "funasr.utils", "distutils")
    modules = {name: types.ModuleType(name) for name in packages}
    for name in packages[:4]:
        modules[name].__path__ = [str(folder / name.replace(".", "/"))]

    def stand_in(name: str, **content: Any) -> None:
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(content)

    tables = types.SimpleNamespace(register=lambda *names: lambda kind: kind)
    stand_in("funasr.register", tables=tables)
    stand_in("funasr.utils.load_utils", load_audio_text_image_video=lambda clips, **options: clips)
    stand_in("funasr.utils.amp", autocast=contextlib.nullcontext)
    stand_in("omegaconf", OmegaConf=types.SimpleNamespace(create=Options), MISSING=None, II=str)
    stand_in("distutils.version", LooseVersion=lambda text: tuple(map(int, text.split("+")[0].split(".")[:2])))
    sys.modules.update(modules)
    from funasr.models.emotion2vec.model import Emotion2vec

    return Emotion2vec


def options_of(width: int = 768, heads: int = 12, depth: int = 8, prenet: int = 4, **audio: Any) -> dict[str, Any]:
    """A config.yaml's content, as the released models' of base size by default; `audio` changes the modality's."""
    model = {"depth": depth, "num_heads": heads, "norm_eps": 1e-5, "norm_affine": True, "embed_dim": width}
    model |= {"mlp_ratio": 4.0, "layer_norm_first": False, "normalize": True, "encoder_dropout": 0.1}
    model |= {"post_mlp_drop": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "dropout_input": 0.0}
    model |= {"layerdrop": 0.05, "start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0, "clone_batch": 8}
    modality = {"type": "AUDIO", "prenet_depth": prenet, "prenet_layerdrop": 0.05, "prenet_dropout": 0.1}
    modality |= {"start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0, "num_extra_tokens": 10}
    modality |= {"init_extra_token_zero": True, "local_grad_mult": 1.0, "use_alibi_encoder": True, "alibi_scale": 1.0}
    modality |= {"learned_alibi": False, "learned_alibi_scale": True, "learned_alibi_scale_per_head": True}
    modality |= {"learned_alibi_scale_per_layer": False, "num_alibi_heads": heads, "model_depth": depth}
    modality |= {"decoder": None, "extractor_mode": "layer_norm", "feature_encoder_spec": CONV_SPEC}
    modality |= {"conv_pos_width": 95, "conv_pos_groups": 16, "conv_pos_depth": 5, "conv_pos_pre_ln": False}
    return {"model": "Emotion2vec", "model_conf": model | {"modalities": {"audio": modality | audio}}}


def write_checkpoint(folder: Path, options: dict[str, Any], emotion2vec: Any, seed: int = 0) -> Any:
    """FunASR's model with random weights, written in the form of a released checkpoint; the model."""
    torch.manual_seed(seed)
    model = emotion2vec(**options, vocab_size=len(TOKENS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # what is 1 or 0 when it is fresh would hide what is left out
            if parameter.ndim in (1, 5):  # norms, biases and scales
                parameter.add_(0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, folder / "model.pt")
    (folder / "config.yaml").write_text(json.dumps(options), encoding="utf-8")  # JSON is YAML
    (folder / "tokens.txt").write_text("\n".join(TOKENS), encoding="utf-8")
    return model


def theirs(model: Any, clips: list[np.ndarray]) -> list[dict[str, Any]]:
    """Their results, one clip after the other, as their `inference` has them."""
    tokenizer = types.SimpleNamespace(token_list=list(TOKENS))
    waveforms = [torch.from_numpy(clip) for clip in clips]
    with torch.inference_mode():
        return model.inference(waveforms, key=[""] * len(clips), tokenizer=tokenizer, device="cpu")[0]


def theirs_padded(model: Any, clips: list[np.ndarray]) -> torch.Tensor:
    """Their encoder on one padded batch with its mask, which their `inference` never makes; for the time alone."""
    with torch.inference_mode():
        normalized = [torch.nn.functional.layer_norm(clip, clip.shape) for clip in map(torch.from_numpy, clips)]
        waveforms = torch.nn.utils.rnn.pad_sequence(normalized, batch_first=True)
        lengths = torch.tensor([len(clip) for clip in clips])
        padding = torch.arange(waveforms.shape[1]) >= lengths.unsqueeze(1)
        return model.proj(model.extract_features(waveforms, padding_mask=padding)["x"].mean(1)).softmax(-1)


def rounds(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn so that the machine's mood strikes all alike."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--funasr", type=Path, required=True, help="FunASR's wheel, unpacked")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    emotion2vec = peer(arguments.funasr)
    generator = np.random.default_rng(0)
    clips = [generator.normal(0, 0.1, round(16000 * seconds)).astype(np.float32) for seconds in SECONDS]
    with tempfile.TemporaryDirectory() as folder:
        options = options_of()
        model = write_checkpoint(Path(folder) / "released", options, emotion2vec)
        converted = convert(Path(folder) / "released", Path(folder) / "converted")
        from transformers import pipeline

        classifier = pipeline("audio-classification", model=str(converted), trust_remote_code=True, device="cpu")

        def ours(batch_size: int) -> list[Any]:
            return classifier(clips, batch_size=batch_size, chunk_length_s=0, return_all=True)

        expected, got = theirs(model, clips), ours(8)
        embeddings = max(np.abs(a["feats"] - b["embedding"]).max() for a, b in zip(expected, got, strict=True))
        scores = max(
            abs(score - dict(zip([token.rpartition("/")[2] for token in a["labels"]], a["scores"], strict=True))[name])
            for a, b in zip(expected, got, strict=True)
            for name, score in ((row["label"], row["score"]) for row in b["primary"])
        )
        functions = {
            "FunASR, one clip after the other": lambda: theirs(model, clips),
            "FunASR, a padded batch of 8": lambda: theirs_padded(model, clips),
            "sailer, one clip after the other": lambda: ours(1),
            "sailer, a batch of 8": lambda: ours(8),
        }
        medians = rounds(functions, arguments.repeats)
    total = sum(SECONDS)
    base = medians["FunASR, one clip after the other"]
    print(
        f"{len(SECONDS)} clips of {min(SECONDS)} to {max(SECONDS)} s, {arguments.threads} threads, float32, base size"
    )
    print(f"largest difference: {embeddings:.1e} of an embedding, {scores:.1e} of a score")
    for name, seconds in medians.items():
        print(f"{name:34}  {seconds:6.3f} s  {total / seconds:6.1f} s of speech a second  {base / seconds:5.2f} x")


if __name__ == "__main__":
    main()
