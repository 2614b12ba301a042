"""Runtimes that judge recordings beside torch, one a file: each gives a model that the pipeline takes as its own."""
