"""Exports encoders, and serves user embeddings from raw events."""
