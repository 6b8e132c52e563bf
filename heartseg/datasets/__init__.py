"""Files of a dataset in, upright recordings out; patients into groups. Open camus.py first."""
