"""Local folders and object stores behind one set of functions, and one writer per folder. Open filesystem.py first."""
