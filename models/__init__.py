"""The embedded models, and what is read of a model's files."""
