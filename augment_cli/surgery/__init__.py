"""Convolutions replaced by a plan, their weights inherited."""
