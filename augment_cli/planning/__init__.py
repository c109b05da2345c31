"""From a recipe to a plan: selection, splits, budget. Imports no torch."""
