# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Shapes
#
# {{badge}}
#
# A lesson of the tests: everything that a lesson can contain, in seconds.

# %% tags=["parameters"]
PROFILE = "mini"
DATA_ROOT = ""
DEVICE = "auto"
SEED = 0

# %% tags=["setup"]
# {{setup}}
import torch

from course_lib.checks import check, expect_error, same
from course_lib.lesson import start

lesson = start("00", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## Exercise 00.1 · the mean (2 points, 5 minutes)
#
# <details><summary>Hint 1</summary>There is a method for it.</details>


# %% exercise="00.1"
def pooled(features):
    """features: "b k h w"; returns "b k"."""
    ### BEGIN SOLUTION
    return features.mean((2, 3))
    ### END SOLUTION


# %% check="00.1" points=2
with check("00.1", hint="mean over the last two axes") as ask:
    features = torch.arange(24.0).reshape(2, 3, 2, 2)
    same(ask(pooled, features), features.mean((-2, -1)), "pooled(features)", axes="b k",
         suspects={"You summed over the positions: divide by their number.":
                       lambda: features.sum((2, 3)),
                   "You averaged over the channels: "
                   "the positions are the last two axes.":
                       lambda: features.mean(1)})
### BEGIN HIDDEN TESTS
assert pooled(torch.ones(1, 1, 3, 1)).shape == (1, 1)
### END HIDDEN TESTS

# %%
lesson.record("mean of 0..23", float(torch.arange(24.0).mean()), unit="px", paper=11.5)
with expect_error(RuntimeError):
    torch.ones(2, 3) @ torch.ones(2, 3)

# %%
lesson.finish(fingerprint="none")

# %% [markdown]
# {{next}}
