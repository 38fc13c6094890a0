"""Models that are split over ranks: which rank holds what of them (mesh.py, parts.py), and how it is computed.

tensor.py splits layers by their neurons. All of it composes with the strategies, which average over the ranks that hold
the same part.
"""
