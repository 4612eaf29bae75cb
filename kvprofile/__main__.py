"""`python -m kvprofile` is the command line."""

from kvprofile.cli import main

main(prog_name="kvprofile")
