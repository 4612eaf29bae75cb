"""How one vector of a cache is stored, a slot's key or its value: pure tensor functions, torch only.

Calibration measures with these functions and the runtime stores with them: what is measured is what runs.
"""
