"""Judge recordings with an exported system, without torch and transformers: python run_onnx.py EXPORTED CLIP..."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile


def mel_filters(rate, n_fft, mels):
    """Slaney's filters (mels, n_fft // 2 + 1): the scale is linear up to 1 kHz and logarithmic above."""
    highest = 15 + 27 * np.log(rate / 2 / 1000) / np.log(6.4)
    scale = np.linspace(0, highest, mels + 2)
    edges = np.where(scale < 15, 200 / 3 * scale, 1000 * np.exp(np.log(6.4) / 27 * (scale - 15)))[:, None]
    bins = np.linspace(0, rate / 2, n_fft // 2 + 1)
    rising, falling = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])


def log_mel(clip, rate, n_fft, hop, mels):
    """Whisper's features (mels, frames)."""
    window = np.hanning(n_fft + 1)[:-1]
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(clip, n_fft // 2, mode="reflect"), n_fft)[::hop][:-1]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    logs = np.log10(np.maximum(mel_filters(rate, n_fft, mels) @ power.T, 1e-10))
    return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)


def model_inputs(clip, processor, names):
    """What the graph reads of one clip (samples,)."""
    extractor = processor["feature_extractor"]
    if "input_values" in names:
        if extractor["do_normalize"]:
            clip = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
        return {"input_values": clip[None].astype(np.float32), "attention_mask": np.ones((1, len(clip)), np.int64)}
    hop = extractor["hop_length"]
    if processor["audio_padding"] == "max_length":
        padded = np.pad(clip, (0, extractor["n_samples"] - len(clip)))
    else:  # the last frames see what follows: silence, and an even number of frames
        padded = np.pad(clip, (0, 2 * hop + (-(len(clip) // hop) % 2) * hop))
    features = log_mel(padded, extractor["sampling_rate"], extractor["n_fft"], hop, extractor["feature_size"])[None]
    return {"input_features": features, "attention_mask": (np.arange(features.shape[-1]) < len(clip) // hop)[None] * 1}


folder = Path(sys.argv[1])
config, processor, manifest = (
    json.loads((folder / f"{name}.json").read_text()) for name in ("config", "processor_config", "export")
)
if "input_ids" in manifest["inputs"] or processor.get("trim_silence"):
    sys.exit(f"{folder} reads transcripts or leaves out silence, which this script does not: use sailer.load.")
session = onnxruntime.InferenceSession(folder / next(iter(manifest["files"])))
for path in sys.argv[2:]:
    clip, rate = soundfile.read(path, always_2d=True)
    if rate != processor["feature_extractor"]["sampling_rate"] or len(clip) > config["max_seconds"] * rate:
        sys.exit(f"{path}: up to {config['max_seconds']} s at {processor['feature_extractor']['sampling_rate']} Hz.")
    (logits,) = session.run(["logits"], model_inputs(clip.mean(1), processor, manifest["inputs"]))
    scores = np.exp(logits[0] - logits[0].max())
    print(path, *(f"{config['id2label'][str(i)]} {score:.5f}" for i, score in enumerate(scores / scores.sum())))
