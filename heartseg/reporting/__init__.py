"""Tables in, pictures and pages out; no score is recomputed. Start with report.py."""
