"""Reads a prepared dataset for training and evaluation: random access, windows, targets, batches."""
