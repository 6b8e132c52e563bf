"""Local folders and object stores behind one set of functions, and one writer per folder. Start with filesystem.py."""
