"""Prepares a dataset directory from an event log."""
