"""Reads a dataset's files as upright recordings, and divides its patients into groups. Start with camus.py."""
