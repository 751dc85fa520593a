# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 00 · Tour: photographs, masks, devices, and how to work here
#
# {{badge}}
#
# **You will**
# 1. see that your machine is ready, and what the profiles `smoke`, `mini` and `paper` mean;
# 2. see the pictures of this course, and know why each of them comes with an exact mask;
# 3. know how predictions, exercises, hints and checks work, and do a first experiment.
#
# **Time** 20 minutes to work through; the computer needs under a minute on a CPU.
# **Before** Some Python and PyTorch: tensors, indexing, a forward pass.

# %% tags=["parameters"]
# "smoke": seconds, does it run? · "mini": minutes on a CPU · "paper": the real
# benchmark, on a GPU
PROFILE = "mini"
DATA_ROOT = ""      # "" finds the data folder; a path if your benchmarks lie elsewhere
DEVICE = "auto"     # "auto", "cpu" or "cuda"
SEED = 0

# %% tags=["setup"]
# {{setup}}
import torch
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from course_lib import backbones, checks, maps
from course_lib.worlds import photographs as fetch, minis, scenes
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.images import load
from course_lib.evaluate import controls
from course_lib.show import plots, widgets
from course_lib.checks import check, expect_error, same, yours
from course_lib.lesson import start

lesson = start("00", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## What this course is about
#
# A network learns from labels such as "there is a cat in this photograph". Nobody tells it *where* the cat is. It still finds the
# place. This course follows one idea from that observation to segmentation without a single mask drawn by hand:
#
# > **A map is a weighted sum of feature channels. The methods differ only in where the weights come from.**
#
# | lessons | the weights come from | and give |
# |---|---|---|
# | 01 | a linear classifier (CAM) | heatmaps, boxes |
# | 02–06 | a distance to a prototype (Dist-CAM) | heatmaps for networks without a classifier: few-shot learning, retrieval, re-identification |
# | from 07 on | prototypes of pixels | masks learned from image tags |
#
# ## Words
#
# `b` counts images, `c` classes, `k` channels. `h w` is the coarse grid of the features, `H W` that of the image. Every lesson
# explains its new words in a list like this one:
#
# {{words}}

# %% [markdown]
# ## Photographs
#
# Seven example photographs come with Python packages, so nothing has to be fetched for them.

# %%
names = ["chelsea", "coffee", "motorcycle_left", "rocket", "astronaut", "flower",
         "china"]
photographs = [load(fetch.example(name, lesson.data)) for name in names]
squares = [transforms.resize(photograph, [224, 224]) for photograph in photographs]
plots.show(plots.grid(squares, [f"{name}\n{p.shape[2]} × {p.shape[1]}"
                                for name, p in zip(names, photographs)],
                      title="Example photographs, squashed to 224 × 224 as the "
                            "networks will see them"),
           alt="Seven photographs: a cat, a cup of coffee, a red motorcycle, a rocket "
               "at night, an astronaut, an orange flower, a pagoda. All are squashed "
               "to squares.")

# %% [markdown]
# ## Scenes: photographs whose masks we know exactly
#
# To judge *where* a network looks, one must know where things *are*. So the course composes its own scenes. Photographs of
# objects are cut out along their outline and pasted onto photographs of backgrounds. The outline gives an exact mask and an
# exact box. Objects and backgrounds are split between training and validation **before** anything is composed. So no network is
# tested on a bird that it has seen.
#
# The first call fetches the photographs from a package of your Linux distribution and checks each file by its hash.

# %%
photos = fetch.photographs(lesson.data)
print(photos)
world = scenes.photo_world(photos, "group", SEED)

# %%
classes = ["background", *world.classes.values()]
drawn = [scenes.random_scene(world, "train", (256, 224), seed)
         for seed in range(SEED, SEED + 4)]
figure = plots.grid([scene.image for scene in drawn] * 2,
                    masks=[torch.zeros(224, 256, dtype=torch.uint8)] * 4
                    + [scene.mask for scene in drawn],
                    classes=classes, title="Scenes, and below them their class masks")
plots.show(figure, alt="Four composed scenes with one to three objects on photographed "
                       "backgrounds. In the row below, each object is tinted in the "
                       "colour of its class, exactly along its outline.")

# %% [markdown]
# **The same random seed gives the same bytes.** Turn the pages with the mouse or the arrow keys. This figure needs no running
# kernel.

# %%
def page(seed):
    scene = scenes.random_scene(world, "val", (256, 224), seed)
    named = ", ".join(classes[label + 1] for label in scene.labels)
    return plots.grid([scene.image, scene.image], [f"scene {seed}", named],
                      boxes=[None, scene.boxes], columns=2, side=2.6)

def describe(seed):
    scene = scenes.random_scene(world, "val", (256, 224), seed)
    return f"Scene {seed}: " + ", ".join(f"{classes[c + 1]} in the box "
                                         f"{tuple(map(int, b))}"
                                         for c, b in zip(scene.labels, scene.boxes))

widgets.flipbook(page, range(8), label="random seed", alt=describe)
first, again, other = (scenes.random_scene(world, "val", (256, 224), seed).image
                       for seed in (3, 3, 4))
lesson.claim("Scene 3 made twice is the same in every byte; scene 4 is another one.",
             (first == again).all() and (first != other).any())

# %% [markdown]
# A second world needs no photograph at all. It has creatures whose **head** carries the class, and whose body says little. Later
# lessons use it to find out whether a map shows the whole animal or the head alone.

# %%
creatures = [scenes.random_scene(scenes.creature_world(), "train", (224, 224), seed)
             for seed in range(4)]
kinds = list(scenes.creature_world().classes.values())
plots.show(
    plots.grid([scene.image for scene in creatures],
               [", ".join(kinds[c].split()[0] for c in s.labels) for s in creatures],
               title="Procedural creatures: the texture of the head is the class"),
    alt="Four scenes with drawn four-legged creatures on blurred coloured ground; "
        "their round heads carry dots, stripes, rings, checkers, crosses or grids.")

# %% [markdown]
# ## A benchmark in miniature, in the real layout
#
# Every benchmark of the course has a miniature in **exactly** the layout of the real one, read by the same reader. This is
# ILSVRC 2012 (classification and localisation) with ImageNet's own classes. To use the real one, give its folder instead.

# %%
folder = minis.mini_ilsvrc(lesson.data)
data = Ilsvrc(folder, "val")
print(data)
batch = next(iter(data.batches(batch_size=8)))
label_names = list(data.classes.values())
plots.show(plots.grid(batch.images,
                      [label_names[label].split(",")[0] for label in batch.labels],
                      boxes=batch.boxes, title="mini-ilsvrc, val: one object a scene, "
                                               "its class and its box"),
           alt="Eight scenes, each with one object, its class name above and a box "
               "around it.")

# %% [markdown]
# If a data set is broken, its reader says so and names the first file that is missing or broken:

# %%
with expect_error(FileNotFoundError):
    Ilsvrc(lesson.data / "no-such-folder")

# %% [markdown]
# ## A network in two parts
#
# Every network of this course ends in the same way. A **backbone** makes a feature map, its average over all positions is the
# **pooled feature** (global average pooling, GAP), and one **linear layer** makes a logit of it for each class. This network is
# an EfficientNet-lite0 with real ImageNet weights, which came as a package.
#
# *Before you run the cells:* the image has 224 × 224 pixels, and the network halves the resolution five times. How many
# positions does each row of the feature map have? Write your guess in place of `None`. The lessons ask for many predictions.
# They cost nothing, and each is shown beside what came.

# %% tags=["prediction"]
lesson.predict("00.a", None)     # your guess, a number of positions

# %%
network = backbones.create("tf_efficientnet_lite0").to(lesson.device)
with torch.inference_mode():
    images = torch.stack(squares).to(lesson.device)                 # 7 3 224 224, uint8
    features = network.features(network.normalise(images))                # 7 1280 7 7
    pooled = features.mean((2, 3))                                        # 7 1280
    scores = network.classifier(pooled).softmax(1)                        # 7 1000
print("feature map", tuple(features.shape), "· pooled", tuple(pooled.shape), "· scores",
      tuple(scores.shape))
lesson.outcome("00.a", features.shape[-1])
class_names = [name for _, name in backbones.imagenet_classes()]
said = {}
for name, (score, label) in zip(names, zip(*scores.max(1))):
    said[name] = class_names[label]
    print(f"{name:16} {class_names[label]:18} {100 * score:3.0f} %")

# %%
known = {"chelsea": "Egyptian cat", "coffee": "espresso", "motorcycle_left": "moped"}
lesson.claim("The network knows the cat, the coffee and the motorcycle: it says "
             + ", ".join(said[name] for name in known) + ".",
             all(said[name] == word for name, word in known.items()))
lesson.claim(f"It calls the pagoda “{said['china']}” and the astronaut "
             f"“{said['astronaut']}”. A course that showed only successes would teach "
             "little.", said["astronaut"] not in ("astronaut", "space suit"))

# %% [markdown]
# ## A channel is a picture
#
# Each channel of the feature map can be drawn over the photograph. The three channels that are most active for the cat are not
# the best choice: some of them look alike. So each channel after the first is the most active one whose picture correlates by
# less than 0.5 with those before it.
#
# *Before you run the cells:* correlation is 1 for equal pictures and 0 for unrelated ones. What do you expect for the two most
# active channels?

# %% tags=["prediction"]
lesson.predict("00.b", None)     # your guess, -1 to 1

# %%
cat = features[0].cpu()                                                   # 1280 7 7
ranking = cat.mean((1, 2)).argsort(descending=True).tolist()
twins = controls.map_correlation(cat[ranking[0]], cat[ranking[1]]).item()
lesson.outcome("00.b", twins)
chosen = ranking[:1]
for channel in ranking:
    like = controls.map_correlation(cat[chosen], cat[channel].expand(len(chosen), 7, 7))
    if len(chosen) < 3 and like.max() < 0.5:
        chosen.append(channel)
print("channels", *chosen, "of the ranking", *(ranking.index(c) + 1 for c in chosen))

# %%
heat = maps.heatmap(cat[chosen], 224)
plots.show(plots.grid([squares[0]] * 3, [f"channel {channel}" for channel in chosen],
                      heatmaps=heat, columns=3,
                      title="Three active channels of 1280, each with a picture of "
                            "its own"),
           alt="The photograph of the cat three times, overlaid with the activation of "
               f"one channel each: channels {', '.join(map(str, chosen))}.")

# %% [markdown]
# ## How exercises work
#
# An exercise is a function to write. Below it stands a **check** that answers like a tutor: `[PASS]`, `[FAIL]` with the most
# likely reason, or `[TODO]` if nothing was written. A check does not stop *Run all*. Three hints are hidden behind triangles;
# take one at a time. Once your function passes, the next pictures are drawn with it. Here is a check at work on three answers
# to "the pooled feature of a feature map":

# %%
answers = {
    "right": lambda f: f.mean((2, 3)),
    "summed": lambda f: f.sum((2, 3)),
    "wrong axes": lambda f: f.mean((0, 1)),
}
for name, answer in answers.items():
    try:
        with check(f"example: {name}"):
            same(answer(features), features.mean((2, 3)), "the pooled feature",
                 axes="b k", suspects={"You summed over the positions: GAP divides by "
                                       "their number.": lambda: features.sum((2, 3))})
    except AssertionError:
        print("   (while work is graded, a failed check also raises)")
checks.status.clear()                # the three answers above were only a demonstration

# %% [markdown]
# ## A first experiment
#
# ### Exercise 00.1 · Does the answer survive? (2 points, 8 minutes)
#
# Is it the object that the network knows, or the photograph just as it is? Change the photographs and see. Write
# `survives(classify, images, change)`: the share of images, 0..1, that get the same class before and after the change.
#
# | argument | |
# |---|---|
# | `classify` | a function of images `b 3 H W` that returns scores `b c`; the class is the one with the largest score |
# | `images` | `b 3 H W` |
# | `change` | a function of images that returns changed images |
#
# <details><summary>Hint 1</summary>How often does <code>classify</code> have to be called, and with which images?</details>
# <details><summary>Hint 2</summary><code>scores.argmax(dim=1)</code> is the class of each image. Two such rows can be compared with
# <code>==</code>; the mean of yes and no, as numbers, is a share.</details>
# <details><summary>Hint 3</summary>Another comparison of two rows: on how many of four days was the same city the warmest for two
# forecasts?
#
# ```python
# first = torch.tensor([[20, 25], [18, 17], [22, 24], [19, 15]])               # day, city
# second = torch.tensor([[21, 24], [16, 18], [20, 26], [20, 14]])
# (first[:, 0] > first[:, 1]).eq(second[:, 0] > second[:, 1]).sum()            # tensor(3)
# ```
# </details>

# %% exercise="00.1"
def survives(classify, images, change):
    """Share of images b 3 H W, 0..1, whose class is the same after the change."""
    ### BEGIN SOLUTION
    before = classify(images).argmax(dim=1)
    after = classify(change(images)).argmax(dim=1)
    return (before == after).double().mean().item()
    ### END SOLUTION

# %% check="00.1" points=2
with check("00.1", hint="the class before, the class after, the share") as ask:
    gen = torch.Generator().manual_seed(0)
    shots = torch.rand(8, 3, 2, 2, generator=gen)                # 8 tiny photographs
    brightest = lambda x: x.flatten(2).mean(2)                   # 3 classes: red, ...
    flip = lambda x: x.flip(1) * 1.01                             # red and blue change
    one, two = brightest(shots), brightest(flip(shots))
    share = lambda yes: yes.double().mean().item()
    right_share = share(one.max(1).indices == two.max(1).indices)
    came = ask(survives, brightest, shots, flip)
    assert came is not None, "The result is None: does your function end with `return`?"
    assert not (torch.is_tensor(came) and came.ndim), (
        "Expected one number for all images, got one for each: take the mean.")
    same(came, right_share, "the share of images with the same class", {
        "You compared the largest scores: compare the classes that have them.":
            share(one.amax(1) == two.amax(1)),
        "You compared all scores: compare the classes with the largest ones.":
            share((one - two).abs() < 0.2),
        "That is the share of images whose class changes.": 1 - right_share,
        "You counted the images: divide by their number.": 8 * right_share,
        "Nothing was changed: the second answer is that to change(images).": 1.0,
        "You took the image with the largest score for each class: the class of an "
        "image lies along the other axis.":
            share(one.max(0).indices == two.max(0).indices),
        "That is a percentage: a share from 0 to 1 is asked for.": 100 * right_share})
### BEGIN HIDDEN TESTS
shade = torch.tensor([[[[1.0]], [[0.0]]], [[[0.0]], [[1.0]]], [[[2.0]], [[3.0]]]])
assert survives(lambda x: x.flatten(1), shade, lambda x: x) == 1
assert survives(lambda x: x.flatten(1), shade, lambda x: x.flip(1)) == 0
assert abs(survives(lambda x: x.flatten(1), shade,
                    lambda x: x * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)) - 1 / 3
           ) < 1e-6
### END HIDDEN TESTS

# %% [markdown]
# *Before you run the cells:* 32 scenes are mirrored (left and right exchanged). How many of them keep their class?

# %% tags=["prediction"]
lesson.predict("00.c", None)     # your guess, in %

# %%
def classify(pictures):
    """Logits of uint8 images."""
    with torch.inference_mode():
        maps_of = network.features(network.normalise(pictures.to(lesson.device)))
        return network.classifier(maps_of.mean((2, 3))).cpu()

CHANGES = {"mirrored": lambda x: x.flip(3), "upside down": lambda x: x.flip(2),
           "half as bright": lambda x: x // 2,
           "grey": lambda x: x.float().mean(1, keepdim=True).byte().expand_as(x)}
experiment = yours("00.1", survives, controls.same_answers)
many = next(iter(data.batches(batch_size=32))).images
kept = {name: 100 * experiment(classify, many, change)
        for name, change in tqdm(CHANGES.items(), "changes")}
lesson.outcome("00.c", kept["mirrored"], "%")
print(*(f"{name:15} {percent:3.0f} % keep their class"
        for name, percent in kept.items()), sep="\n")
lesson.claim(f"More scenes keep their class mirrored ({kept['mirrored']:.0f} %) than "
             f"upside down ({kept['upside down']:.0f} %).",
             kept["mirrored"] > kept["upside down"] + 10)

# %% [markdown]
# Training usually mirrors photographs at random, and does not turn them upside down. What a network knows depends on what it was
# shown.

# %% [markdown]
# ## What was measured
#
# Each lesson ends like this. Its figures go to a file, with the versions, the random seed and the fingerprint of the data.

# %%
lesson.record("cut-out photographs", len(photos.cutouts))
lesson.record("backgrounds", len(photos.backgrounds))
lesson.record("photographs missing here", len(photos.missing),
              note="left out, and part of the fingerprint")
lesson.record("mini-ilsvrc, validation images", len(data))
for name, percent in kept.items():
    lesson.record(f"scenes that keep their class, {name}", percent, "%")
lesson.record("score of the cat", 100 * scores[0].max().item(), "%",
              note=class_names[scores[0].argmax()])
lesson.record("correlation of the two most active channels", twins)
lesson.finish(fingerprint=photos.fingerprint)

# %% [markdown]
# ## You can now
# - say what a feature map, a pooled feature, a weight, a map and a heatmap are, with their shapes;
# - make scenes with exact masks from a random seed, and read a benchmark in its real layout;
# - make a prediction, and work through an exercise with its hints and its check.
#
# **To go deeper** · Why must the *backgrounds* be split between training and validation, too? · A pasted object has crisp
# edges and floats in the air: which results of this course could be too good because of that?
#
# {{next}}
