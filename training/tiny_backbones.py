"""Tiny random backbones, written as the Hub's checkpoints are: for the demo, the tests and offline trials."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

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
    WhisperForConditionalGeneration,
    WhisperModel,
)

SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
DEFAULT_TEXTS = ("the quick brown fox jumps over the lazy dog", "i am so happy about this", "leave me alone")


def make_tiny_whisper(
    folder: str | Path, seed: int = 0, width: int = 64, layers: int = 2, mels: int = 80, prefix: bool = True
) -> Path:
    """Full Whisper checkpoint (encoder and decoder) with random weights.

    Args:
        folder: where it is written.
        seed: of the weights.
        width, layers, mels: size of the encoder.
        prefix: whether tensor names begin with "model.", as in a checkpoint with the generation head.

    Returns:
        The folder.
    """
    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        num_mel_bins=mels,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    (WhisperForConditionalGeneration if prefix else WhisperModel)(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
    return Path(folder)


def make_tiny_wavlm(folder: str | Path, seed: int = 0, norm: str = "layer") -> Path:
    """WavLM checkpoint with random weights; `norm` is "layer" as in wavlm-large or "group" as in wavlm-base."""
    torch.manual_seed(seed)
    config = WavLMConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=[32] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        layerdrop=0.0,
    )
    WavLMModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer", do_normalize=True).save_pretrained(folder)
    return Path(folder)


def make_tiny_text(folder: str | Path, texts: Iterable[str] = DEFAULT_TEXTS, seed: int = 0, width: int = 32) -> Path:
    """RoBERTa-like checkpoint with random weights and a tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=126, **SPECIAL_TOKENS).save_pretrained(folder)

    torch.manual_seed(seed)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=130,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        type_vocab_size=1,
    )
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return Path(folder)
