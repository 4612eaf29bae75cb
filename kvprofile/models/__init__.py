"""Models: found by name, loaded, placed on devices."""
