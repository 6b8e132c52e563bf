"""The command lines, each a `job(argv)`: parse, place on machines, call heartseg, report."""
