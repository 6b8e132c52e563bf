"""Code that the jobs share: command lines, Ray, stages of the pipeline. Start with command_line.py."""
