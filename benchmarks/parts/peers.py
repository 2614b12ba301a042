"""The authors' code as a peer: its environment, its class without CUDA and downloads, and a checkpoint of its own.

Its own process imports this with other packages than ours, so that nothing of sailer is imported here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PEER_PACKAGES = ("transformers==4.46.3", "huggingface_hub<1", "numpy<2.3", "loralib", "librosa", "soundfile")
PEER = "hyperion-voxprofile==0.1.0"


def make_peer(folder: Path) -> Path:
    """Python of an environment with the authors' code, made once."""
    python, stamp = folder / "bin" / "python", folder / "installed"
    if not stamp.is_file():
        print(f"Installing {PEER} into {folder} (once)...", flush=True)
        torch = f"torch=={version('torch').split('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, torch, *PEER_PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", PEER], check=True)
        stamp.touch()
    return python


def authors(folder: Path) -> Callable[[list[str]], list[list[float]]]:
    import soundfile
    import torch

    wrapper = authors_class(folder)
    model = wrapper.from_pretrained(str(folder / "checkpoint")).eval()

    @torch.no_grad()
    def classify(clips: list[str]) -> list[list[float]]:
        results = []
        for clip in clips:
            wave = torch.from_numpy(soundfile.read(clip, dtype="float32")[0])
            results.append(model(wave[None])[0].softmax(-1)[0].tolist())
        return results

    return classify


def authors_class(folder: Path) -> Any:
    """Their class, without CUDA and without downloads."""
    import torch
    import transformers

    settings = json.loads((folder / "backbone.json").read_text())
    size = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "vocab_size": 51865}
    size |= {f"{part}_attention_heads": 8 for part in ("encoder", "decoder")}
    size |= {f"{part}_ffn_dim": 2048 for part in ("encoder", "decoder")}

    def backbone(name: str, max_source_positions: int, **_: Any) -> Any:
        config = transformers.WhisperConfig(**size, max_source_positions=max_source_positions)
        (folder / "checkpoint").mkdir(exist_ok=True)
        (folder / "checkpoint" / "backbone_config.json").write_text(config.to_json_string(use_diff=False))
        model = transformers.WhisperModel(config)
        if settings is not None and not (folder / "checkpoint" / "model.safetensors").exists():
            from safetensors.torch import load_file

            stored = load_file(Path(settings) / "model.safetensors")
            tensors = {name.removeprefix("model.encoder."): tensor.float() for name, tensor in stored.items()}
            tensors["embed_positions.weight"] = tensors["embed_positions.weight"][:max_source_positions]
            model.encoder.load_state_dict(tensors)
        return model

    def extractor(name: str, chunk_length: int) -> Any:
        return transformers.WhisperFeatureExtractor(chunk_length=chunk_length)

    torch.Tensor.cuda = lambda self, *arguments, **options: self
    transformers.WhisperModel.from_pretrained = staticmethod(backbone)
    transformers.AutoFeatureExtractor.from_pretrained = staticmethod(extractor)
    from vox_profile.model.emotion.whisper_emotion import WhisperWrapper

    return WhisperWrapper


def make_checkpoint(folder: Path) -> None:
    """A checkpoint in the authors' format, written by their code: pre-trained encoder, random heads."""
    import torch

    model = authors_class(folder)(pretrain_model="whisper_base", finetune_method="frozen", output_class_num=9)
    with torch.no_grad():
        model.emotion_layer[2].weight.mul_(256)  # so that probabilities differ between clips
    model.save_pretrained(folder / "checkpoint")
