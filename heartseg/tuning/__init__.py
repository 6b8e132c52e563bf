"""Sweeps: the settings that trials vary, and their results. Start with sweep.py."""
