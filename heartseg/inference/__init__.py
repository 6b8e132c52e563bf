"""A checkpoint and new images in, masks, ejection fractions and tables out. Open segmenter.py first."""
