"""Recordings to Parquet shards and back to batches. writer.py has the format, loader.py the batches."""
