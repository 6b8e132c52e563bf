"""Arrays in, numbers out: Dice, distances, volumes, ejection fraction, statistics. Nothing here knows a file.

Open segmentation.py for scores, cardiac_indices.py for volumes and EF.
"""
