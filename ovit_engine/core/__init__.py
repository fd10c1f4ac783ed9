"""Recipes, modifiers and the hooks that run them; nothing here knows a concrete modifier."""
