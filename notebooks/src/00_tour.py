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
# 2. meet the pictures of this course, and know why each of them comes with an exact mask;
# 3. know how exercises, hints and checks work, and what the words *feature map*, *weight*, *map* and *heatmap* stand for.
#
# **Time** 15 minutes to read; under a minute on a CPU.
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

from course_lib import backbones, maps
from course_lib.worlds import photographs as fetch, minis, scenes
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.images import load
from course_lib.show import plots, widgets
from course_lib.checks import check, expect_error, same
from course_lib.lesson import start

lesson = start("00", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## What this course is about
#
# A network that was told nothing but "there is a cat in this photograph" knows more than it was told: *where* the cat is.
# The course follows one idea from that observation to segmentation without a single hand-drawn mask:
#
# > **A map is a weighted sum of feature channels. The methods differ only in where the weights come from.**
#
# | lessons | the weights come from | and give |
# |---|---|---|
# | 01 | a linear classifier (CAM) | heatmaps, boxes |
# | 02–06 | a distance to a prototype (Dist-CAM) | heatmaps for networks without a classifier: few-shot learning, retrieval, re-identification |
# | 07–10 | prototypes of pixels (pixel-to-prototype contrast) | masks learned from image tags |
#
# One small vocabulary serves all of them:
#
# | word | meaning | shape |
# |---|---|---|
# | feature map | last convolutional output of a backbone | `b k h w` |
# | pooled feature | its global average (GAP) | `b k` |
# | weight | one number for each channel and class | `c k` |
# | map | weighted sum of channels, raw | `b c h w` |
# | heatmap | a map at image size, scaled to 0..1 for each image | `b c H W` |
# | prototype | the mean feature of a class | `c k` |
#
# `b` counts images, `c` classes, `k` channels; `h w` is the coarse grid of the features, `H W` that of the image.

# %% [markdown]
# ## Photographs
#
# Seven example photographs come with Python packages and are here at once.

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
# Whoever wants to know *where* a network looks needs to know where things *are*. So the course composes its own scenes:
# photographs of objects, cut out along their outline, are pasted onto photographs of backgrounds. The outline gives an exact
# mask and an exact box. Objects and backgrounds are split between training and validation **before** anything is composed, so
# that no network is tested on a bird that it has seen.
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
# **Same seed, same bytes.** Turn the pages with the mouse or the arrow keys; this figure needs no running kernel.

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

widgets.flipbook(page, range(8), label="seed", alt=describe)
first, again = (scenes.random_scene(world, "val", (256, 224), 3).image
                for _ in range(2))
assert (first == again).all()

# %% [markdown]
# There is a second world that needs no photograph at all: creatures whose **head** carries the class and whose body says
# little. It will catch maps that find heads where they should find animals.

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
# A reader that meets a broken data set says so, and names the first file that is missing or broken:

# %%
with expect_error(FileNotFoundError):
    Ilsvrc(lesson.data / "no-such-folder")

# %% [markdown]
# ## A network in two parts
#
# Every network of this course ends in the same way: a **feature map**, its average over all positions (**global average
# pooling**, GAP), and one **linear layer**. This one is an EfficientNet-lite0 with real ImageNet weights that came as a
# package.
#
# *Before you run the cell:* the image has 224 × 224 pixels and the network halves the resolution five times. How large is
# the feature map?

# %%
network = backbones.create("tf_efficientnet_lite0").to(lesson.device)
with torch.inference_mode():
    images = torch.stack(squares).to(lesson.device)                 # 7 3 224 224, uint8
    features = network.features(network.normalise(images))                # 7 1280 7 7
    pooled = features.mean((2, 3))                                        # 7 1280
    scores = network.classifier(pooled).softmax(1)                        # 7 1000
print("feature map", tuple(features.shape), "· pooled", tuple(pooled.shape), "· scores",
      tuple(scores.shape))
class_names = [name for _, name in backbones.imagenet_classes()]
for name, (score, label) in zip(names, zip(*scores.max(1))):
    print(f"{name:16} {class_names[label]:18} {100 * score:3.0f} %")

# %% [markdown]
# It knows the cat, the espresso and the motorcycle (ImageNet's word is "moped"), and it is wrong about the rest: a course
# that showed only the successes would teach little.
#
# One channel of the feature map is already a picture. Here are the three that are most active for the cat:

# %%
cat = features[0]                                                         # 1280 7 7
best = cat.mean((1, 2)).topk(3).indices
heat = maps.heatmap(cat[best], 224).cpu()
plots.show(plots.grid([squares[0]] * 3,
                      [f"channel {channel}" for channel in best.tolist()],
                      heatmaps=heat, columns=3,
                      title="Three of 1280 channels: each fires in places of its own"),
           alt="The photograph of the cat three times, overlaid with the activation of "
               "one channel each; the bright regions differ from channel to channel.")

# %% [markdown]
# ## How exercises work
#
# An exercise is a function to write. Below it stands a **check** that answers like a tutor: `[PASS]`, `[FAIL]` with the most
# likely reason, or `[TODO]` as long as nothing was written. A check never stops *Run all*. Three hints hide behind
# triangles; take one at a time. Here is a check at work on three answers to "the pooled feature of a feature map":

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

# %% [markdown]
# ## What was measured
#
# Each lesson ends like this: its figures go to a file, with the versions, the seed and the fingerprint of the data.

# %%
from course_lib import checks

checks.status.clear()                # the three answers above were only a demonstration
lesson.record("cut-out photographs", len(photos.cutouts))
lesson.record("backgrounds", len(photos.backgrounds))
lesson.record("photographs missing here", len(photos.missing),
              note="left out, and part of the fingerprint")
lesson.record("mini-ilsvrc, validation images", len(data))
lesson.record("score of the cat", 100 * scores[0].max().item(), "%",
              note=class_names[scores[0].argmax()])
assert tuple(features.shape[1:]) == (1280, 7, 7)
assert (class_names[scores[0].argmax()] == "Egyptian cat"
        and class_names[scores[1].argmax()] == "espresso")
lesson.finish(fingerprint=photos.fingerprint)

# %% [markdown]
# ## You can now
# - say what a feature map, a pooled feature, a weight, a map and a heatmap are, with their shapes;
# - make scenes with exact masks from a seed, and read a benchmark in its real layout;
# - work through an exercise with its hints and its check.
#
# **To go deeper** · Why must the *backgrounds* be split between training and validation, too? · A pasted object has crisp
# edges and stands where gravity forbids: which results of this course could flatter a method because of that?
#
# {{next}}
