"""One explicit loop per file; the file name is the command."""
