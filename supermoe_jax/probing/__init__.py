"""Frozen probes: how good embeddings are on label tables, compared with aggregates, with intervals."""
