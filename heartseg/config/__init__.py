"""The experiment as frozen dataclasses, every default stated once. Start with experiment.py; recipes.py has the recipes."""
