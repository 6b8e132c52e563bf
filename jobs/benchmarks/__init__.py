"""One module per table: `run(Options(…))` measures and prints it. Both sides are measured in the same run."""
