"""Encodes users' histories as integers and floats: vocabularies, numeric encoders, splits and aggregates."""
