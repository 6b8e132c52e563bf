"""A checkpoint and new images in; masks, ejection fractions and tables out. Start with segmenter.py."""
