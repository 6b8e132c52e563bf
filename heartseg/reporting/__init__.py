"""Tables in, pictures and pages out; recomputes no score. Open report.py first."""
