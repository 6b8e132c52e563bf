"""The command lines: parse, place on machines, call heartseg, report."""
