"""Makes the tiny checkpoints of `checkpoint_0.1.0` and what they answered, with the code of 0.1.0; README.md says how.

The towers' weights are wide and the heads are spread over a few probe clips, so that different clips get clearly
different answers: a model that answers the same to everything would pass any test.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

RATE = 16000
TEXTS = ("i am so happy about this", "leave me alone", "the lazy dog sleeps", "what is that", "please come home now")


def waveform(pitch: float, seconds: float, glide: float = 0.0) -> np.ndarray:
    """A buzz of eight harmonics that rises by `glide` Hz a second and trembles four times a second."""
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * (pitch * time + glide * time**2 / 2)
    buzz = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 9))
    return (0.15 * buzz * (1 + 0.6 * np.sin(2 * np.pi * 4 * time))).astype(np.float32)


def clips(with_text: bool = True) -> list[tuple[np.ndarray, str]]:
    """The waveforms and transcripts whose outputs are kept; with text, the second one also without its transcript."""
    short, long = waveform(110, 0.9), waveform(230, 1.7, glide=60)
    return [(short, TEXTS[0]), (long, TEXTS[1]), (long, "")][: 3 if with_text else 2]


def outputs(model: Any, processor: Any, items: list[tuple[np.ndarray, str]]) -> list[dict[str, list[float]]]:
    """What a system answers to clips that it hears as one batch: probabilities, attributes, age, embedding."""
    import torch

    text = None if processor.tokenizer is None else [transcript for _, transcript in items]
    inputs = processor(audio=[heard for heard, _ in items], text=text, sampling_rate=RATE)
    with torch.no_grad():
        answer = model.eval()(**inputs)
    tensors = {
        "balanced": model.probabilities(answer.logits, "balanced"),
        "natural": model.probabilities(answer.logits, "natural"),
        "embedding": answer.embeddings,
    }
    for name, value in (("secondary", answer.secondary_logits), ("sex", answer.sex_logits)):
        if value is not None:
            tensors[name] = value.softmax(-1)
    if answer.attributes is not None:
        tensors["attributes"] = answer.attributes
    if answer.age is not None:
        tensors["age"] = answer.age.unsqueeze(1)
    return [{name: value[row].tolist() for name, value in tensors.items()} for row in range(len(items))]


def make_backbones(folder: Path) -> None:
    """Whisper, WavLM and RoBERTa of width 16, with weights ten times as wide as usual."""
    import torch
    from transformers import (
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaModel,
        Wav2Vec2FeatureExtractor,
        WavLMConfig,
        WavLMModel,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperModel,
    )

    torch.manual_seed(0)
    whisper = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=20,
        max_source_positions=200,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.2,
    )
    WhisperModel(whisper).save_pretrained(folder / "whisper")
    WhisperFeatureExtractor(feature_size=20, chunk_length=4).save_pretrained(folder / "whisper")

    wavlm = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        layerdrop=0.0,
        initializer_range=0.2,
    )
    WavLMModel(wavlm).save_pretrained(folder / "wavlm")
    Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=True).save_pretrained(folder / "wavlm")

    tokenizer = make_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=30,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder / "text")
    roberta = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        type_vocab_size=1,
        initializer_range=0.2,
    )
    RobertaModel(roberta, add_pooling_layer=False).save_pretrained(folder / "text")


def make_tokenizer() -> Any:
    """Byte pairs over the letters of the transcripts, with RoBERTa's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def make_system(audio: Path, text: Path | None, **options: Any) -> tuple[Any, Any]:
    """A system whose every tensor has random values, with heads spread over probe clips."""
    import torch
    from transformers import AutoFeatureExtractor, AutoTokenizer

    from sailer import SailerForAudioClassification, SailerProcessor

    torch.manual_seed(1)
    model = SailerForAudioClassification.from_audio_text_pretrained(
        audio, text, hidden_size=16, max_seconds=4.0, **options
    ).eval()
    tokenizer = None if text is None else AutoTokenizer.from_pretrained(text)
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(audio), tokenizer)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("layer_weights.weight", "rel_attn_embed.weight")):
                tensor.normal_()
            elif name.endswith("running_mean"):
                tensor.normal_(std=0.3)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))  # biases and norms, which begin as zeros and ones
    spread_heads(model, processor)
    return model, processor


def spread_heads(model: Any, processor: Any) -> None:
    """Scale and shift each head so that over probe clips its outputs vary about 0 with a standard deviation of 1.5."""
    import torch

    probes = [(waveform(90 + 25 * i, 0.5 + 0.15 * i, glide=40 * (i % 3)), TEXTS[i % 5]) for i in range(9)]
    probes += clips()
    text = None if processor.tokenizer is None else [transcript for _, transcript in probes]
    with torch.no_grad():
        embeddings = model(**processor(audio=[heard for heard, _ in probes], text=text, sampling_rate=RATE)).embeddings
        for head in model.heads.values():
            scores = head(embeddings)
            scale = 1.5 / scores.std(0)
            head[2].weight.mul_(scale.unsqueeze(1))
            head[2].bias.copy_((head[2].bias - scores.mean(0)) * scale)


def main(folder: Path) -> None:
    """Write the two systems below `folder`, each with its outputs beside it."""
    import torch

    import sailer

    print(f"sailer {sailer.__version__} at {sailer.__file__}")
    torch.set_num_threads(1)
    prior = [0.2, 0.0, 0.05, 0.05, 0.2, 0.3, 0.1, 0.06, 0.04]  # no clip of Contempt: its weight is 0
    weighting = {
        "label_prior": prior,
        "label_weights": [1 / (8 * share) if share else 0.0 for share in prior],
        "target_weighting": "product",
        "calibration_temperature": 1.3,
    }
    with TemporaryDirectory() as made:
        backbones = Path(made)
        make_backbones(backbones)
        systems = {
            "multimodal": make_system(
                backbones / "whisper",
                backbones / "text",
                audio_layers="weighted",
                heads=["primary", "secondary", "attributes", "sex", "age"],
                text_dropout=0.2,
                **weighting,
            ),
            "speech": make_system(
                backbones / "wavlm",
                None,
                audio_layers="weighted_norm",
                frame_norm=True,
                frame_pooling=2,
                heads=["primary", "attributes"],
                **weighting,
            ),
        }
    for name, (model, processor) in systems.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        for code in (folder / name).glob("*.py"):
            code.unlink()  # copies of our own files as they were
        items = clips(with_text=processor.tokenizer is not None)
        kept = {
            "sailer": sailer.__version__,
            "versions": {package: version(package) for package in ("torch", "transformers", "numpy")},
            "alone": [outputs(model, processor, [item])[0] for item in items],
            "batch": outputs(model, processor, items),
        }
        (folder / name / "outputs.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
