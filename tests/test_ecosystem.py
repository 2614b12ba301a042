"""The habits of transformers' users: fine-tuning by stock means, options of loading and calling, stock processors."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from sailer import SailerConfig, SailerForAudioClassification, SailerModel, SailerProcessor, SpeechEmotionPipeline

RATE = 16000
TWO = {"num_labels": 2, "id2label": {0: "calm", 1: "angry"}, "label2id": {"calm": 0, "angry": 1}}


def tone(seconds: float, hertz: float = 200.0) -> np.ndarray:
    times = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * hertz * times) * np.sin(3 * times)).astype(np.float32)


@pytest.fixture
def inputs(tiny_sailer: Path) -> dict[str, torch.Tensor]:
    processor = SailerProcessor.from_pretrained(tiny_sailer)
    return dict(processor(audio=[tone(1.0), tone(0.6, 350)], text=["i am so happy", ""], sampling_rate=RATE))


# New labels and heads on an old checkpoint


def test_new_labels_on_an_old_checkpoint_go_all_the_way_round(tiny_sailer, inputs, tmp_path) -> None:
    from transformers import pipeline

    model = SailerForAudioClassification.from_pretrained(tiny_sailer, **TWO, ignore_mismatched_sizes=True)
    assert model.config.labels == ["calm", "angry"] and model.config.scored_labels == ["calm", "angry"]
    assert model.config.majority_labels == [] and model.config.label_weights is None
    old = SailerForAudioClassification.from_pretrained(tiny_sailer)
    torch.testing.assert_close(model.heads["secondary"][0].weight, old.heads["secondary"][0].weight)
    assert model(**inputs).logits.shape == (2, 2)
    model.save_pretrained(tmp_path)
    SailerProcessor.from_pretrained(tiny_sailer).save_pretrained(tmp_path)
    again = SailerForAudioClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits)
    result = pipeline(model=str(tmp_path), trust_remote_code=True)({"audio": tone(1.0), "text": "so happy"})
    assert {row["label"] for row in result} == {"calm", "angry"}


@pytest.mark.parametrize("options", [{"num_labels": 2}, {"labels": ["calm", "angry"]}, {"id2label": TWO["id2label"]}])
def test_labels_are_replaced_whichever_option_names_them(options: dict, tiny_sailer: Path) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer, **options, ignore_mismatched_sizes=True)
    expected = ["LABEL_0", "LABEL_1"] if "num_labels" in options else ["calm", "angry"]
    assert model.config.labels == model.config.scored_labels == expected
    assert model.config.label2id == {label: index for index, label in enumerate(expected)}


def test_what_the_weights_meant_does_not_survive_other_labels(tiny_sailer: Path, tmp_path: Path) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer)
    model.config.label_weights, model.config.label_prior = [1.0] * 9, [1 / 9] * 9
    model.config.target_weighting, model.config.calibration_temperature = "product", 2.0
    model.save_pretrained(tmp_path)
    kept = SailerConfig.from_pretrained(tmp_path, id2label=dict(enumerate(model.config.labels)))
    assert kept.label_weights == [1.0] * 9 and kept.calibration_temperature == 2.0  # the same labels: nothing is lost
    other = SailerConfig.from_pretrained(tmp_path, num_labels=2)
    assert other.label_weights is None and other.label_prior is None
    assert other.target_weighting == "none" and other.calibration_temperature == 1.0


def test_numbers_of_labels_that_contradict_each_other_are_refused(tiny_sailer: Path) -> None:
    with pytest.raises(ValueError, match=r"num_labels is 3.*2 labels"):
        SailerConfig.from_pretrained(tiny_sailer, num_labels=3, id2label={0: "a", 1: "b"})


def test_other_labels_without_ignoring_sizes_say_what_to_add(tiny_sailer: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match="ignore_mismatched_sizes"):
        SailerForAudioClassification.from_pretrained(tiny_sailer, **TWO)


def test_labels_changed_behind_the_configurations_back_are_named_before_they_do_harm(tiny_sailer: Path) -> None:
    config = SailerConfig.from_pretrained(tiny_sailer)
    config.id2label = {0: "calm", 1: "angry"}
    with pytest.raises(ValueError, match=r"majority_labels.*Angry.*labels="):
        SailerForAudioClassification(config)


def test_new_heads_on_an_old_checkpoint(tiny_speech_sailer: Path, tiny_sailer: Path, tmp_path: Path, caplog) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer, heads=["primary", "attributes", "age"])
    old = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    torch.testing.assert_close(model.heads["primary"][0].weight, old.heads["primary"][0].weight)
    assert {"arousal", "valence", "dominance", "age"} < set(model.heads)
    assert model.heads["age"][0].weight.abs().sum() > 0
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        SailerForAudioClassification.from_pretrained(tmp_path).heads["age"][0].weight, model.heads["age"][0].weight
    )


def test_a_head_that_the_checkpoint_should_have_is_still_missed(tiny_speech_sailer: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "heads.primary" not in k}, tmp_path / "model.safetensors")
    for options in ({}, {"heads": ["primary", "age"]}):
        with pytest.raises(ValueError, match=r"lack.*heads\.primary"):
            SailerForAudioClassification.from_pretrained(tmp_path, **options)


# Labels of a forward call


def test_class_ids_are_the_plain_cross_entropy(tiny_sailer: Path, inputs) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    two = model(**inputs, labels=torch.tensor([3, -100]))
    expected = torch.nn.functional.cross_entropy(two.logits, torch.tensor([3, -100]))
    torch.testing.assert_close(two.loss, expected)
    one_hot = torch.nn.functional.one_hot(torch.tensor([3]), 9).float()
    first = {name: value[:1] for name, value in inputs.items()}
    torch.testing.assert_close(model(**first, labels=torch.tensor([3])).loss, model(**first, labels=one_hot).loss)
    nine = {name: value[:1].expand(9, *value.shape[1:]) for name, value in inputs.items()}
    ids = torch.arange(9)
    torch.testing.assert_close(
        model(**nine, labels=ids).loss, torch.nn.functional.cross_entropy(model(**nine).logits, ids)
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 3), r"labels has the shape \(2, 3\).*\(2, 9\).*\(2,\)"),
        (torch.zeros(2), r"labels has the shape \(2,\).*whole numbers"),
        (torch.tensor([0, 9]), "class 9.*0 to 8"),
        (torch.tensor([0, -1]), "class -1.*-100"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels, message: str, tiny_sailer: Path, inputs) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    with pytest.raises(ValueError, match=message):
        model(**inputs, labels=labels)


@pytest.fixture
def two_classes(tiny_speech_sailer: Path, tmp_path: Path) -> Path:
    """The speech-only system with two fresh labels and no dropout, saved."""
    torch.manual_seed(0)
    options = {**TWO, "conv_dropout": 0.0, "ignore_mismatched_sizes": True}
    model = SailerForAudioClassification.from_pretrained(tiny_speech_sailer, **options)
    model.save_pretrained(tmp_path / "two")
    SailerProcessor.from_pretrained(tiny_speech_sailer).save_pretrained(tmp_path / "two")
    return tmp_path / "two"


def stock_trainer(folder: Path, **options) -> Trainer:
    model, processor = SailerForAudioClassification.from_pretrained(folder), SailerProcessor.from_pretrained(folder)

    def collate(rows: list[dict]) -> dict:
        batch = processor(audio=[row["audio"] for row in rows], sampling_rate=RATE)
        return {**batch, "labels": torch.tensor([row["label"] for row in rows])}

    rows = [{"audio": tone(0.3 + 0.1 * (i % 3), 150 + 200 * (i % 2)), "label": int(i % 6 == 0)} for i in range(12)]
    settings = {"report_to": "none", "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder.parent / "trained"), **settings, **options)
    return Trainer(model, arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)


def test_stock_trainer_trains_and_reports_an_evaluation_loss(two_classes: Path) -> None:
    trainer = stock_trainer(two_classes, num_train_epochs=8, learning_rate=3e-3, per_device_train_batch_size=4)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.predictions[0].shape == (12, 2)
    # The loss that it reports is that of the predictions themselves.
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(prediction.predictions[0]), torch.from_numpy(prediction.label_ids)
    )
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(expected.item(), rel=1e-3)
    assert after < before - 0.05  # at least the classes' shares can be learned


def test_stock_accumulation_takes_the_same_steps(two_classes: Path) -> None:
    weights = []
    for size, steps in ((4, 1), (2, 2)):
        options = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "max_grad_norm": 0.0}
        trainer = stock_trainer(
            two_classes, max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options
        )
        start = trainer.model.heads["primary"][0].weight.detach().clone()
        trainer.train()
        weights.append(trainer.model.heads["primary"][0].weight.detach())
        assert (weights[-1] - start).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


# Options of loading and calling


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_half_precision_by_either_name(name: str, tiny_sailer: Path, inputs) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer, **{name: torch.bfloat16}).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    whole = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    # Over different clips the logits of this system deviate by 1.
    torch.testing.assert_close(model(**inputs).logits.float(), whole(**inputs).logits, atol=0.3, rtol=0)


def test_return_dict_false_gives_a_tuple(tiny_sailer: Path, inputs) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    whole = model(**inputs)
    values = model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    for value, expected in zip(values, whole.to_tuple(), strict=True):
        torch.testing.assert_close(value, expected)
    assert isinstance(model.sailer(**inputs, return_dict=False), tuple)
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


@pytest.mark.parametrize("audio_layers", ["last", "weighted"])
@pytest.mark.parametrize("audio", ["tiny_whisper", "tiny_wavlm"])
def test_hidden_states_are_the_speech_encoders(audio: str, audio_layers: str, request, tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor

    folder = request.getfixturevalue(audio)
    model = SailerForAudioClassification.from_audio_text_pretrained(folder, audio_layers=audio_layers).eval()
    processor = SailerProcessor(AutoFeatureExtractor.from_pretrained(folder))
    inputs = dict(processor(audio=[tone(1.0), tone(0.6)], sampling_rate=RATE))
    plain, told = model(**inputs), model(**inputs, output_hidden_states=True)
    assert plain.hidden_states is None
    assert len(told.hidden_states) == model.config.audio_config.num_hidden_layers + 1
    torch.testing.assert_close(told.logits, plain.logits)
    last, mask = model.sailer.audio_hidden_states(inputs[model.main_input_name], inputs["attention_mask"])
    last = last if audio_layers == "last" else last[:, -1]
    own = mask.bool()
    torch.testing.assert_close(told.hidden_states[-1][own], last[own])
    model.config.output_hidden_states = True
    assert model(**inputs).hidden_states is not None


def test_what_cannot_be_returned_says_so(tiny_sailer: Path, inputs) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    with pytest.raises(TypeError, match=r"secondary_lables.*did you mean 'secondary_labels'"):
        model(**inputs, secondary_lables=torch.zeros(2, 17))
    states, mask = model.sailer.audio_hidden_states(inputs["input_features"], inputs["attention_mask"])
    kept = {**{k: v for k, v in inputs.items() if k != "input_features"}, "attention_mask": mask}
    with pytest.raises(ValueError, match="output_hidden_states"):
        model(**kept, audio_hidden_states=states, output_hidden_states=True)


def test_input_embeddings_are_the_text_towers(tiny_sailer: Path, tiny_speech_sailer: Path) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer)
    assert model.get_input_embeddings() is model.sailer.text_encoder.get_input_embeddings()
    speech = SailerForAudioClassification.from_pretrained(tiny_speech_sailer)
    with pytest.raises(NotImplementedError, match="speech-only"):
        speech.get_input_embeddings()


def test_weights_on_disk_give_the_same(tiny_sailer: Path, inputs, tmp_path: Path) -> None:
    whole = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    places = {f"sailer.{name}": "cpu" for name, _ in whole.sailer.named_children()} | {"heads": "cpu"}
    places |= {"sailer.audio_encoder": "disk", "sailer.text_encoder": "disk"}
    model = SailerForAudioClassification.from_pretrained(
        tiny_sailer, device_map=places, offload_folder=tmp_path
    ).eval()
    assert model.sailer.audio_encoder.layers[0].fc1.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)


def test_cpu_offload_gives_the_same(tiny_sailer: Path, inputs) -> None:
    from accelerate import cpu_offload

    whole = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    model = cpu_offload(copy.deepcopy(whole), execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)


def test_device_map_auto_splits_no_layer(tiny_sailer: Path, inputs) -> None:
    model = SailerForAudioClassification.from_pretrained(tiny_sailer, device_map="auto").eval()
    whole = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, whole(**inputs).logits)
    assert {"WhisperEncoderLayer"} <= set(model._no_split_modules)


# The processor


def test_the_processor_is_read_by_many_threads_at_once(tiny_sailer: Path) -> None:
    processor = SailerProcessor.from_pretrained(tiny_sailer)
    clip = tone(0.3)

    def work(number: int) -> bool:
        if number % 3:
            return processor.to_dict()["uses_text"] and "tokenizer" not in processor.to_dict()
        return processor(audio=clip, text="so happy", sampling_rate=RATE)["input_ids"].shape[0] == 1

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(600)))
    assert processor.tokenizer is not None


def test_the_processor_takes_paths_and_dicts(tiny_sailer: Path, tmp_path: Path, caplog, monkeypatch) -> None:
    import soundfile

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    processor = SailerProcessor.from_pretrained(tiny_sailer)
    soundfile.write(tmp_path / "clip.wav", tone(1.0), RATE, subtype="FLOAT")
    expected = processor(audio=tone(1.0), text="so happy", sampling_rate=RATE)
    path, with_rate = tmp_path / "clip.wav", {"array": tone(1.0), "sampling_rate": RATE}
    for audio in (path, str(path), [str(path)], path.read_bytes(), with_rate, [with_rate]):
        given = processor(audio=audio, text="so happy", sampling_rate=RATE)
        torch.testing.assert_close(given["input_features"], expected["input_features"])
    caplog.clear()
    processor(audio=[path, with_rate], text=["", ""])  # each has its own rate: nothing to warn of
    assert "sampling" not in caplog.text
    processor(audio=[path, tone(1.0)], text=["", ""])
    assert "sampling" in caplog.text


def test_processor_options_that_stock_code_passes(tiny_sailer: Path) -> None:
    processor = SailerProcessor.from_pretrained(tiny_sailer)
    clips, text = [tone(1.0), tone(0.6)], ["so happy", "leave me alone"]
    expected = processor(audio=clips, text=text, sampling_rate=RATE)
    for options in ({"padding": True}, {"padding": "longest"}, {"return_attention_mask": True}):
        given = processor(audio=clips, text=text, sampling_rate=RATE, **options)
        assert given.keys() == expected.keys()
        torch.testing.assert_close(given["input_features"], expected["input_features"])
    for option, value in (("padding", "max_length"), ("padding", False), ("return_attention_mask", False)):
        with pytest.raises(ValueError, match=option):
            processor(audio=clips, text=text, sampling_rate=RATE, **{option: value})
    with pytest.raises(TypeError, match="truncate"):
        processor(audio=clips, text=text, sampling_rate=RATE, truncate=True)


def test_the_base_model_loads_from_a_classifiers_folder(tiny_sailer: Path, inputs) -> None:
    base = SailerModel.from_pretrained(tiny_sailer).eval()
    whole = SailerForAudioClassification.from_pretrained(tiny_sailer).eval()
    torch.testing.assert_close(base(**inputs).embeddings, whole(**inputs).embeddings)


def test_a_function_to_apply_as_stock_pipelines_name_it(tiny_sailer: Path, inputs) -> None:
    model, processor = (
        SailerForAudioClassification.from_pretrained(tiny_sailer),
        SailerProcessor.from_pretrained(tiny_sailer),
    )
    classifier = SpeechEmotionPipeline(model, processor)
    item = {"audio": tone(1.0), "text": "i am so happy"}
    raw = {row["label"]: row["score"] for row in classifier(item, function_to_apply="none")}
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert raw == pytest.approx(dict(zip(model.config.labels, logits.tolist(), strict=True)), abs=1e-4)
    soft = classifier(item, function_to_apply="softmax")
    assert soft == classifier(item)
    probabilities = torch.tensor([raw[row["label"]] for row in soft]).softmax(0)
    assert [row["score"] for row in soft] == pytest.approx(probabilities.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match=r"function_to_apply is 'sigmoid'; choose one of \['softmax', 'none'\]"):
        classifier(item, function_to_apply="sigmoid")
