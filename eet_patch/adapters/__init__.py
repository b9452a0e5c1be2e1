"""One module per host layer: what it supports, and how its parameters, masks and caches become
ours.
"""
