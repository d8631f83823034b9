"""One file per preference method."""
