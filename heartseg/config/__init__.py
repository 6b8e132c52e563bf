"""The experiment as frozen dataclasses; every default is stated once. Start with experiment.py; recipes.py has the recipes."""
