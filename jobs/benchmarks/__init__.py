"""One module per table: `run(Options(…))` measures and prints it. All sides of a comparison are measured in the same run."""
