"""Reads files of every format into checked rows of a DuckDB table."""
