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

Modules are also found under the names that they had in earlier editions, with a DeprecationWarning: see EARLIER_NAMES.
"""

import importlib
import sys
import warnings
from importlib.abc import Loader
from importlib.machinery import ModuleSpec

__version__ = "0.1.0"

EARLIER_NAMES = {
    "course_lib.teach": "course_lib",
    "course_lib.bench": "course_lib.course.bench",
    "course_lib.build": "course_lib.course.build",
    "course_lib.report": "course_lib.course.report",
    "course_lib.run": "course_lib.course.run",
    "course_lib.data.creatures": "course_lib.worlds.creatures",
    "course_lib.data.dolls": "course_lib.worlds.dolls",
    "course_lib.data.fetch": "course_lib.worlds.photographs",
    "course_lib.data.minis": "course_lib.worlds.minis",
    "course_lib.data.saliency": "course_lib.worlds.saliency",
    "course_lib.data.scenes": "course_lib.worlds.scenes",
    "course_lib.data.tagged": "course_lib.worlds.tagged",
}


class _EarlierNames(Loader):
    """An import hook: a module under an earlier name is the module under its present one."""

    def find_spec(self, name, path=None, target=None):
        for old, new in EARLIER_NAMES.items():
            if f"{name}.".startswith(f"{old}."):
                return ModuleSpec(name, self, origin=new + name[len(old) :])

    def exec_module(self, module):
        name, present = module.__name__, module.__spec__.origin
        warnings.warn(f"{name} is now {present}.", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(present)


sys.meta_path.insert(0, _EarlierNames())
