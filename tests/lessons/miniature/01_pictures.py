# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Pictures
#
# {{badge}}

# %% tags=["parameters"]
PROFILE = "mini"
DATA_ROOT = ""
DEVICE = "auto"
SEED = 0

# %% tags=["setup"]
# {{setup}}
import ipywidgets
import torch
from matplotlib.figure import Figure

from course_lib.lesson import start
from course_lib.show import plots, widgets

lesson = start("01", PROFILE, DATA_ROOT, DEVICE, SEED)


# %%
def spot(place=0):
    figure = Figure(figsize=(3, 3))
    axes = figure.subplots()
    axes.imshow(torch.eye(5).roll(place, 1))
    axes.set(title="A diagonal", xlabel="x / px", ylabel="y / px")
    return figure


plots.show(spot(), alt="A bright diagonal on a dark square")

# %%
display(
    widgets.live(
        lambda place: spot(place),
        alt=lambda place: f"A diagonal moved by {place} pixels",
        place=ipywidgets.IntSlider(0, 0, 4),
    )
)

# %%
widgets.flipbook(spot, range(5), label="moved by / px",
                 alt=lambda place: f"Frame with a diagonal moved by {place} pixels")

# %%
lesson.record("diagonal", 5)
lesson.finish()

# %% [markdown]
# {{next}}
