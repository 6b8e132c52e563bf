"""Recordings to Parquet shards and back to batches. Open writer.py for the format, loader.py for the batches."""
