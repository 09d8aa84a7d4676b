"""Recipes, use cases and the command line."""
