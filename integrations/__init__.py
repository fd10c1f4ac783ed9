"""Thin layers between the core and one framework each; nothing here is imported by the core."""
