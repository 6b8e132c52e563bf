"""One module a table: `job(argv)` measures and prints it. What is compared is measured in the same run."""
