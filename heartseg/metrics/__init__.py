"""Arrays in, numbers out; no file is read. segmentation.py has the scores, cardiac_indices.py volumes and EF."""
