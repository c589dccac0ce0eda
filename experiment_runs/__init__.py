"""Runs on disk: configuration, log, results, checkpoints and their origin. Knows no model."""
