"""Training, whatever the launcher: batches in, checkpoints and a record out. Start with engine.py: `fit` trains a whole run."""
