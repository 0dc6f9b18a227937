"""Where state goes: one file per format, each a mapping of names to NumPy arrays."""
