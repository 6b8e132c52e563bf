"""What the jobs share: command lines, Ray, stages of the pipeline. Open command_line.py first."""
