"""Batches in, checkpoints and a record out, whatever the launcher. Start with engine.py: `fit` is a whole run."""
