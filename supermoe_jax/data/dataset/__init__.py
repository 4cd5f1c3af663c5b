"""A prepared dataset opened for training and evaluation: random access, windows, targets, batches."""
