"""A simulated event log with known latent interests, and the best possible score of each task."""
