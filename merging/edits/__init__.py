"""Edits: small sets of replaced rows and columns, side blocks, their metric and their audit."""
