"""Shared by tests: servers, clusters and processes to talk to, files to read, the tiny experiment."""
