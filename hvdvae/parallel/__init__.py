"""Models that are split over ranks. Strategies average over those that hold the same part.

mesh.py, parts.py                     which rank holds what
tensor.py                             layers split by their neurons
stages.py, pipeline.py                the model as stages; micro_batches.py: in which order, sequential.py: any
                                      nn.Sequential as a chain
fill.py, whole_checkpoint.py          parts of a model that is never whole: built, saved and resumed
survival.py                           who goes on when a rank dies
"""
