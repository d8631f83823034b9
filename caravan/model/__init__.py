"""One declarative decoder, its families and its files."""
