"""Simulates an event log with known latent interests, and computes the best possible score of each task."""
