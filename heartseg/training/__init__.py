"""Batches in, checkpoints and a record out; knows nothing of who launched it. Open engine.py first: `fit` is a whole run."""
