"""From Maps to Masks: the library that all notebooks import.

A map is a weighted sum of feature channels; the methods differ only in where the weights come from.
Floors, each importing only from those below it: maps, prototypes < evaluate, backbones, data < engine <
metric_learning, wsss < show, teach < __main__.
"""

__version__ = "0.1.0"
