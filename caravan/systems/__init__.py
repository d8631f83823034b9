"""Everything that knows about machines."""
