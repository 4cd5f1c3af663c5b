"""How good embeddings are, beside what they must beat: frozen probes on label tables, with intervals."""
