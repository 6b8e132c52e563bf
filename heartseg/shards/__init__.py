"""Turns recordings into Parquet shards, and shards into batches. writer.py has the format, loader.py the batches."""
