"""What leaves a run: user embeddings."""
