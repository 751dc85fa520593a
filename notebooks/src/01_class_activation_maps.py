# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Class activation maps
#
# {{badge}}
#
# **You will**
# 1. write the class activation map (CAM) in one line, and prove that its mean is the network's own answer;
# 2. turn a map into a heatmap and a heatmap into a box, and learn which choices these steps hide;
# 3. measure a map by weakly supervised localisation, beside baselines that never look at the image, and find out by an
#    experiment which objects it misses.
#
# **Time** 60 minutes to work through; the computer needs about a minute on a CPU, less on a GPU.
# **Before** [00 Tour](00_tour.ipynb).
#
# **Source** Zhou, Khosla, Lapedriza, Oliva, Torralba: *Learning Deep Features for Discriminative Localization*, CVPR 2016.
# The measures are those of Choe et al.: *Evaluating Weakly Supervised Object Localization Methods Right*, CVPR 2020.

# %% tags=["parameters"]
# "smoke": seconds, does it run? · "mini": minutes on a CPU · "paper": the real
# benchmark, on a GPU
PROFILE = "mini"
# "" finds the data folder; with "paper" it holds ILSVRC 2012 in the folder ilsvrc2012
DATA_ROOT = ""
DEVICE = "auto"     # "auto", "cpu" or "cuda"
SEED = 0

# %% tags=["setup"]
# {{setup}}
from itertools import islice

import ipywidgets
import numpy as np
import timm
import torch
from IPython.display import Markdown, display
from scipy import ndimage
from torchvision.models import densenet121
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from course_lib import backbones, maps
from course_lib.worlds import photographs as fetch, minis, scenes
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.images import load
from course_lib.data.miniature import fingerprint
from course_lib.evaluate import localization
from course_lib.evaluate.localization import HEATMAP_THRESHOLDS, MaxBoxAcc, PxAP, iou
from course_lib.show import plots, widgets
from course_lib.checks import check, expect_error, same, yours
from course_lib.lesson import start

lesson = start("01", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## Words
#
# {{words}}

# %% [markdown]
# ## A first heatmap
#
# The network was trained to *name* photographs. Here is a photograph, and the places that gave it its name:

# %%
network = backbones.create("tf_efficientnet_lite0").to(lesson.device)
names = [name for _, name in backbones.imagenet_classes()]
weight = network.classifier.weight.detach()                               # 1000 1280
bias = network.classifier.bias.detach()                                   # 1000

def look(images):
    """Feature map and logits of square images, uint8."""
    with torch.inference_mode():
        features = network.features(network.normalise(images.to(lesson.device)))
        return features, network.classifier(features.mean((2, 3)))  # b 1280 7 7, b 1000

def example(name):
    """One of the example photographs, 224 x 224."""
    return transforms.resize(load(fetch.example(name, lesson.data)), [224, 224])

cat = example("chelsea")
features, logits = look(cat[None])
label = logits[0].argmax().item()
heat = maps.heatmap(maps.cam(features, weight[[label]]), 224)[0, 0].cpu()
titles = ["the photograph", f"“{names[label]}”: seen here"]
plots.show(plots.grid([cat, plots.overlay(cat, heat)], titles, columns=2, side=3,
                      title="A network trained with names, and a map of places"),
           alt="Left a photograph of a cat's face. Right the same photograph under a "
               f"heatmap of the class {names[label]}.")

# %% [markdown]
# The rest of this lesson is about this picture: what it is, how it is made, and how far it can be trusted.
#
# ## The idea
#
# The network ends in **global average pooling** and **one linear layer**. The logit of class $c$ is a weighted sum of
# channels, each averaged over the positions $(x, y)$:
#
# $$\text{logit}_c = \sum_k w_{ck} \Big( \frac{1}{hw} \sum_{x,y} F_k(x, y) \Big) + b_c .$$
#
# Both sums are linear, so they may be exchanged. First weigh, then average:
#
# $$\text{logit}_c = \frac{1}{hw} \sum_{x,y} \underbrace{\sum_k w_{ck}\, F_k(x, y)}_{M_c(x, y)} + b_c .$$
#
# $M_c$ is the **class activation map** (Zhou et al., Eq. 2). It says what each position contributes to the logit. It needs no
# gradient and no training: one matrix product.

# %% [markdown]
# ### Exercise 01.1 · The map (2 points, 5 minutes)
#
# Write `class_map(features, weight)`: the maps of **all** classes for **all** images.
#
# | argument | shape | |
# |---|---|---|
# | `features` | `b k h w` | the last feature map |
# | `weight` | `c k` | rows of the linear layer |
# | *returns* | `b c h w` | $M_c(x, y) = \sum_k w_{ck} F_k(x, y)$: no bias, no ReLU, no scaling |
#
# <details><summary>Hint 1</summary>Which axis do the two arguments share? It is summed over, and disappears.</details>
# <details><summary>Hint 2</summary><code>torch.einsum</code> takes the names of the axes: those of each input, an arrow, those of the
# result. A name that stands only before the arrow is summed over.</details>
# <details><summary>Hint 3</summary>Another sum over a shared axis: three shops have prices of two goods, and four
# customers have lists. What does each list cost in each shop?
#
# ```python
# prices = torch.tensor([[1., 2.], [2., 1.], [3., 3.]])             # shop, good
# lists = torch.tensor([[1., 0.], [0., 1.], [1., 1.], [2., 0.]])    # customer, good
# torch.einsum("sg,lg->ls", prices, lists)[2]                       # tensor([3., 3., 6.])
# ```
# </details>

# %% exercise="01.1"
def class_map(features, weight):
    """Maps M_c = sum_k w_ck F_k of all classes: features b k h w, weight c k -> b c h
    w."""
    ### BEGIN SOLUTION
    return torch.einsum("bkhw,ck->bchw", features, weight)
    ### END SOLUTION

# %% check="01.1" points=2
with check("01.1", hint="einsum over the shared axis k") as ask:
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(2, 5, 3, 4, generator=generator)                   # b k h w
    w = torch.randn(7, 5, generator=generator)                            # c k
    right = maps.cam(some, w)                                     # the library's answer
    same(ask(class_map, some, w), right, "class_map(features, weight)", axes="b c h w",
         suspects={"You averaged over the channels: Eq. 2 sums them. The average "
                   "belongs to the positions, and comes later.": lambda: right / 5,
                   "You cut off the negative values (ReLU). Negative evidence is part "
                   "of the map: without it the mean is not the logit.":
                       lambda: right.relu(),
                   "You pooled the features first, so every position has the same "
                   "value: weigh first, average later.":
                       lambda: right.mean((2, 3), keepdim=True).expand_as(right),
                   "The axes are in the order c b h w: images come first.":
                       lambda: right.transpose(0, 1),
                   "You normalised the weights over the classes. They are used as they "
                   "are.": lambda: maps.cam(some, w.softmax(0))})
### BEGIN HIDDEN TESTS
one = class_map(torch.ones(1, 3, 1, 1), torch.tensor([[1.0, 2.0, -4.0]]))
assert one.shape == (1, 1, 1, 1) and one.item() == -1
empty = class_map(torch.zeros(0, 4, 2, 2), torch.ones(3, 4))
assert empty.shape == (0, 3, 2, 2), "an empty batch is a batch"
### END HIDDEN TESTS

# %% [markdown]
# ## The map is the answer
#
# If the derivation holds, then for every class of every image
#
# $$\text{mean}_{x,y}\, M_c + b_c = \text{logit}_c .$$
#
# *Before you run the cells:* four photographs have 4 × 1000 logits. For how many of them will this hold up to 0.0001? Write
# your guess in place of `None`.

# %% tags=["prediction"]
lesson.predict("01.a", None)     # your guess, 0 to 4000

# %%
draw_maps = yours("01.1", class_map, maps.cam)
four = torch.stack([example(name)
                    for name in ("chelsea", "coffee", "motorcycle_left", "china")])
features, logits = look(four)
cams = draw_maps(features, weight)                                        # 4 1000 7 7
gap = (cams.mean((2, 3)) + bias - logits).abs()
lesson.outcome("01.a", int((gap < 1e-4).sum()))
lesson.record("largest |mean(map) + bias - logit|", gap.max().item(),
              note="4000 logits, float32 rounding")
lesson.claim(f"Mean of the map plus bias is the logit, for {logits.numel()} logits "
             f"between {logits.min():.1f} and {logits.max():.1f}: the largest "
             f"deviation is {gap.max():.0e}.", gap.max() < 1e-4)

# %% [markdown]
# So a CAM of this network is no illustration and no approximation. It **is** the logit, spread over the image. Keep the
# identity in mind: it tests whether a map belongs to the network.
#
# ## One photograph, many maps
#
# The features are computed once. Each class has its own weights, and so its own map. Here are two objects in one scene. (It was
# picked because both are among the five first guesses of the network.) The third class, teapot, is not in the scene.
#
# *Before you run the cells:* what is the largest value in the heatmap of the teapot, from 0 to 1?

# %% tags=["prediction"]
lesson.predict("01.b", None)     # your guess, 0 to 1

# %%
photos = fetch.photographs(lesson.data)
world = scenes.photo_world(photos, "wnid", SEED)
by_file = {photo.file.split("/")[-1]: (index, photo)
           for index, photo in world.items["val"]}
pairs = [pair.split() for pair in (                     # the first that is there
    "tiger violin", "elephant garbagetruck", "lion corn", "duck wombat",
    "lobster orange", "badger basketball", "mantis camera_35mm", "pelican lemon",
    "firetruck sliced_orange", "bison guitar2")]
picks = next([by_file[f"{name}.png"] for name in pair] for pair in pairs
             if by_file.keys() >= {f"{name}.png" for name in pair})
scene = scenes.compose(world, "val", picks, (224, 224), np.random.default_rng(1))
picture = torch.from_numpy(scene.image.copy()).permute(2, 0, 1)
scene_features, scene_logits = look(picture[None])
print("top 5:", ", ".join(names[i] for i in scene_logits[0].topk(5).indices))

# %%
first, second = [dict(backbones.imagenet_classes())[photo.wnid] for _, photo in picks]
shown = [first, second, "teapot"]
rows = [names.index(name) for name in shown]
raw = draw_maps(scene_features, weight[rows])                             # 1 3 7 7
heat = maps.heatmap(raw, 224)[0].cpu()
plots.show(plots.grid([picture, *[plots.overlay(picture, h) for h in heat]],
                      ["the scene", *shown],
                      title="One feature map, three classes: three heatmaps"),
           alt=f"A scene with two objects, {first} and {second}, and three heatmaps: "
               f"of {first}, of {second}, and of teapot, which is not there.")

# %%
lesson.outcome("01.b", heat[2].max())
on = torch.from_numpy(np.stack([scene.instances == 1, scene.instances == 2]))
warm = torch.stack([heat[:, mask].mean(1) for mask in on], 1)             # 3 2
for name, m, row, values in zip(shown, raw[0], rows, warm):
    print(f"{name:8} raw map {m.min():6.2f} to {m.max():6.2f}, logit "
          f"{scene_logits[0, row]:6.2f}; mean heat on the {first} {values[0]:.2f}, on "
          f"the {second} {values[1]:.2f}")
lesson.claim(f"The map of {first} is hotter on the {first} ({warm[0, 0]:.2f} against "
             f"{warm[0, 1]:.2f}), that of {second} on the {second} ({warm[1, 1]:.2f} "
             f"against {warm[1, 0]:.2f}).",
             min(warm[0, 0] - warm[0, 1], warm[1, 1] - warm[1, 0]) > 0.2)
lesson.claim("The logit of the absent teapot, "
             f"{scene_logits[0, rows[2]]:.1f}, is below those of the other two, but "
             "its heatmap reaches 1 as theirs do.",
             scene_logits[0, rows[2]] < scene_logits[0, rows[:2]].min() - 1)

# %% [markdown]
# Every heatmap is stretched until its maximum is 1. **A heatmap shows where, and not whether.** Whether the class is there is
# said by the logit, the mean of the raw map.
#
# ## From a map to a heatmap
#
# A map has 7 × 7 raw values. To lay it over the photograph, it is **enlarged** and then **scaled** to 0..1. Each step is a
# choice that changes boxes and figures later on:
#
# * Enlarge first, scale second: bicubic interpolation overshoots, so the other order leaves the range.
# * Scale each map **by itself**: a batch may not change what one image shows.
# * A constant map has nothing to show: it becomes all zeros, not 0/0.

# %% [markdown]
# ### Exercise 01.2 · Min-max (2 points, 8 minutes)
#
# Write `scaled(raw)`: for each map of `b c h w` by itself $(M - \min M) / (\max M - \min M)$, and zeros where a map is
# constant.
#
# <details><summary>Hint 1</summary>Over which of the four axes do you look for the minimum, if each map counts by itself? What
# is 0 / 0, and what could you divide 0 by instead?</details>
# <details><summary>Hint 2</summary><code>amin</code> and <code>amax</code> take several axes at once, and <code>keepdim=True</code> keeps the result
# broadcastable. <code>torch.where(condition, a, b)</code> chooses value by value, so it can put 1 in the place of a spread of
# 0.</details>
# <details><summary>Hint 3</summary>Another quotient, row by row: the share of each number in its row. The second row is empty.
#
# ```python
# counts = torch.tensor([[1., 3.], [0., 0.]])
# total = counts.sum(1, keepdim=True)                               # 2 1
# counts / total.where(total > 0, 1)        # tensor([[0.2500, 0.7500], [0.0000, 0.0000]])
# ```
# </details>

# %% exercise="01.2"
def scaled(raw):
    """Each map of b c h w scaled to 0..1 by itself; constant maps give zeros."""
    ### BEGIN SOLUTION
    low, high = raw.amin((-2, -1), keepdim=True), raw.amax((-2, -1), keepdim=True)
    spread = high - low
    return (raw - low) / torch.where(spread == 0, 1, spread)
    ### END SOLUTION

# %% check="01.2" points=2
with check("01.2", hint="amin and amax over the last two axes") as ask:
    given = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    given *= torch.tensor([1.0, 4.0, 9.0])[:, None, None]
    scale = lambda x: maps.heatmap(x, x.shape[-2:])               # the library's answer
    right, peak = scale(given), given.flatten(2).max(2).values[..., None, None]
    same(ask(scaled, given), right, "scaled(raw)", axes="b c h w", suspects={
        "You took the minimum and maximum of the whole batch: then one image changes "
        "what another one shows.": lambda: scale(given.view(1, 24, 5)).view_as(given),
        "You took them over the channels too: each map of an image has its own minimum "
        "and maximum.": lambda: scale(given.view(2, 12, 5)).view_as(given),
        "You divided by the maximum only: subtract the minimum first, and divide by "
        "the difference of the two.": lambda: given / peak,
        "You cut off the negative values first (as Grad-CAM does). Here the lowest "
        "value becomes 0, whatever its sign.": lambda: scale(given.relu()),
        "You subtracted the minimum, but divided by the maximum as it was before.":
            lambda: given / peak + (right - given / peak).amax((2, 3), keepdim=True)})
    mixed, want = given.clone(), right.clone()
    mixed[0, 1], want[0, 1] = 3.0, 0.0                          # one map is constant
    came = ask(scaled, mixed)
    assert not came.isnan().any(), ("A constant map gave NaN: 0 / 0. It should give "
                                    "zeros.")
    assert not came[0, 1].any(), ("Expected zeros for a constant map, got "
                                  f"{came[0, 1].max():.3g}.")
    same(came, want, "scaled(raw) with one constant map", axes="b c h w", suspects={
        "One constant map emptied all others: only the constant one becomes zeros.":
            0 * want,
        "One constant map emptied those of its image: only itself becomes zeros.":
            want * torch.tensor([0.0, 1.0])[:, None, None, None]})
### BEGIN HIDDEN TESTS
three = torch.tensor([-2.0, 0.0, 2.0]).view(1, 1, 1, 3)
assert torch.equal(scaled(three), torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3))
assert torch.equal(scaled(torch.zeros(1, 2, 3, 3)), torch.zeros(1, 2, 3, 3))
### END HIDDEN TESTS

# %%
def at_its_own_size(raw):
    """The library's heatmap, without enlarging."""
    return maps.heatmap(raw, raw.shape[-2:])

coarse = yours("01.2", scaled, at_its_own_size)(raw)                      # 1 3 7 7
resized = torch.nn.functional.interpolate
blocks = resized(coarse, 224)[0].cpu()                               # each value a tile
late = resized(coarse, (224, 224), mode="bicubic")[0].cpu()        # the wrong order
plots.show(plots.grid([plots.overlay(picture, h) for h in (*blocks[:2], *heat[:2])],
                      [f"{first}, 7 × 7 values", f"{second}, 7 × 7 values",
                       f"{first}, enlarged", f"{second}, enlarged"],
                      title="The map as it is, and as a heatmap"),
           alt=f"Maps of {first} and {second} on the scene: twice as 7 by 7 tiles, "
               "twice enlarged to smooth heatmaps.")
lesson.claim(f"Scaled first and enlarged second, values run from {late.min():.2f} to "
             f"{late.max():.2f}, out of 0..1.", late.min() < 0 or late.max() > 1)

# %% [markdown]
# ## From a heatmap to a box
#
# Zhou et al. keep the pixels above 20 % of the maximum, and take the box around the **largest connected region**.

# %% [markdown]
# ### Exercise 01.3 · The box (3 points, 15 minutes)
#
# Write `region_box(heatmap, threshold)`: keep the pixels **above** `threshold` × the maximum, find the largest connected
# region (diagonal neighbours count as connected) and return its box `(x0, y0, x1, y1)` as four ints. `x1` and `y1` lie one past
# the last pixel, so that `x1 - x0` is the width.
#
# `ndimage.label(mask, np.ones((3, 3)))` gives an array with a number for each region (0 is outside) and how many there are.
#
# <details><summary>Hint 1</summary><code>np.bincount(regions.ravel())</code> counts the pixels of each number. Which entry must not
# win?</details>
# <details><summary>Hint 2</summary>Leave out the entry of 0 before you take <code>argmax</code>, and mind that the places then begin one
# number later. <code>np.nonzero</code> of the mask of one region gives the rows first (that is <i>y</i>), then the columns.</details>
# <details><summary>Hint 3</summary>Another search for the most frequent number, without the zeros (no answer) among votes; and
# where it stands:
#
# ```python
# votes = np.array([[0, 0, 2], [0, 1, 2]])
# count = np.bincount(votes.ravel())        # 3 without answer, 1 for "1", 2 for "2"
# count[0] = 0
# rows, columns = np.nonzero(votes == count.argmax())
# (rows.tolist(), columns.tolist())                                 # ([0, 1], [2, 2])
# ```
# </details>

# %% exercise="01.3"
def region_box(heatmap, threshold):
    """Box (x0, y0, x1, y1) of the largest region of an H W array above threshold *
    maximum."""
    ### BEGIN SOLUTION
    heatmap = np.asarray(heatmap)
    regions, _ = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    largest = np.bincount(regions.ravel())[1:].argmax() + 1
    rows, columns = np.nonzero(regions == largest)
    return (int(columns.min()), int(rows.min()), int(columns.max()) + 1,
            int(rows.max()) + 1)
    ### END SOLUTION

# %% check="01.3" points=3
with check("01.3", hint="threshold, label, largest, box") as ask:
    toy = np.zeros((12, 16))
    toy[0, 1:3] = toy[0, 15] = toy[2, 8:15] = 1.2               # three small regions,
    toy[2:4, 1:4] = 2.0                                         # the hottest one,
    toy[5:10, 7:13] = toy[4, 6] = 1.5                # the largest, touching at a corner
    toy[5:8, 13:] = 1.0, 0.7, 0.3                               # and its slope
    same(ask(region_box, toy, 0.5), (6, 4, 13, 10), "region_box(toy, 0.5)", suspects={
        "That is the box around everything above the threshold: only the largest "
        "connected region counts.": (1, 0, 16, 10),
        "Rows and columns are exchanged: x runs along columns, and np.nonzero gives "
        "the rows first.": (4, 6, 10, 13),
        "x1 and y1 are the last pixels themselves: they should lie one past them.":
            (6, 4, 12, 9),
        "The last two numbers are width and height: (x0, y0, x1, y1) is asked for.":
            (6, 4, 7, 6),
        "Pixels that touch at a corner belong together: label needs np.ones((3, 3)).":
            (7, 5, 13, 10), "A pixel at the threshold itself was kept: above means >.":
            (6, 4, 14, 10),
        "That is the hottest region. The largest one counts, whoever has the peak.":
            (1, 2, 4, 4),
        "That is region 1, the first. The largest one counts.": (1, 0, 3, 1),
        "That is the region before the largest one. Regions are numbered from 1: is "
        "a + 1 missing?": (8, 2, 15, 3),
        "That is the whole image: did the background win? Region 0 is outside.":
            (0, 0, 16, 12),
        "The threshold is a share of the maximum, which is 2 here: you used it as an "
        "absolute value.": (6, 4, 15, 10),
        "The threshold is a share of the maximum: you took that of the mean.":
            (6, 4, 16, 10)})
### BEGIN HIDDEN TESTS
ring = np.zeros((9, 9)); ring[1:8, 1:8] = 1.0; ring[3:6, 3:6] = 0.0
assert region_box(ring, 0.5) == (1, 1, 8, 8)
edge = np.zeros((5, 5)); edge[0, 0] = edge[1, 1] = 2.0
assert region_box(edge, 0.9) == (0, 0, 2, 2)
assert region_box(np.array([[0.0, 0.5, 1.0]]),
                  0.5) == (2, 0, 3, 1), "above means >, not >="
### END HIDDEN TESTS

# %% [markdown]
# Turn the threshold and watch the box. (These pages need no kernel. The library's `maps.box` follows the benchmark to the
# letter: it takes 8-bit levels, fills holes, and keeps x1 and y1 inside the image at the border. So your box may differ from it
# by a pixel.)
#
# *Before you run the cells:* which threshold gives the box with the largest IoU here?

# %% tags=["prediction"]
lesson.predict("01.c", None)     # your guess: 0.0, 0.1, ... or 0.9

# %%
def library_box(heatmap, threshold):
    """maps.box of one heatmap, as four ints."""
    return tuple(maps.box(torch.as_tensor(heatmap), threshold).tolist())

box_at = yours("01.3", region_box, library_box)
truth, steps = scene.boxes[0], [round(0.1 * i, 1) for i in range(10)]
boxes = {t: torch.tensor(box_at(heat[0].numpy(), t)) for t in steps}
overlap = {t: iou(box[None], torch.tensor(truth)[None]).item()
           for t, box in boxes.items()}

def page(t):
    kept = (heat[0] > t * heat[0].max()).to(torch.uint8)
    return plots.grid([plots.overlay(picture, heat[0]), picture],
                      [f"box of the {first}, IoU {overlap[t]:.2f}",
                       "pixels above the threshold"], columns=2, side=2.8,
                      masks=[torch.zeros_like(kept), kept], boxes=[truth] * 2,
                      predicted=[boxes[t]] * 2)

widgets.flipbook(page, steps, label="threshold, share of the maximum", alt=lambda t: (
    f"Heatmap of the {first}; its box at threshold {t} is {boxes[t].tolist()}, the "
    f"true one {truth.tolist()}, their IoU {overlap[t]:.2f}."))
lesson.outcome("01.c", max(overlap, key=overlap.get))

# %% [markdown]
# Now choose the class and the threshold yourself:

# %% tags=["widget"]
guesses = scene_logits[0].topk(6).indices.tolist()
choices = {names[i]: i for i in dict.fromkeys([*rows, *guesses])}

def steer(label, threshold):
    heat = maps.heatmap(maps.cam(scene_features, weight[[label]]), 224)[0, 0].cpu()
    title = f"{names[label]}: logit {scene_logits[0, label]:.2f}"
    return plots.grid([plots.overlay(picture, heat)], [title], boxes=[scene.boxes],
                      predicted=[maps.box(heat, threshold)], columns=1, side=3.6)

steering = widgets.live(steer,
                        alt=lambda label, threshold: f"Heatmap of {names[label]} on "
                                                     f"{first} and {second}, with its "
                                                     f"box, threshold {threshold:.2f}.",
                        label=ipywidgets.Dropdown(options=choices, description="class"),
                        threshold=ipywidgets.FloatSlider(
                            0.2, min=0.0, max=0.95, step=0.05, continuous_update=False))
steering

# %% [markdown]
# ## A wrong map that looks right
#
# DenseNet ends in a batch normalisation and then a ReLU. In torchvision that ReLU is no module: it is a line inside `forward`.
# Whoever takes "the output of the last block" gets the values **before** the ReLU, and a map that looks like any other. The
# weights here are random, because nothing can be downloaded for certain. The identity holds for random weights, too.
#
# *Before you run the cells:* one map is made from "the last block", the other from "after the hidden ReLU". Which one has the
# logit as its mean?

# %% tags=["prediction"]
lesson.predict("01.d", None)     # "the last block" or "after the hidden ReLU"

# %%
densenet = densenet121(weights=None, num_classes=10).eval().requires_grad_(False)
image = picture[None] / 255
with torch.inference_mode():
    answer = densenet(image)
    proper, linear = backbones.split_classifier(densenet)
    taps = {"the last block": densenet.features(image),
            "after the hidden ReLU": proper(image)}
tapped = [maps.cam(tap, linear.weight) for tap in taps.values()]         # 1 10 7 7 each
off = {name: (m.mean((2, 3)) + linear.bias - answer).abs().max().item()
       for name, m in zip(taps, tapped)}
plots.show(plots.grid(
    [picture] * 2, [f"{name}\noff by {d:.1e}" for name, d in off.items()],
    heatmaps=[maps.heatmap(m, 224)[0, 0] for m in tapped], columns=2, side=2.8,
    title="Two maps of one network; the identity tells which one is right"),
           alt="Two heatmaps of an untrained DenseNet on the scene with two objects, "
               "made before and after its hidden ReLU. Nothing in the pictures says "
               "which one is right.")
wrong_tap, right_tap = off.values()
lesson.outcome("01.d", min(off, key=off.get))
lesson.claim(f"Before the hidden ReLU the identity is off by {wrong_tap:.2f}, after it "
             f"by {right_tap:.0e}.", wrong_tap > 1e-2 > 1e-4 > right_tap)
lesson.record("identity of a DenseNet without its ReLU: off by", wrong_tap,
              note="with it: rounding")

# %% [markdown]
# `backbones.split_classifier` runs this test on every network that it takes apart. It refuses networks that do not end in pooling
# and one linear layer, because CAM is not defined for them:

# %%
for unsuitable in ("vgg11", "convnext_atto", "mobilenetv3_small_050"):
    with expect_error(ValueError):
        backbones.split_classifier(timm.create_model(unsuitable))

# %% [markdown]
# ## How good is a map?
#
# One picture proves nothing. **Weakly supervised localisation** compares the box that is read from a map with the box that a
# person drew (here: the box of the exact mask). It counts as right if their intersection over union (IoU) is at least 0.5.
#
# | measure | question |
# |---|---|
# | GT-known | the true class is given: is the box right, at the threshold 0.2 of the CAM paper? |
# | MaxBoxAcc | the same at the best threshold, **one for all images** |
# | MaxBoxAccV2 | the same for IoU 0.3, 0.5 and 0.7, any region may match; mean of the three |
# | top-1 localisation | is the box right **and** the predicted class as well? |
# | PxAP | average precision of the heatmap's pixels against the mask |
#
# Beside each of them stand two **baselines** that do not look at the image, a box in its centre and the whole image, and one
# **control**: the sum of all channels, which knows no class.
#
# *Before you run the cells:* objects in photographs are often large and in the middle. How often is the best centred box
# right?

# %% tags=["prediction"]
lesson.predict("01.e", None)     # your guess, in %

# %%
root = lesson.data / "ilsvrc2012"
if lesson.profile != "paper":
    root = minis.mini_ilsvrc(lesson.data, seed=SEED)
data = Ilsvrc(root, "val")
print(data)
scores = {"CAM": (MaxBoxAcc(), PxAP()), "no class": (MaxBoxAcc(), PxAP())}
cam_maps, true_boxes = [], []
batches = data.batches(batch_size=16)
limit = lesson.choose(smoke=3, mini=None, paper=None)
for batch in tqdm(islice(batches, limit), "CAM and its control", limit or len(batches)):
    features, logits = look(batch.images)
    own = weight[batch.labels.to(lesson.device)][:, None]          # b 1 1280, its class
    both = {"CAM": maps.weighted_map(features, own)[:, 0],
            "no class": features.sum(1)}                                  # b 7 7
    cam_maps.append(both["CAM"].cpu())
    true_boxes += batch.boxes
    for name, (of_boxes, pixels) in scores.items():
        heated = maps.heatmap(both[name], 224).cpu()
        of_boxes.accumulate(heated, batch.boxes, logits.argmax(1).cpu() == batch.labels)
        if batch.masks is not None:
            pixels.accumulate(heated, batch.masks)
cam, no_class = (of_boxes.compute() for of_boxes, _ in scores.values())

# %%
display(Markdown(cam.table()))
lesson.outcome("01.e", 100 * cam.centre_best, "%")
lesson.claim(f"CAM finds {cam.max_box_acc:.0%} of the objects at its best threshold, "
             f"the best centred box {cam.centre_best:.0%}, the whole image "
             f"{cam.whole_image:.0%}.",
             cam.max_box_acc > max(cam.centre_best, cam.whole_image) + 0.1)

# %%
figure = plots.curve(HEATMAP_THRESHOLDS,
                     {"CAM": 100 * cam.single[1], "no class": 100 * no_class.single[1]},
                     best=True, xlabel="threshold, share of the heatmap's maximum",
                     ylabel="GT-known localisation, % of images",
                     title=f"CAM localises {cam.max_box_acc:.0%} at its best "
                           f"threshold, {cam.gt_known:.0%} at 0.2",
                     baselines={"best centred box": 100 * cam.centre_best,
                                "whole image": 100 * cam.whole_image})
plots.show(figure,
           alt="Localisation accuracy over the threshold. CAM peaks at "
               f"{cam.max_box_acc:.0%} near {cam.best_threshold:.2f}, the sum of all "
               f"channels at {no_class.max_box_acc:.0%}; the best centred box reaches "
               f"{cam.centre_best:.0%}, the whole image {cam.whole_image:.0%}.")
by_threshold = 100 * (cam.max_box_acc - cam.gt_known)
by_class = 100 * (cam.max_box_acc - no_class.max_box_acc)
lesson.claim(f"A better threshold gains {by_threshold:.1f} points, the class "
             f"{by_class:.1f}: the choice of the threshold decides more here than the "
             "choice of the method.", by_threshold > by_class + 3)
lesson.claim("The sum of all channels, without any class, finds "
             f"{no_class.max_box_acc:.0%}, more than the best centred box.",
             no_class.max_box_acc > cam.centre_best + 0.1)

# %% [markdown]
# Three lessons follow:
#
# 1. **Ask for the whole curve**, not for one threshold. The best threshold is chosen on the images on which it is scored, so it
#    flatters every method.
# 2. **Localisation measures where, not why.** With one object in the picture, a map of no class finds it, too. Such a figure
#    cannot show that a map explains the class.
# 3. **Baselines depend on the data.** Do not compare percentages from different data sets.
#
# ### Exercise 01.4 · An experiment: which objects does a map miss? (3 points, 12 minutes)
#
# A map has 7 × 7 values, so small objects could be a problem. Find out. Write `hits_by_size(found, true, groups)`: `found` and
# `true` are boxes, `n 4`. Sort the images by the area of the **true** box, $(x_1 - x_0)(y_1 - y_0)$, smallest first. Divide them
# into `groups` groups of equal number. Return a list: for each group the share of images, 0..1, whose IoU is at least 0.5.
#
# `iou(a, b)` of the library compares **all** pairs: of `n 4` and `m 4` it makes `n m`.
#
# <details><summary>Hint 1</summary>Which of the two boxes tells how large the object is? And which entries of the table
# <code>iou(found, true)</code> belong to one image?</details>
# <details><summary>Hint 2</summary>First make one yes or no for each image, and the order of the images by area
# (<code>argsort</code>). <code>order.tensor_split(groups)</code> cuts the order into parts; each part picks its images.</details>
# <details><summary>Hint 3</summary>Another share by group: do taller players score more often? Two groups, the shorter ones first.
#
# ```python
# height = torch.tensor([201, 180, 195, 188])
# scored = torch.tensor([1.0, 0.0, 0.0, 1.0])
# ranking = height.argsort()                                # the places 1, 3, 2, 0
# [scored[half].mean().item() for half in ranking.tensor_split(2)]                 # [0.5, 0.5]
# ```
# </details>

# %% exercise="01.4"
def hits_by_size(found, true, groups):
    """Share of boxes n 4 with IoU >= 0.5, for groups of images from the smallest true
    box to the largest."""
    ### BEGIN SOLUTION
    hit = torch.tensor([iou(a[None], b[None]).item() >= 0.5
                        for a, b in zip(found, true)])
    area = (true[:, 2] - true[:, 0]) * (true[:, 3] - true[:, 1])
    order = area.argsort(stable=True)
    return [hit[part].double().mean().item() for part in order.tensor_split(groups)]
    ### END SOLUTION

# %% check="01.4" points=3
with check("01.4", hint="IoU of each image, order by true area, shares") as ask:
    gen = torch.Generator().manual_seed(0)
    corner, extent = (torch.randint(low, high, (24, 2), generator=gen)
                      for low, high in ((0, 50), (8, 70)))
    t = torch.cat((corner, corner + extent), 1)
    f = t + torch.randint(-13, 14, (24, 4), generator=gen)
    t[0], f[0] = torch.tensor([[0, 0, 19, 9], [0, 0, 9, 9]])             # IoU 0.5
    extent[0] = torch.tensor([19, 9])
    size = lambda b: (b[:, 2:] - b[:, :2]).prod(1)
    share = lambda by, ok=None: [
        float(part.double().mean())
        for part in (iou(f, t).diagonal() >= 0.5 if ok is None else ok)[
            by.argsort(stable=True)].tensor_split(3)]
    truth_here, each_iou = share(size(t)), iou(f, t).diagonal()
    same(ask(hits_by_size, f, t, 3), truth_here, "hits_by_size(found, true, 3)", {
        "You sorted by the boxes that were found: a bad box says nothing about the "
        "object. Sort by the true ones.": share(size(f)),
        "You sorted by the width alone: the area is width times height.":
            share(extent[:, 0]),
        "You did not sort the images: the groups are those of their order in the file.":
            share(torch.arange(24)),
        "The largest objects come first: smallest first is asked for.":
            truth_here[::-1],
        "You took the mean IoU: a box counts as right from 0.5 on, or not at all.":
            share(size(t), each_iou),
        "An IoU of exactly 0.5 counts as right: at least means >=.":
            share(size(t), each_iou > 0.5),
        "You counted: take the share of each group.": [8 * x for x in truth_here],
        "These are percentages: shares from 0 to 1 are asked for.":
            [100 * x for x in truth_here],
        "These are the shares of misses: count the boxes that are right.":
            [1 - x for x in truth_here]})
### BEGIN HIDDEN TESTS
boxed = torch.tensor([[0, 0, 9, 9], [0, 0, 19, 19], [0, 0, 29, 29], [0, 0, 39, 39.0]])
assert hits_by_size(boxed, boxed, 2) == [1, 1]
assert hits_by_size(boxed, boxed.flip(0), 4) == [0, 0, 0, 0]
### END HIDDEN TESTS

# %% [markdown]
# ### The experiment on all images
#
# *Before you run the cells:* how many objects does CAM find in the quarter of the images with the smallest ones?

# %% tags=["prediction"]
lesson.predict("01.f", None)     # your guess, in %

# %%
by_size = yours("01.4", hits_by_size, localization.hits_by_size)
centre = localization.baseline_boxes((224, 224))[
    int(20 * cam.centre_best_share) - 1]
found, true = [], []
for part in tqdm(torch.cat(cam_maps).split(64), "boxes at the best threshold"):
    found.append(maps.box(maps.heatmap(part, 224), cam.best_threshold))
found = torch.cat(found)
for box, objects in zip(found, true_boxes):   # of several objects the one that fits
    true.append(objects[iou(box[None], objects).argmax()])
true = torch.stack(true)
quarters = {"CAM": by_size(found, true, 4),
            "best centred box": by_size(centre.expand_as(found), true, 4)}
lines = ["| quarter of the images | smallest objects | second | third | largest |",
         "|---|---|---|---|---|"]
for name, shares in quarters.items():
    lines.append(f"| {name} | " + " | ".join(f"{x:.0%}" for x in shares) + " |")
display(Markdown("\n".join(lines)))

# %%
small, large = quarters["CAM"][0], quarters["CAM"][-1]
lesson.outcome("01.f", 100 * small, "%")
lesson.claim(f"CAM finds {small:.0%} of the smallest objects and {large:.0%} of the "
             "largest.", large > small + 0.2)
blind_small, *_, blind_large = quarters["best centred box"]
lesson.claim(f"The best centred box finds {blind_small:.0%} of the smallest and "
             f"{blind_large:.0%} of the largest: large objects are found without "
             "looking.", blind_large > blind_small + 0.3)
lesson.claim("On the largest objects the centred box is even better than CAM, "
             f"{blind_large:.0%} against {large:.0%}; CAM gains its lead on the "
             "others.", blind_large > large + 0.03)

# %% [markdown]
# Here are some images, at the best threshold:

# %%
batch = next(iter(data.batches(batch_size=8)))
last = maps.heatmap(torch.cat(cam_maps)[:8], 224)
hits = [iou(box[None], given).max().item() for box, given in zip(found, batch.boxes)]
labels = [names[label] for label in batch.labels]
plots.show(plots.grid(batch.images,
                      [f"{name}\nIoU {hit:.2f}" for name, hit in zip(labels, hits)],
                      heatmaps=last, boxes=batch.boxes, predicted=list(found[:8]),
                      title="CAM of the true class, its box and the true one"),
           alt="Scenes under their heatmaps with a solid true and a dashed predicted "
               "box. Intersections over union: "
           + ", ".join(f"{n} {hit:.2f}" for n, hit in zip(labels, hits)) + ".")

# %% [markdown]
# ## What was measured
#
# The papers' figures belong to real ILSVRC photographs and other networks. They stand beside ours for orientation, not for
# comparison. The scenes of one photograph are not independent of each other, so differences of a few points mean little here.

# %%
percent = {"class accuracy": cam.accuracy,
           "GT-known localisation, threshold 0.2": cam.gt_known,
           "MaxBoxAcc": cam.max_box_acc, "MaxBoxAccV2": cam.max_box_acc_v2,
           "MaxBoxAcc of the sum of all channels": no_class.max_box_acc,
           "baseline: best centred box": cam.centre_best,
           "baseline: centred half of the image": cam.centre_half,
           "baseline: whole image": cam.whole_image,
           "smallest quarter of the objects found": small,
           "largest quarter of the objects found": large}
lesson.record("images", cam.images)
lesson.record("best threshold of CAM", cam.best_threshold)
for name, value in percent.items():
    lesson.record(name, 100 * value, "%")
lesson.record("top-1 localisation error, best threshold", 100 * (1 - cam.top1_best),
              "%", paper=56.2,
              note="paper: ResNet-50 on ILSVRC val (Shen et al., Table 1)")
lesson.record("top-1 localisation error, threshold 0.2", 100 * (1 - cam.top1), "%")
if data.photos[0].mask:
    for name, (_, pixels) in scores.items():
        lesson.record(f"PxAP, {name}", 100 * pixels.compute(), "%")
lesson.finish(fingerprint=fingerprint(root))

# %% [markdown]
# ## You can now
# - write CAM in one line, for all classes at once, and say why its mean plus the bias *is* the logit;
# - use that identity to expose a map that was taken from the wrong place;
# - go from a map to a heatmap to a box, and name the choices on the way;
# - measure localisation with its baselines and by the size of the objects, and say what it cannot show.
#
# **To go deeper** · Add the same number to one weight of **all** classes: do the predictions change? Does the map? (Lesson 02
# comes back to this.) · In Table 1 of Shen et al. CAM errs more on the three DenseNets (62.4, 62.3, 62.5 %) than on ResNet-18
# (59.5 %). Which mistake of this lesson could do that, and how would you find out?
#
# **Where things are** · `maps.cam` (Zhou et al., Eq. 2), `maps.heatmap`, `maps.box` in `course_lib/maps.py`; all thresholds in one
# pass in `course_lib/components.py`; the measures in `course_lib/evaluate/localization.py`.
#
# {{next}}
