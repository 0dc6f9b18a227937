"""Where state goes: one file per format, each a mapping of names to NumPy arrays."""

MANIFEST = "manifest.json"  # the one entry that is no array of the state
