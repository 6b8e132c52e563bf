"""Local folders and object stores behind one set of functions, and locks that admit one writer. Start with filesystem.py."""
