"""A dataset's files: records, shards, schema and integrity."""
