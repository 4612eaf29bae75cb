"""Profiles as pictures."""
