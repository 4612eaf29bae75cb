"""Entries of an encyclopedia of things that never were, with questions on what they say.

In the manner of SynthWiki (Peysakhovich and Lerer, arXiv 2310.01427): no model can have read about these people and
places before, so an answer must come from the context. Our own text, made on the spot, free to use and share.
"""

from kvprofile.samples.encyclopedia.generator import Entry, entries

__all__ = ["Entry", "entries"]
