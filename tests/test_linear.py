"""oneDNN's products in the towers: the same results and gradients, and where they must stay out of the way."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import profile

from sailer import SailerConfig, SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline
from sailer.encoders_emotion2vec import Emotion2VecConfig, Emotion2VecModel
from sailer.linear_sailer import LEAST_GAIN, LEAST_ROWS, is_available, measured_gain, onednn_linear

from .sounds import noise

pytestmark = pytest.mark.skipif(not is_available(), reason="this torch has no oneDNN")
TEXTS = ["the lazy dog jumps over this brown " * 8, "so happy"]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAILER_ONEDNN", raising=False)


def products(run: Callable[[], object]) -> int:
    """How many of oneDNN's linear products happen in a call."""
    with profile() as seen:
        run()
    return sum(event.count for event in seen.key_averages() if event.key == "mkldnn::_linear_pointwise")


def system(folder: Path, choice: str) -> tuple[SailerForAudioClassification, dict[str, torch.Tensor]]:
    model = SailerForAudioClassification.from_pretrained(folder, onednn_linear=choice).eval()
    processor = SailerProcessor.from_pretrained(folder)
    text = TEXTS if processor.tokenizer else None
    return model, dict(processor(audio=[noise(1.5), noise(0.9, 1)], text=text, sampling_rate=16000))


def as_before(outputs, expected) -> None:
    assert set(outputs) == set(expected)
    for name in expected:
        torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(LEAST_ROWS,), (2, 50), (2, 3, 40)])
def test_products_and_gradients_are_those_of_torch(bias: bool, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(*shape, 24, generator=generator, requires_grad=True)
    target = torch.randn(*shape, 40, generator=generator)

    def step() -> list[torch.Tensor]:
        y = layer(x)
        leaves = [x, *layer.parameters()]
        return [y, *torch.autograd.grad((y * target).sum(), leaves)]

    expected = step()
    with onednn_linear("on", layer):
        assert products(step) == 3  # forward, of the input, of the weight
        actual = step()
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and one.stride() == other.stride()
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(80,), (2, 3, 40)])
def test_a_product_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    """As SpecAugment does with a speech encoder's projected frames, in training."""
    layer, x = nn.Linear(8, 8), torch.randn(*shape, 8)
    masked = torch.arange(shape[-1]) % 3 == 0

    def step() -> tuple[torch.Tensor, ...]:
        y = layer(x)
        y[..., masked, :] = 0.5
        return torch.autograd.grad(y.square().sum(), [*layer.parameters()])

    expected = step()
    with onednn_linear("on", layer):
        assert products(step) == 2
        for one, other in zip(step(), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_what_wants_no_gradient_gets_none(frozen: str) -> None:
    tensors = {"input": torch.ones(80, 8), "weight": torch.ones(8, 8), "bias": torch.ones(8)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    with onednn_linear("on", nn.Identity()):
        nn.functional.linear(**tensors).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_gradients_of_gradients_are_those_of_torch() -> None:
    layer, x = nn.Linear(8, 8), torch.linspace(-1, 1, 80 * 8).reshape(80, 8).requires_grad_()

    def penalty() -> tuple[torch.Tensor, ...]:
        (slope,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, layer.weight])

    expected = penalty()
    with onednn_linear("on", layer):
        for one, other in zip(penalty(), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_strided_inputs_and_weights() -> None:
    x, weight = torch.randn(24, 2, 70).transpose(0, 2), torch.randn(24, 40).t()
    with onednn_linear("on", nn.Identity()):
        assert products(lambda: nn.functional.linear(x, weight)) == 1
        actual = nn.functional.linear(x, weight)
    torch.testing.assert_close(actual, nn.functional.linear(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(LEAST_ROWS - 1, 8), torch.ones(8, 8)),
        (torch.ones(8), torch.ones(8, 8)),
        (torch.ones(0, 8), torch.ones(8, 8)),
        (torch.ones(80, 8, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64)),
        (torch.ones(80, 8, dtype=torch.bfloat16), torch.ones(8, 8, dtype=torch.bfloat16)),
        (torch.ones(80, 8, device="meta"), torch.ones(8, 8, device="meta")),
        (torch.ones(80, 8), torch.ones(8)),
    ],
    ids=["few rows", "a vector", "no rows", "float64", "bfloat16", "meta", "a vector as weight"],
)
def test_anything_else_goes_on_as_it_would(x: torch.Tensor, weight: torch.Tensor) -> None:
    with onednn_linear("on", nn.Identity()):
        assert products(lambda: nn.functional.linear(x, weight)) == 0


def test_wrong_shapes_are_still_torchs_error() -> None:
    with onednn_linear("on", nn.Identity()), pytest.raises(RuntimeError):
        nn.functional.linear(torch.ones(80, 7), torch.ones(8, 8))


@pytest.mark.parametrize("folder", ["tiny_sailer", "tiny_speech_sailer"])
def test_a_systems_outputs_are_the_same(folder: str, request: pytest.FixtureRequest) -> None:
    plain, inputs = system(request.getfixturevalue(folder), "off")
    fast, _ = system(request.getfixturevalue(folder), "on")
    with torch.inference_mode():
        assert products(lambda: plain(**inputs)) == 0
        towers = [fast.sailer.audio_encoder, fast.sailer.text_encoder or nn.Identity()]
        linear = sum(isinstance(module, nn.Linear) for tower in towers for module in tower.modules())
        assert products(lambda: fast(**inputs)) == linear > 0
        as_before(fast(**inputs), plain(**inputs))


def test_training_a_tower_takes_the_same_step(tiny_sailer: Path) -> None:
    gradients = {}
    for choice in ("off", "on"):
        model = SailerForAudioClassification.from_pretrained(
            tiny_sailer, freeze_audio=False, trainable_audio_layers=1, onednn_linear=choice
        )
        inputs = system(tiny_sailer, choice)[1]

        def step(model: nn.Module = model, inputs: dict = inputs) -> None:
            model.zero_grad()
            model(**inputs, labels=torch.full((2, 9), 1 / 9)).loss.backward()

        assert (products(step) > 6 * 3) == (choice == "on")
        gradients[choice] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("audio_encoder" in name for name in gradients["on"])
    as_before(gradients["on"], gradients["off"])


def test_gradient_checkpointing_does_without(tiny_sailer: Path) -> None:
    model, inputs = system(tiny_sailer, "on")
    trained = SailerForAudioClassification.from_pretrained(tiny_sailer, freeze_audio=False, onednn_linear="on").train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    for part in trained.sailer.audio_encoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    trained(**inputs, labels=torch.full((2, 9), 1 / 9)).loss.backward()
    assert all(p.grad is not None for p in trained.sailer.audio_encoder.layers.parameters())
    with torch.no_grad():
        assert products(lambda: trained(**inputs)) == products(lambda: model(**inputs)) > 0


@pytest.mark.parametrize("precision", ["autocast", "bfloat16", "torch's own switch"])
def test_what_is_not_plain_float32_does_without(precision: str, tiny_speech_sailer: Path) -> None:
    model, inputs = system(tiny_speech_sailer, "auto" if "switch" in precision else "on")
    around = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "torch's own switch": lambda: torch.backends.mkldnn.flags(enabled=False),
    }.get(precision, nullcontext)
    if precision == "bfloat16":
        model = model.to(torch.bfloat16)
        inputs["input_features"] = inputs["input_features"].to(torch.bfloat16)
    with torch.inference_mode(), around():
        assert products(lambda: model(**inputs)) == 0


def test_quantised_layers_stay_quantised(tiny_speech_sailer: Path) -> None:
    model, inputs = system(tiny_speech_sailer, "on")
    with pytest.warns(DeprecationWarning):
        quantised = torch.ao.quantization.quantize_dynamic(model.sailer, {nn.Linear}, torch.qint8)
    with torch.inference_mode():
        assert products(lambda: quantised(**inputs)) == 0


def test_copies_pickles_and_saved_files_know_nothing_of_it(tiny_speech_sailer: Path, tmp_path: Path) -> None:
    model, inputs = system(tiny_speech_sailer, "on")
    with torch.inference_mode():
        expected = model(**inputs)
        assert {type(part) for part in model.modules() if isinstance(part, nn.Linear)} == {nn.Linear}
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.state_dict().keys() == model.state_dict().keys()
            as_before(twin(**inputs), expected)
    model.save_pretrained(tmp_path)
    assert "onednn" not in (tmp_path / "config.json").read_text()
    assert SailerConfig.from_pretrained(tmp_path).onednn_linear == "auto"


def test_lora_is_trained_and_merged_as_ever(tiny_speech_sailer: Path) -> None:
    peft = pytest.importorskip("peft")
    results = []
    for choice in ("off", "on"):
        model, inputs = system(tiny_speech_sailer, choice)
        torch.manual_seed(0)
        options = peft.LoraConfig(r=2, target_modules=r".*audio_encoder.*fc1", init_lora_weights=False)
        adapted = peft.get_peft_model(model, options)
        adapted.base_model.model.sailer.config.freeze_audio = False
        loss = adapted(**inputs, labels=torch.full((2, 9), 1 / 9)).loss
        loss.backward()
        of_lora = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
        with torch.inference_mode():
            merged = adapted.merge_and_unload()
            results.append([loss.detach(), *of_lora, merged(**inputs).logits])
    assert len(results[0]) > 2 and results[0][1].abs().max() > 0
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


class Tower(nn.Module):
    """A tower as `SailerModel` runs it, with nothing else that could keep a graph from being made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with onednn_linear("on", self.layer):
            return self.layer(x).relu()


@pytest.mark.parametrize("way", ["compile", "export", "strict export", "trace"])
def test_graphs_have_nothing_of_it(way: str) -> None:
    tower, x = Tower().eval(), torch.randn(80, 8)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(str(graph.graph))
        return graph.forward

    assert products(lambda: tower(x)) == 1
    if way == "compile":
        made = torch.compile(tower, fullgraph=True, dynamic=True, backend=backend)
    elif way == "trace":
        made = torch.jit.trace(tower, x)
        graphs.append(str(made.inlined_graph))
    else:
        rows = torch.export.Dim("rows", min=2, max=1000)
        program = torch.export.export(tower, (x,), dynamic_shapes=({0: rows},), strict=way.startswith("strict"))
        made = program.module()
        graphs.append(str(program.graph))
    torch.testing.assert_close(made(x), tower(x), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1 and "linear" in graphs[0] and "mkldnn" not in graphs[0]


def test_a_compiled_part_inside_has_nothing_of_it() -> None:
    tower, x, graphs = Tower().eval(), torch.randn(80, 8), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(str(graph.graph))
        return graph.forward

    with torch.no_grad():
        expected = tower(x)
        tower.layer = torch.compile(tower.layer, fullgraph=True, backend=backend)
        torch.testing.assert_close(tower(x), expected, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1 and "mkldnn" not in graphs[0]


def test_function_transforms_do_without() -> None:
    tower, x = Tower(), torch.randn(3, 80, 8)
    torch.testing.assert_close(torch.func.vmap(tower)(x), tower(x), atol=1e-5, rtol=1e-5)
    slope = torch.func.grad(lambda x: tower(x).sum())(x)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(slope, torch.autograd.grad(tower(leaf).sum(), leaf)[0], atol=1e-5, rtol=1e-5)


def test_it_holds_for_its_own_thread_alone(tiny_speech_sailer: Path) -> None:
    layer, x = nn.Linear(8, 8), torch.ones(80, 8)
    with profile() as seen, onednn_linear("on", layer), ThreadPoolExecutor(1) as pool:
        pool.submit(layer, x).result()
    assert "mkldnn::_linear_pointwise" not in {event.key for event in seen.key_averages()}
    pipelines = [
        SpeechEmotionPipeline(
            SailerForAudioClassification.from_pretrained(tiny_speech_sailer, onednn_linear=choice),
            SailerProcessor.from_pretrained(tiny_speech_sailer),
            device="cpu",
        )
        for choice in ("on", "off")
    ]
    clips = [noise(1.4 + 0.1 * seed, seed) for seed in range(6)]
    embedding = [pipelines[1](clip, return_all=True)["embedding"] for clip in clips]
    with ThreadPoolExecutor(4) as pool:
        runs = [(pipelines[turn % 2], turn % 6) for turn in range(24)]
        results = list(pool.map(lambda run: run[0](clips[run[1]], return_all=True)["embedding"], runs))
    for (_, clip), result in zip(runs, results, strict=True):
        np.testing.assert_allclose(result, embedding[clip], atol=1e-5)
    assert torch.overrides._get_current_function_mode() is None


def test_an_error_inside_leaves_nothing_behind() -> None:
    with pytest.raises(ZeroDivisionError), onednn_linear("on", nn.Identity()):
        1 / 0  # noqa: B018
    assert torch.overrides._get_current_function_mode() is None


# Which is taken


@pytest.mark.parametrize("wish", ["on", "off"])
def test_the_environment_says_what_auto_means(wish: str, monkeypatch: pytest.MonkeyPatch, tiny_speech_sailer) -> None:
    monkeypatch.setenv("SAILER_ONEDNN", wish)
    for choice, expected in (("auto", wish == "on"), ("on", True), ("off", False)):
        model, inputs = system(tiny_speech_sailer, choice)
        with torch.inference_mode():
            assert (products(lambda: model(**inputs)) > 0) == expected  # noqa: B023


def test_an_encoder_that_asks_by_itself_is_heard_only_where_nobody_else_has_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAILER_ONEDNN", "on")
    config = Emotion2VecConfig(
        hidden_size=16, num_hidden_layers=1, prenet_layers=0, num_attention_heads=2, intermediate_size=32
    )
    encoder, waveform = Emotion2VecModel(config).eval(), torch.randn(1, 16000 * 2)
    with torch.inference_mode():
        assert products(lambda: encoder(waveform)) == 6  # four of the attention, two of the feed-forward
        with onednn_linear("off", encoder):
            assert products(lambda: encoder(waveform)) == 0
        assert products(lambda: encoder(waveform)) == 6


def test_unknown_choices_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"onednn_linear.*'yes'.*'auto', 'on', 'off'"):
        SailerConfig(onednn_linear="yes")
    with pytest.raises(ValueError, match=r"onednn_linear is 'yes'"):
        onednn_linear("yes", nn.Identity())
    monkeypatch.setenv("SAILER_ONEDNN", "1")
    with pytest.raises(ValueError, match=r"SAILER_ONEDNN is '1'; choose one of \['auto', 'on', 'off'\]"):
        onednn_linear("auto", nn.Identity())


def test_on_without_onednn_says_so() -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        with onednn_linear("auto", nn.Identity()):
            assert torch.overrides._get_current_function_mode() is None
        with pytest.raises(RuntimeError, match="set it to 'auto'"):
            onednn_linear("on", nn.Identity())


def test_measuring_leaves_the_seed_alone_and_happens_once() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    gain = measured_gain()
    assert torch.equal(torch.rand(4), expected)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: measured_gain(), range(8))) == {gain}


CHOSEN = """
import sys
import torch
from torch import nn
from sailer import linear_sailer
least = linear_sailer.LEAST_GAIN
for raised in sys.argv[1:]:
    linear_sailer.LEAST_GAIN = least * float(raised)
    with linear_sailer.onednn_linear("auto", nn.Identity()):
        print(linear_sailer.measured_gain(), type(torch.overrides._get_current_function_mode()).__name__)
"""


def test_auto_takes_onednn_where_it_is_measured_to_be_faster() -> None:
    # Where MKL can be held to SSE4.2 (on Intel's processors), the gain is one that nobody has to raise or lower.
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "1"}
    raised = (1e-3, 1.0, 1e3)
    command = [sys.executable, "-c", CHOSEN, *map(str, raised)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = [line.split() for line in done.stdout.splitlines()]
    assert [chosen == "_OneDNNLinear" for _, chosen in told] == [
        float(gain) >= LEAST_GAIN * factor for (gain, _), factor in zip(told, raised, strict=True)
    ]
