"""Tiny random backbones, written as the Hub's checkpoints are: for the demo, the tests and trials of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from sailer.encoders_emotion2vec import Emotion2VecConfig, Emotion2VecFeatureExtractor, Emotion2VecModel

# Configurations of backbones that the recipes name, by the last part of their Hub id: what decides their shape, as the
# published config.json has it (compared in November 2026; of HuBERT, wav2vec2 and w2v-BERT with that of systems
# fine-tuned from them, which repeat it; those of Whisper and emotion2vec were not at hand).
CONFIGURATIONS = Path(__file__).resolve().parents[1] / "backbone_configs"
SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
DEFAULT_TEXTS = ("the quick brown fox jumps over the lazy dog", "i am so happy about this", "leave me alone")


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """Torch's numbers on the CPU begin at a seed, and afterwards go on as before: the caller's seed stays in force."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


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
    with _random_numbers_of(seed):
        (WhisperForConditionalGeneration if prefix else WhisperModel)(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(folder)
    return Path(folder)


def make_tiny_wavlm(folder: str | Path, seed: int = 0, norm: str = "layer", family: str = "wavlm") -> Path:
    """WavLM checkpoint with random weights; `norm` is "layer" as in wavlm-large or "group" as in wavlm-base.

    `family` "hubert" or "wav2vec2" makes one of those, which are of the same form.
    """
    config = AutoConfig.for_model(
        family,
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
    with _random_numbers_of(seed):
        AutoModel.from_config(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer", do_normalize=True).save_pretrained(folder)
    return Path(folder)


def make_tiny_wav2vec2_bert(folder: str | Path, seed: int = 0) -> Path:
    """w2v-BERT 2.0 checkpoint with random weights."""
    config = Wav2Vec2BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, layerdrop=0.0
    )
    with _random_numbers_of(seed):
        Wav2Vec2BertModel(config).save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    return Path(folder)


def make_tiny_emotion2vec(folder: str | Path, seed: int = 0) -> Path:
    """emotion2vec checkpoint, as `sailer convert` writes it, with random weights."""
    config = Emotion2VecConfig(
        hidden_size=48,
        num_hidden_layers=3,
        prenet_layers=1,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=[32] * 7,
        conv_pos_groups=4,
        conv_pos_layers=2,
        num_extra_tokens=2,
        layerdrop=0.0,
        prenet_layerdrop=0.0,
    )
    with _random_numbers_of(seed):
        Emotion2VecModel(config).save_pretrained(folder)
    Emotion2VecFeatureExtractor().save_pretrained(folder)
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
    with _random_numbers_of(seed):
        RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    return Path(folder)


# The names that settings know them by, and the family (model_type) that each is of.
TINY: dict[str, Callable[..., Path]] = {
    "tiny-whisper": make_tiny_whisper,
    "tiny-wavlm": make_tiny_wavlm,
    "tiny-hubert": partial(make_tiny_wavlm, family="hubert"),
    "tiny-wav2vec2": partial(make_tiny_wavlm, family="wav2vec2"),
    "tiny-wav2vec2-bert": make_tiny_wav2vec2_bert,
    "tiny-emotion2vec": make_tiny_emotion2vec,
    "tiny-text": make_tiny_text,
}
FAMILIES = {name.removeprefix("tiny-"): name for name in TINY if name != "tiny-text"} | {"roberta": "tiny-text"}


def tiny_stand_in(backbone: str) -> str:
    """Name, in `TINY`, of the tiny backbone of a backbone's family.

    Args:
        backbone: Hub id or folder, or a tiny one's name already. Nothing is fetched for those that the recipes name.

    Raises:
        ValueError: its family cannot be told, or has no tiny one; the message names those that have.
    """
    if backbone in TINY:
        return backbone
    shipped = CONFIGURATIONS / f"{backbone.rsplit('/', 1)[-1]}.json"
    way_out = f"families with a tiny backbone are {list(FAMILIES)}; or name one yourself, of {list(TINY)}"
    if shipped.is_file():
        family = json.loads(shipped.read_text(encoding="utf-8"))["model_type"]
    else:
        try:
            family = AutoConfig.from_pretrained(backbone, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            raise ValueError(f"The family of backbone {backbone!r} cannot be told: {error} The {way_out}.") from error
    if family not in FAMILIES:
        raise ValueError(f"There is no tiny backbone of {backbone!r}, which is a {family!r} model; the {way_out}.")
    return FAMILIES[family]
