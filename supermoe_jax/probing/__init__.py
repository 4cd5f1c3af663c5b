"""Frozen probes: score embeddings on label tables and compare them with aggregates, with 95 % intervals."""
