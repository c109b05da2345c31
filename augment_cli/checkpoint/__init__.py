"""Converted models on disk: metadata, saving, loading, rebuilding."""
