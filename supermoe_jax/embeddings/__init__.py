"""Writes, updates, searches and aligns directories of user embeddings."""
