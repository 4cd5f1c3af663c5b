"""Directories of user embeddings: written, updated, searched, aligned."""
