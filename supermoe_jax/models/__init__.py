"""Encoders, the multi-task model and baselines."""
