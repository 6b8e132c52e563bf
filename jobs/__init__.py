"""The commands, each a `job(argv)` that parses flags, places work on machines, calls heartseg and reports."""
