"""Checkpoints of a run, with checksums, for any mesh."""
