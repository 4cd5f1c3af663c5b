"""The labels of every kind of task."""
