"""One file per outside format; the folder is the registry."""
