"""Pure tensor mathematics of merging: which tokens form a set, and what one slot then holds.

Calibration measures with these functions and the runtime applies them: what is measured is what runs. Torch only.
"""
