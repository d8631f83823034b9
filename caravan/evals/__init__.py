"""What a model can do, with the uncertainty of every number."""
