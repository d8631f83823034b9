"""Text in, numbers out."""
