"""A model looked into: where it comes from, its graph, its convolutions."""
