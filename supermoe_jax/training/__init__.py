"""The loss with task indicators, the training step and the loop around it."""
