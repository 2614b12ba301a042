"""What the tests share: no network, one thread, tiny random backbones and the material in ../shared."""

import importlib.util
import os

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg")

from pathlib import Path
from types import ModuleType

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="keep the numbers that the golden runs give now")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


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
def tiny_sailer(tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path, tiny_text: Path) -> Path:
    """A saved speech-and-text system with every head."""
    import torch
    from transformers import AutoFeatureExtractor, AutoTokenizer

    from sailer import SailerForAudioClassification, SailerProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sailer")
    heads = ["primary", "secondary", "attributes", "sex", "age"]
    model = SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, tiny_text, heads=heads)
    model.save_pretrained(folder)
    processor = SailerProcessor(
        AutoFeatureExtractor.from_pretrained(tiny_whisper), AutoTokenizer.from_pretrained(tiny_text)
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_speech_sailer(tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path) -> Path:
    """A saved speech-only system with the primary head."""
    import torch
    from transformers import AutoFeatureExtractor

    from sailer import SailerForAudioClassification, SailerProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sailer_speech")
    SailerForAudioClassification.from_audio_text_pretrained(tiny_whisper, heads=["primary"]).save_pretrained(folder)
    SailerProcessor(AutoFeatureExtractor.from_pretrained(tiny_whisper)).save_pretrained(folder)
    return folder
