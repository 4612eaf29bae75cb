"""The profile: its schema, its files, the model it belongs to."""
