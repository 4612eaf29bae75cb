"""What is measured while a model reads calibration text.

Every file holds one streaming accumulator: `update` takes one layer of one sample, `merge` adds another accumulator of the
same kind (a data-parallel run adds up its workers), `finish` returns plain arrays. Their memory does not grow with the
number of samples.
"""
