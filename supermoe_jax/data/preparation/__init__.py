"""From an event log to a dataset directory."""
