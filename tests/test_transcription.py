"""Missing transcripts filled, marked as machine-made, and resumed where a run was stopped."""

import io
import json

import numpy as np
import pytest
import soundfile

from sailer.data import CorpusError
from sailer.data.schema import build_dataset
from sailer.data.transcription import fill_transcripts, read_transcripts


def recording(level, seconds=0.2, rate=8000):
    file = io.BytesIO()
    soundfile.write(file, np.full(int(rate * seconds), level), rate, format="WAV", subtype="FLOAT")
    return {"path": None, "bytes": file.getvalue()}


@pytest.fixture
def corpus():
    train = {
        "id": ["a", "b", "c", "d"],
        "audio": [recording(0.1), recording(0.2), None, recording(0.4)],
        "transcript": ["spoken", "", "", ""],
    }
    test = {"id": ["a"], "audio": [recording(0.5)]}
    return {"train": build_dataset(train), "test": build_dataset(test)}


class Listener:
    """Says how loud a clip is, and keeps what it was asked."""

    def __init__(self, stop_after=None):
        self.heard, self.options, self.stop_after = [], [], stop_after

    def __call__(self, inputs, **options):
        assert all(entry["sampling_rate"] == 16000 and entry["raw"].dtype == np.float32 for entry in inputs)
        if self.stop_after is not None and len(self.heard) >= self.stop_after:
            raise KeyboardInterrupt
        levels = [round(float(np.median(entry["raw"])), 1) for entry in inputs]
        self.heard += levels
        self.options.append(options)
        return [{"text": f"  level\n{level} "} for level in levels]


def test_only_missing_transcripts_of_clips_with_a_recording_are_filled(tmp_path, corpus):
    listener = Listener()
    filled, made = fill_transcripts(corpus, listener, tmp_path / "transcripts.jsonl")
    assert list(filled["train"]["transcript"]) == ["spoken", "level 0.2", "", "level 0.4"]
    assert list(filled["test"]["transcript"]) == ["level 0.5"]
    assert made == {"train": 2, "test": 1} and listener.heard == [0.2, 0.4, 0.5]
    assert filled["train"].features == corpus["train"].features
    assert filled["train"][1]["audio"] == corpus["train"][1]["audio"]
    lines = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert lines[0] == {"split": "train", "id": "b", "transcript": "level 0.2", "transcriber": "Listener"}
    assert read_transcripts(tmp_path / "transcripts.jsonl") == {
        **{("train", "b"): "level 0.2", ("train", "d"): "level 0.4", ("test", "a"): "level 0.5"}
    }


def test_a_stopped_run_goes_on_where_it_was(tmp_path, corpus):
    file = tmp_path / "out" / "transcripts.jsonl"
    with pytest.raises(KeyboardInterrupt):
        fill_transcripts(corpus, Listener(stop_after=1), file, batch_size=1)
    assert set(read_transcripts(file)) == {("train", "b")}
    # The line that was being written when the run was stopped.
    with open(file, "a") as stream:
        stream.write('{"split": "train", "id": "d", "tran')
    second = Listener()
    _, made = fill_transcripts(corpus, second, file)
    assert second.heard == [0.4, 0.5] and made == {"train": 2, "test": 1}
    third = Listener()
    filled, made = fill_transcripts(corpus, third, file)
    assert third.heard == [] and made == {"train": 2, "test": 1}
    assert list(filled["train"]["transcript"]) == ["spoken", "level 0.2", "", "level 0.4"]
    assert len(file.read_text().splitlines()) == 3


def test_clips_in_which_nothing_was_heard_are_not_asked_again(tmp_path, corpus):
    def deaf(inputs, **_):
        return [{"text": ""} for _ in inputs]

    _, made = fill_transcripts(corpus, deaf, tmp_path / "transcripts.jsonl")
    assert made == {"train": 0, "test": 0}

    def deaf(inputs, **_):
        raise AssertionError("asked again")

    fill_transcripts(corpus, deaf, tmp_path / "transcripts.jsonl")
    # Another transcriber may hear more.
    assert fill_transcripts(corpus, Listener(), tmp_path / "transcripts.jsonl")[1] == {"train": 2, "test": 1}


def test_windows_only_for_long_clips_and_options_are_passed_on(tmp_path):
    rows = {"train": build_dataset({"id": ["short", "long"], "audio": [recording(0.1), recording(0.2, 31)]})}
    listener = Listener()
    fill_transcripts(rows, listener, tmp_path / "t.jsonl", batch_size=1, generate_kwargs={"language": "en"})
    common = {"batch_size": 1, "generate_kwargs": {"language": "en"}}
    assert listener.options == [common, {**common, "chunk_length_s": 30}]


def test_what_is_refused(tmp_path, corpus):
    (tmp_path / "broken.jsonl").write_text('{"split": "train"}\n')
    with pytest.raises(CorpusError, match=r"broken.jsonl, line 1: .* is no transcript. Remove the line"):
        fill_transcripts(corpus, Listener(), tmp_path / "broken.jsonl")
    with pytest.raises(CorpusError, match=r"The transcriber .*nowhere cannot be loaded"):
        fill_transcripts(corpus, str(tmp_path / "nowhere"), tmp_path / "t.jsonl")
    rows = {"train": build_dataset({"id": ["a"], "audio": [{"path": str(tmp_path / "gone.wav"), "bytes": None}]})}
    with pytest.raises(CorpusError, match=r"Clip 'a' cannot be transcribed: .*gone.wav"):
        fill_transcripts(rows, Listener(), tmp_path / "t.jsonl")


def test_with_a_speech_recognition_model(tmp_path, corpus):
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder = tmp_path / "recogniser"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}))
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            vocab_size=5,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            conv_dim=[8, 8],
            conv_stride=[10, 16],
            conv_kernel=[10, 16],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    )
    # Whatever it hears, it says "a".
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0])
    model.save_pretrained(folder)
    Wav2Vec2CTCTokenizer(folder / "vocab.json", pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    filled, made = fill_transcripts(corpus, str(folder), tmp_path / "transcripts.jsonl", device="cpu")
    assert list(filled["train"]["transcript"]) == ["spoken", "a", "", "a"] and made == {"train": 2, "test": 1}
    assert json.loads((tmp_path / "transcripts.jsonl").read_text().splitlines()[0])["transcriber"] == str(folder)
