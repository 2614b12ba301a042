"""How late a stream's results are: milliseconds per hop, beside the pipeline on the same windows.

    python benchmarks/streaming.py [--seconds 30]

Blocks of half a second at 48 kHz, as a browser's microphone gives them, go into an EmotionStream over Whisper base
with random weights; the pipeline hears windows as long at the model's rate, in turns with it. "late" is the time from
the block that fills a window to its result, "behind" how much audio there was after the window by then (the resampler
needs some, and it comes by the block); the real-time factor is the time that a second of audio takes. A block without
a result costs what is told last: resampling and keeping it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import datetime

import numpy as np
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor

from sailer import EmotionStream, SailerConfig, SailerForAudioClassification, SailerProcessor, SpeechEmotionPipeline

RATE, BLOCK_RATE, BLOCK = 16000, 48000, 24000
WINDOWS = ((2.0, 0.5), (3.0, 1.0), (5.0, 0.5), (15.0, 1.0))  # chunk_s and hop_s
BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "num_mel_bins": 80}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of audio")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = SailerForAudioClassification(SailerConfig(audio_config=WhisperConfig(**BASE)))
    classifier = SpeechEmotionPipeline(model, SailerProcessor(WhisperFeatureExtractor()), device="cpu")
    print(f"{datetime.now():%Y-%m-%d}, torch {torch.__version__} with {torch.get_num_threads()} threads")
    print(f"\n{'chunk':>6}{'hop':>6}{'late, ms':>10}{'worst':>8}{'behind, s':>11}{'pipeline, ms':>14}{'ratio':>7}"
          f"{'real-time factor':>18}{'block alone, ms':>17}")  # fmt: skip
    for chunk_s, hop_s in WINDOWS:
        measure(classifier, chunk_s, hop_s, max(arguments.seconds, chunk_s + 5))


def measure(classifier: SpeechEmotionPipeline, chunk_s: float, hop_s: float, seconds: float) -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, round(seconds * BLOCK_RATE)).astype(np.float32)
    window = audio[: round(chunk_s * RATE)]  # as long as the stream's, and noise like it
    stream = EmotionStream(classifier, chunk_s, hop_s)
    late, behind, alone, plain, busy = [], [], [], [], 0.0
    for start in range(0, len(audio), BLOCK):
        began = time.perf_counter()
        results = stream.feed(audio[start : start + BLOCK], BLOCK_RATE)
        took = time.perf_counter() - began
        busy += took
        if not results:
            alone.append(took)
            continue
        late.append(took / len(results))
        behind.append(stream.seconds - results[-1]["timestamp"][1])
        began = time.perf_counter()
        classifier({"array": window, "sampling_rate": RATE}, chunk_length_s=0)
        plain.append(time.perf_counter() - began)
    middle, bare = 1000 * statistics.median(late), 1000 * statistics.median(plain)
    print(
        f"{chunk_s:6.1f}{hop_s:6.1f}{middle:10.1f}{1000 * max(late):8.1f}{max(behind):11.2f}{bare:14.1f}"
        f"{middle / bare:7.2f}{busy / seconds:18.3f}{1000 * statistics.median(alone):17.2f}"
    )


if __name__ == "__main__":
    main()
