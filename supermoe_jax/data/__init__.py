"""Event logs to dataset directories to batches."""
