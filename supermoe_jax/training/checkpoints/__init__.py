"""Saves and restores the checkpoints of a run, with checksums, on any mesh."""
