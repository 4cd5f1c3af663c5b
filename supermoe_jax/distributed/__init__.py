"""Joins the processes of a run on several hosts, shows their heartbeats and supervises them."""
