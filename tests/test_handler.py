"""handler.py of a pushed system, called as Inference Endpoints call it; in the slow test without the package."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from sailer.hub.publishing import HANDLER, push

# What the endpoint's server does (huggingface-inference-toolkit): it loads handler.py from the repository's folder,
# reads a request's body by its type, adds the query's options where the body has none, and answers with JSON.
SERVER = """
import importlib.util, json, sys
try:
    import sailer
except ImportError:
    pass
else:
    raise SystemExit("the sailer package is visible here: this would prove nothing")
folder, requests = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder + "/handler.py")
sys.path.insert(0, folder)
handler = importlib.util.module_from_spec(spec)
sys.modules["handler.EndpointHandler"] = handler
spec.loader.exec_module(handler)
endpoint = handler.EndpointHandler(folder)
answers = []
for kind, path, query in json.loads(open(requests).read()):
    body = open(path, "rb").read()
    try:
        data = json.loads(body) if kind == "application/json" else {"inputs": bytes(body)}
        if query and "parameters" not in data:
            values = {"true": True, "false": False}
            data["parameters"] = {k: int(v) if v.isnumeric() else values.get(v, v) for k, v in query.items()}
        answers.append([200, json.loads(json.dumps(endpoint(data)))])
    except Exception as error:
        answers.append([400, {"error": str(error)}])
print(json.dumps(answers))
"""


def wav(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def handler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", HANDLER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def endpoint(handler: ModuleType, tiny_sailer: Path) -> Any:
    return handler.EndpointHandler(str(tiny_sailer))


@pytest.fixture(scope="module")
def clip(different_clips: list[np.ndarray]) -> bytes:
    return wav(different_clips[0])


def test_every_form_of_a_recording_gives_the_pipeline_s_answer(endpoint, clip, different_clips, tiny_sailer) -> None:
    from transformers import pipeline

    classifier = pipeline(model=str(tiny_sailer), trust_remote_code=True)
    expected = classifier({"audio": clip, "text": "so happy"}, top_k=3)
    other = classifier({"audio": wav(different_clips[1]), "text": "so happy"}, top_k=3)
    assert expected != other
    array = {"array": different_clips[0].tolist(), "sampling_rate": 16000}
    for audio in (clip, text_of(clip), f"data:audio/wav;base64,{text_of(clip)}", array, bytearray(clip)):
        data = {"inputs": {"audio": audio, "text": "so happy"}, "parameters": {"top_k": 3}}
        found = endpoint(data)
        assert [score["label"] for score in found] == [score["label"] for score in expected]
        np.testing.assert_allclose(
            [score["score"] for score in found], [score["score"] for score in expected], atol=1e-6
        )
        assert json.loads(json.dumps(found)) == found
    both = [{"audio": text_of(clip), "transcript": "so happy"}, {"audio": wav(different_clips[1]), "text": "so happy"}]
    answers = endpoint({"inputs": both, "parameters": {"top_k": "3"}})
    assert [answer[0]["label"] for answer in answers] == [expected[0]["label"], other[0]["label"]]


def test_all_of_an_answer_is_json(endpoint, clip) -> None:
    data = {"inputs": {"audio": clip, "text": "so happy"}, "parameters": {"return_all": True, "prior": "balanced"}}
    found = endpoint(data)
    assert json.loads(json.dumps(found)) == found
    assert {"primary", "label", "secondary", "attributes", "embedding"} <= set(found)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "The request has no inputs: send the recording"),
        ({"inputs": None}, "The request has no inputs"),
        ([], "The request has no inputs"),
        ({"inputs": []}, "inputs is an empty list"),
        ({"inputs": b""}, "inputs is empty"),
        ({"inputs": ""}, "inputs is empty"),
        ({"inputs": "/etc/passwd"}, r"inputs is a text that is no base64 \(paths and addresses are not read\)"),
        ({"inputs": {"audio": "/etc/abc", "text": "x"}}, "not readable audio"),  # which happens to be base64
        ({"inputs": "clip.wav"}, r"inputs is a text that is no base64 \(paths and addresses are not read\)"),
        ({"inputs": "http://localhost/clip.wav"}, "inputs is a text that is no base64"),
        ({"inputs": {"audio": "../clip.wav", "text": "x"}}, "inputs.audio is a text that is no base64"),
        ({"inputs": [{"audio": "file:///x.wav"}]}, r"inputs\[0\].audio is a text that is no base64"),
        ({"inputs": {"path": "/etc/passwd"}}, "inputs is no recording"),
        ({"inputs": {"audio": b"RIFF", "path": "/etc/passwd"}}, "inputs has 'path'"),
        ({"inputs": 3}, "inputs is no recording"),
        ({"inputs": {"array": [1, 2]}}, "inputs is no recording"),
        ({"inputs": {"array": ["a"], "sampling_rate": 16000}}, "inputs.array is no list of numbers"),
        ({"inputs": {"array": [[0.1, 0.2], [0.1]], "sampling_rate": 16000}}, "inputs.array is no list of numbers"),
        ({"inputs": {"audio": text_of(b"no audio, but a text"), "text": "x"}}, "not readable audio"),
        ({"inputs": "CLIP", "parameters": [1]}, "parameters is list; give a mapping of top_k"),
        ({"inputs": "CLIP", "parameters": {"transcriber": "x/y"}}, "Unknown parameters: transcriber; there are top_k"),
        ({"inputs": "CLIP", "parameters": {"top_k": "many"}}, "top_k is 'many', which is no number"),
        ({"inputs": "CLIP", "parameters": {"prior": "flat"}}, "prior"),
        ({"inputs": "CLIP"}, "transcript"),  # the system reads them
        ({"inputs": {"audio": "CLIP", "text": 3}}, "The transcript is int, not a string"),
    ],
)
def test_what_cannot_be_used_is_a_clear_error(data: Any, message: str, endpoint, clip) -> None:
    if isinstance(data, dict) and data.get("inputs") == "CLIP":
        data = data | {"inputs": text_of(clip)}
    if isinstance(data, dict) and isinstance(data.get("inputs"), dict) and data["inputs"].get("audio") == "CLIP":
        data = {"inputs": data["inputs"] | {"audio": text_of(clip)}}
    with pytest.raises(ValueError, match=message):
        endpoint(data)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["tiny_sailer", "tiny_speech_sailer"])
def test_a_pushed_system_answers_requests_without_the_package(
    system: str, different_clips: list[np.ndarray], hub, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import pipeline

    source, reads_text = request.getfixturevalue(system), system == "tiny_sailer"
    saved = tmp_path / "saved"
    saved.mkdir()
    for path in source.iterdir():
        (saved / path.name).write_bytes(path.read_bytes())
    (saved / "README.md").write_text("A system.")
    push(saved, "it")
    folder = tmp_path / "repository"
    for name, content in hub.files["me/it"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    clips = [wav(different_clips[index]) for index in (0, 1)]
    text = {"text": "so happy"} if reads_text else {}
    requests: list[tuple[str, bytes, dict[str, str]]] = [
        ("application/json", json.dumps({"inputs": {"audio": text_of(clip), **text}}).encode(), {}) for clip in clips
    ]
    parameters = {"top_k": 1, "prior": "balanced"}
    body = {"inputs": [{"audio": text_of(clip), **text} for clip in clips], "parameters": parameters}
    requests.append(("application/json", json.dumps(body).encode(), {}))
    requests.append(("audio/wav", clips[0], {"top_k": "2"}))
    requests.append(("audio/wav", b"no audio", {}))
    requests.append(("application/json", b'{"inputs": "clip.wav"}', {}))
    requests.append(("application/json", b'{"audio": ""}', {}))
    listed = []
    for number, (kind, content, query) in enumerate(requests):
        (tmp_path / f"body{number}").write_bytes(content)
        listed.append([kind, str(tmp_path / f"body{number}"), query])
    (tmp_path / "requests.json").write_text(json.dumps(listed))
    environment = os.environ | {
        "PYTHONPATH": str(Path(np.__file__).parents[1]),
        "HF_HOME": str(tmp_path / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-S", "-c", SERVER, str(folder), str(tmp_path / "requests.json")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])

    classifier = pipeline(model=str(source), trust_remote_code=True)
    expected = [classifier({"audio": clip, **text} if text else clip) for clip in clips]
    assert expected[0] != expected[1]
    assert [answer for _, answer in answers[:2]] == json.loads(json.dumps(expected))
    assert answers[2] == [200, [[expected[0][0]], [expected[1][0]]]]
    if reads_text:  # a body of sound alone has no transcript
        assert answers[3][0] == 400 and "transcript" in answers[3][1]["error"]
    else:
        assert answers[3] == [200, expected[0][:2]]
    assert [status for status, _ in answers[4:]] == [400, 400, 400]
    told = [answer["error"] for _, answer in answers[4:]]
    assert "no base64" in told[1] and "no inputs" in told[2]
