"""Reads the lines of CSV and RecBole files: their layout, bad lines, and words for no value."""
