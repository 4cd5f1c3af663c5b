"""Files of every format read into checked rows of a DuckDB table."""
