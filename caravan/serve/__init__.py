"""HTTP API, chat page, feedback store."""
