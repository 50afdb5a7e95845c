"""Modules that many papers share, one concept a file; no paper's own idea lives here."""
