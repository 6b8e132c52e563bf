"""Masks and their truth in, tables of scores out. Start with scoring.py."""
