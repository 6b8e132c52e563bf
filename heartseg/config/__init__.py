"""The experiment as frozen dataclasses: every setting and its default, stated once.

Open experiment.py first; recipes.py has the three named experiments.
"""
