"""The catalogue: one file a method, and the listing of this folder is the list of methods."""
