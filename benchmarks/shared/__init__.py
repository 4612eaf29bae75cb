"""What several benches share; each script beside this folder answers one question."""
