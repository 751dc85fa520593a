"""From Maps to Masks: the library that all notebooks import.

A map is a weighted sum of feature channels; the methods differ only in where the weights come from.

One library and three wings. The wings stand on the library, and arrows go down only (contracts in pyproject.toml):

    course          for those who run the course: build, run, report, evidence, studies, bench
    experiments     one file for each benchmark table: commands only, which nothing imports
    worlds          the miniature worlds and the writers of the miniatures
    ----------------------------------------------------------------------------------------
    lesson, checks, evidence, show      the frame of a lesson
    wsss, metric_learning               the methods
    engine                              one training loop
    data, backbones, evaluate           readers, networks, measures
    maps, prototypes                    pure tensor functions
    components, checkpoints, processes, settings, published, paths
"""

__version__ = "0.1.0"
