"""Sweeps: what a trial may change, and what the trials found. Open sweep.py first."""
