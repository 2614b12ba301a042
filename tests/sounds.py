"""Waveforms that a model can tell apart."""

import numpy as np

RATE = 16000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise and a gliding tone, of the seed's own pitch, rhythm and loudness: a model hears all pure noise alike."""
    random = np.random.default_rng(seed)
    time = np.arange(round(RATE * seconds)) / RATE
    glide = 2 * np.pi * random.uniform(100, 2000) * (time + 0.3 * np.sin(time))
    tone = np.sin(glide) * (1 + np.sin(10 * random.uniform(1, 5) * time))
    loudness, share = random.uniform(0.02, 0.4), random.uniform(0.01, 0.3)
    return (loudness * (tone + share * random.normal(size=len(time)))).astype(np.float32)
