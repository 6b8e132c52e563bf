"""The experiment as frozen dataclasses, every default stated once. Open experiment.py first; recipes.py has the recipes."""
