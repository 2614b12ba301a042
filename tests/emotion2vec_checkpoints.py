"""Random emotion2vec checkpoints in FunASR's form, and what such a model computes, written down once more."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv1d, gelu, layer_norm, linear

AUDIO = "modality_encoders.AUDIO."
TOKENS = ["生气/angry", "厌恶/disgusted", "unuse_0", "中立/neutral", "<unk>"]
OPTIONS: dict[str, Any] = {
    "model": "Emotion2vec",
    "model_conf": {
        **{"depth": 2, "num_heads": 4, "norm_eps": 1e-5, "norm_affine": True, "embed_dim": 16, "mlp_ratio": 2.0},
        **{"layer_norm_first": False, "normalize": True, "encoder_dropout": 0.1, "post_mlp_drop": 0.1},
        **{"attention_dropout": 0.1, "activation_dropout": 0.0, "dropout_input": 0.0, "layerdrop": 0.05},
        **{"start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0, "ema_decay": 0.999, "clone_batch": 8},
        "modalities": {
            "audio": {
                **{"type": "AUDIO", "prenet_depth": 1, "prenet_layerdrop": 0.05, "prenet_dropout": 0.1},
                **{"start_drop_path_rate": 0.0, "end_drop_path_rate": 0.0, "num_extra_tokens": 3, "mask_prob": 0.5},
                **{"use_alibi_encoder": True, "learned_alibi": False, "learned_alibi_scale": True},
                **{"learned_alibi_scale_per_head": True, "learned_alibi_scale_per_layer": False},
                **{"num_alibi_heads": 4, "model_depth": 2, "decoder": {"decoder_dim": 8}},
                **{"extractor_mode": "layer_norm", "conv_pos_width": 15, "conv_pos_groups": 2, "conv_pos_depth": 3},
                **{
                    "conv_pos_pre_ln": False,
                    "feature_encoder_spec": "[(12, 10, 5)] + [(12, 3, 2)] * 4 + [(8,2,2)] * 2",
                },
            }
        },
    },
    "scope_map": ["d2v_model.", None],
}
CONVOLUTIONS = [(12, 10, 5), *[(12, 3, 2)] * 4, *[(8, 2, 2)] * 2]


def options_with(model: dict[str, Any] | None = None, **audio: Any) -> dict[str, Any]:
    """A copy of OPTIONS with some of `model_conf` and of its audio modality changed."""
    options = copy.deepcopy(OPTIONS)
    options["model_conf"] |= model or {}
    options["model_conf"]["modalities"]["audio"] |= audio
    return options


def tensors_of(
    options: dict[str, Any], classes: int = 0, convolutions: list[tuple[int, int, int]] = CONVOLUTIONS, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random tensors by FunASR's names, some of the decoder's among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        fan = math.prod(shape[1:]) if len(shape) > 1 else 25
        tensors[name] = around + torch.randn(shape, generator=generator) / math.sqrt(fan)

    model, audio = options["model_conf"], options["model_conf"]["modalities"]["audio"]
    width, inputs, hidden = model["embed_dim"], 1, int(model["embed_dim"] * model["mlp_ratio"])

    def norm(name: str, size: int, affine: bool = True) -> None:
        if affine:
            add(f"{name}.weight", size, around=1.0)
            add(f"{name}.bias", size)

    for index, (outputs, kernel, _) in enumerate(convolutions):
        add(f"{AUDIO}local_encoder.conv_layers.{index}.0.weight", outputs, inputs, kernel)
        norm(f"{AUDIO}local_encoder.conv_layers.{index}.2.1", outputs)
        inputs = outputs
    norm(f"{AUDIO}project_features.1", inputs)
    add(f"{AUDIO}project_features.2.weight", width, inputs)
    add(f"{AUDIO}project_features.2.bias", width)
    kernel = max(3, audio["conv_pos_width"] // audio["conv_pos_depth"])
    for index in range(1, audio["conv_pos_depth"] + 1):
        name = f"{AUDIO}relative_positional_encoder.{index}.0"
        add(f"{name}.weight", width, width // audio["conv_pos_groups"], kernel)
        add(f"{name}.bias", width)
    if audio["num_extra_tokens"]:
        add(f"{AUDIO}extra_tokens", 1, audio["num_extra_tokens"], width)
        tensors[f"{AUDIO}extra_tokens"] *= 5
    layers = audio["prenet_depth"] + audio["model_depth"] if audio["learned_alibi_scale_per_layer"] else 1
    heads = audio["num_alibi_heads"] if audio["learned_alibi_scale_per_head"] else 1
    tensors[f"{AUDIO}alibi_scale"] = torch.randn((layers, 1, heads, 1, 1), generator=generator) + 0.5
    norm(f"{AUDIO}context_encoder.norm", width, model["norm_affine"])
    for index in range(audio["prenet_depth"] + model["depth"]):
        block = block_name(index, audio["prenet_depth"])
        for name, outputs, size in (("attn.qkv", 3 * width, width), ("attn.proj", width, width)):
            add(f"{block}.{name}.weight", outputs, size)
            add(f"{block}.{name}.bias", outputs)
        for name, outputs, size in (("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden)):
            add(f"{block}.{name}.weight", outputs, size)
            add(f"{block}.{name}.bias", outputs)
        norm(f"{block}.norm1", width, model["norm_affine"])
        norm(f"{block}.norm2", width, model["norm_affine"])
    if classes:
        add("proj.weight", classes, width)
        add("proj.bias", classes)
    add(f"{AUDIO}decoder.blocks.0.0.weight", 8, width)
    add(f"{AUDIO}decoder.proj.weight", width, 8)
    return tensors


def block_name(index: int, prenet: int) -> str:
    return f"{AUDIO}context_encoder.blocks.{index}" if index < prenet else f"blocks.{index - prenet}"


def write(
    folder: Path, options: dict[str, Any], tensors: dict[str, torch.Tensor], tokens: list[str] | None = None
) -> Path:
    """The checkpoint in a folder; JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model": tensors}, folder / "model.pt")
    (folder / "config.yaml").write_text(json.dumps(options), encoding="utf-8")
    if tokens:
        (folder / "tokens.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    return folder


def plainly(
    options: dict[str, Any], tensors: dict[str, torch.Tensor], waveform: np.ndarray, convolutions=CONVOLUTIONS
) -> torch.Tensor:
    """One clip alone, in float64: (frames, width)."""
    model, audio = options["model_conf"], options["model_conf"]["modalities"]["audio"]
    t = {name: tensor.double() for name, tensor in tensors.items()}
    width, heads, prenet = model["embed_dim"], model["num_heads"], audio["prenet_depth"]

    def norm(x: torch.Tensor, name: str, eps: float = 1e-5) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], t.get(f"{name}.weight"), t.get(f"{name}.bias"), eps)

    def dense(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    x = torch.from_numpy(waveform).double()
    if model["normalize"]:
        x = layer_norm(x, x.shape)
    x = x.reshape(1, 1, -1)
    for index, (_, _, stride) in enumerate(convolutions):
        layer = f"{AUDIO}local_encoder.conv_layers.{index}"
        x = gelu(norm(conv1d(x, t[f"{layer}.0.weight"], stride=stride).mT, f"{layer}.2.1")).mT
    x = dense(norm(x.mT, f"{AUDIO}project_features.1"), f"{AUDIO}project_features.2")
    frames, position = x.shape[1], x
    for index in range(1, audio["conv_pos_depth"] + 1):
        layer = f"{AUDIO}relative_positional_encoder.{index}.0"
        weight, bias = t[f"{layer}.weight"], t[f"{layer}.bias"]
        position = conv1d(position.mT, weight, bias, padding=weight.shape[-1] // 2, groups=audio["conv_pos_groups"])
        position = gelu(layer_norm(position[..., :frames].mT, (width,)))
    x = (x + position)[0]
    tokens = audio["num_extra_tokens"]
    if tokens:
        x = torch.cat([t[f"{AUDIO}extra_tokens"][0], x])
    bias = torch.zeros(heads, tokens + frames, tokens + frames, dtype=torch.float64)
    slopes = slopes_of(audio["num_alibi_heads"])
    for head, slope in enumerate(slopes):
        for i in range(frames):
            for j in range(frames):
                bias[head, tokens + i, tokens + j] = -slope * abs(i - j)
    x = norm(x, f"{AUDIO}context_encoder.norm", model["norm_eps"])
    scales = t[f"{AUDIO}alibi_scale"].clamp(min=0)[:, 0, :, 0, 0]
    for index in range(prenet + model["depth"]):
        block = block_name(index, prenet)
        scale = (scales[index] if len(scales) > 1 else scales[0]).expand(len(slopes))
        query, key, value = dense(x, f"{block}.attn.qkv").reshape(-1, 3, heads, width // heads).permute(1, 2, 0, 3)
        scores = query @ key.mT / math.sqrt(width // heads)
        scores[: len(slopes)] += bias[: len(slopes)] * scale[:, None, None]
        attended = (scores.softmax(-1) @ value).transpose(0, 1).reshape(-1, width)
        x = norm(x + dense(attended, f"{block}.attn.proj"), f"{block}.norm1", model["norm_eps"])
        x = norm(
            x + dense(gelu(dense(x, f"{block}.mlp.fc1")), f"{block}.mlp.fc2"), f"{block}.norm2", model["norm_eps"]
        )
    return x[tokens:]


def slopes_of(heads: int) -> list[float]:
    """By hand for the numbers that the tests use."""
    known = {2: [2**-4, 2**-8], 4: [2**-2, 2**-4, 2**-6, 2**-8]}
    known[3] = [2**-4, 2**-8, 2**-2]  # those of two, then the first of four
    known[1] = [2**-8]
    return known[heads]
