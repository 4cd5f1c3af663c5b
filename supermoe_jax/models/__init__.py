"""The encoder and the multi-task model."""
