"""Compression passes, one a file, found by file name; each file binds its class to `PASS`."""
