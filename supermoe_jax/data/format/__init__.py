"""Defines the files of a dataset: records, shards, schema and integrity."""
