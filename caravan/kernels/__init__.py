"""The few fast operators, each beside its slow reference."""
