"""Public base classes of modifiers."""
