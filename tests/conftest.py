"""What the tests share: no network, one thread, tiny random backbones and the material in ../shared."""

import importlib.util
import os

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

from .hub_server import HubServer, running_hub
from .sounds import noise

if TYPE_CHECKING:
    from sailer import SailerForAudioClassification, SailerProcessor

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="keep the numbers that the golden runs give now")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test's random weights, those of the fixtures made for it too, depend on no test before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real speech, weights and reference outputs beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real speech and reference outputs) is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def golden_maker() -> ModuleType:
    """The script that made the checkpoints in tests/golden; it makes backbones too, and knows what to ask of them."""
    script = Path(__file__).parent / "golden" / "make_checkpoints.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def whisper_base(shared: Path) -> Path:
    return shared / "models" / "whisper-base-encoder"


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sailer.training.tiny_backbones import make_tiny_whisper

    return make_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="session")
def tiny_wavlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sailer.training.tiny_backbones import make_tiny_wavlm

    return make_tiny_wavlm(tmp_path_factory.mktemp("wavlm"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sailer.training.tiny_backbones import make_tiny_text

    return make_tiny_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def different_clips() -> list[np.ndarray]:
    """Eight waveforms at 16 kHz of 0.5 to 1.9 s, none like another."""
    return [noise(0.5 + 0.2 * seed, seed) for seed in range(8)]


DIFFERENT_TEXTS = ("so happy", "leave me alone", "", "the lazy dog", "i am", "brown", "happy happy", "jumps over this")


def spread_out(
    model: "SailerForAudioClassification", processor: "SailerProcessor", clips: list[np.ndarray]
) -> "SailerForAudioClassification":
    """The model with some layers scaled: over different clips each output has mean 0 and deviation 1 (before the
    sigmoid, where there is one), and speech counts as much as text.

    Freshly initialised, it gives everything much the same answer, and a test that compares answers cannot fail.
    """
    import torch

    inputs = processor(
        audio=clips, text=DIFFERENT_TEXTS if processor.tokenizer else None, sampling_rate=processor.sampling_rate
    )
    with torch.no_grad():
        embeddings = model.eval()(**inputs).embeddings
        speech, text = embeddings.std(dim=0).tensor_split([model.config.hidden_size])
        if len(text):
            for parameter in model.sailer.audio_projection[-1].parameters():
                parameter *= text.mean() / speech.mean()
            embeddings = model(**inputs).embeddings
        for head in model.heads.values():
            deviation, mean = torch.std_mean(head(embeddings), dim=0)
            head[-1].weight /= deviation.unsqueeze(1)
            head[-1].bias.sub_(mean).div_(deviation)
    return model


@pytest.fixture(scope="session")
def tiny_sailer(
    tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path, tiny_text: Path, different_clips: list[np.ndarray]
) -> Path:
    """A saved speech-and-text system with every head, whose answers differ from clip to clip."""
    import torch
    from transformers import AutoFeatureExtractor, AutoTokenizer

    from sailer import SailerForAudioClassification, SailerProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sailer")
    heads = ["primary", "secondary", "attributes", "sex", "age"]
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, tiny_text, heads=heads)
    processor = SailerProcessor(
        AutoFeatureExtractor.from_pretrained(tiny_whisper), AutoTokenizer.from_pretrained(tiny_text)
    )
    spread_out(model, processor, different_clips).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_speech_sailer(
    tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path, different_clips: list[np.ndarray]
) -> Path:
    """A saved speech-only system with the primary head, whose answers differ from clip to clip."""
    import torch
    from transformers import AutoFeatureExtractor

    from sailer import SailerForAudioClassification, SailerProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sailer_speech")
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, heads=["primary"])
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_whisper))
    spread_out(model, processor, different_clips).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny speech recogniser with random weights, whose transcripts are not empty."""
    import torch
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    folder = tmp_path_factory.mktemp("recognizer")
    (folder / "vocab.json").write_text('{"<pad>": 0, "|": 1, "<unk>": 2, "a": 3, "b": 4}')
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2ForCTC(config)
    model.lm_head.bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0])
    model.save_pretrained(folder)
    tokenizer = Wav2Vec2CTCTokenizer(folder / "vocab.json", pad_token="<pad>", unk_token="<unk>")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, which this process (not one that it starts) takes for the Hub."""
    from huggingface_hub import constants

    with running_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_of_me")
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it remembers an earlier address
        yield server
