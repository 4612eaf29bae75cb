"""Attention over stored slots, by whichever way suits them, the device and the call: one contract, and a table."""
