"""Calibration text: where it comes from and how it becomes blocks of tokens."""

from kvprofile.samples.blocks import Sample, SampleSet, make_samples
from kvprofile.samples.documents import Document
from kvprofile.samples.encyclopedia import Entry, entries
from kvprofile.samples.load import load_documents

__all__ = ["Document", "Entry", "Sample", "SampleSet", "entries", "load_documents", "make_samples"]
