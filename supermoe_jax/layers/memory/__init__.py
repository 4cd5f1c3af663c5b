"""Implements what a next-event head remembers beside its dot products; loaded only by a config that names it."""
