"""Reusable Flax NNX modules; each can be used alone."""
