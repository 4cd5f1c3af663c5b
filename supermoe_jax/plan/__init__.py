"""Computes what a run would take on a pod, before there is one, by compiling its step ahead of time."""
