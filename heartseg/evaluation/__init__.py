"""Masks and their truth in, tables of scores out. Open scoring.py first."""
