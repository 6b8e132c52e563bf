"""Predicted and reference masks in, tables of scores out. Start with scoring.py."""
