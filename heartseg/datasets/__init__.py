"""Files of a dataset in, upright recordings out; patients into groups.

Open camus.py first; source.py is the one door to every layout.
"""
