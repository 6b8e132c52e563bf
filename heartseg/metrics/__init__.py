"""Arrays in, numbers out; knows no file. Open segmentation.py for scores, cardiac_indices.py for volumes and EF."""
