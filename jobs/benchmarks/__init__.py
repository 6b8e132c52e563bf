"""One module a table: `run(Options(…))` measures and prints it. What is compared is measured in the same run."""
