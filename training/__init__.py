"""Batches in, a trained and judged system out: trainer, losses, metrics, calibration, evaluation, kept features."""
