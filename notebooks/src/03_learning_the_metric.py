# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Learning the metric: what training to compare does to a map
#
# {{badge}}
#
# **You will**
# 1. write the two losses of metric learning, prototypes and triplets, and see how each can go wrong;
# 2. write the training loop, and check it against the engine of this course, weight by weight;
# 3. train three networks, and measure their accuracy, their maps, and where their features are active;
# 4. find out by an experiment which optimisers change a map without changing a prediction.
#
# **Time** about 75 minutes, 46 of them for the exercises; about three minutes on a CPU, less on a GPU, and less the next time,
# because trained networks are kept.
# **Before** [02 Dist-CAM](02_dist_cam.ipynb).
#
# **Sources** Shen et al.: *Distance-Based Class Activation Map for Metric Learning* · Snell, Swersky, Zemel: *Prototypical
# Networks for Few-shot Learning*, NeurIPS 2017 · Hermans, Beyer, Leibe: *In Defense of the Triplet Loss for Person
# Re-Identification*, 2017.

# %% tags=["parameters"]
# "smoke": seconds, does it run? · "mini": minutes on a CPU · "paper": "mini" with more
# epochs
PROFILE = "mini"
# "" finds the data folder; training on the real ILSVRC is a command, see the end
DATA_ROOT = ""
DEVICE = "auto"     # "auto", "cpu" or "cuda"
SEED = 0

# %% tags=["setup"]
# {{setup}}
from itertools import islice

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from course_lib import backbones, engine, maps, prototypes
from course_lib.cache import cached
from course_lib.worlds import minis
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.miniature import fingerprint
from course_lib.evaluate import controls
from course_lib.evaluate.localization import MaxBoxAcc
from course_lib.metric_learning import losses, rules
from course_lib.metric_learning.features import tail, trunk, trunk_features
from course_lib.metric_learning.learner import (LOSSES, RATES, SCALE, BalancedBatches,
                                                Learner, common_row, linear_probe)
from course_lib.show import plots
from course_lib.checks import check, same, yours
from course_lib.lesson import start

lesson = start("03", PROFILE, DATA_ROOT, DEVICE, SEED)

# %% [markdown]
# ## Words
#
# {{words}}

# %% [markdown]
# ## Why train at all?
#
# In lesson 02 a network that had learnt to *classify* was made to compare, and Dist-CAM failed on it. The paper applies
# Dist-CAM to networks that were **trained to compare**. A fair trial needs such networks. So we train some, change nothing
# else, and look again.
#
# The data are those of lesson 02: 40 coarse classes. The validation photographs and their backgrounds are not in the
# training set. Only the **last block** of the network is trained, to save time. The layers in front of it are the
# *trunk*. They are frozen, so their features are computed once and kept.

# %%
side = lesson.choose(smoke=96, mini=224, paper=224)
root = minis.mini_ilsvrc(lesson.data, labels="kind", seed=SEED)
known, unseen = Ilsvrc(root, "train"), Ilsvrc(root, "val")
kinds, data = list(known.classes.values()), fingerprint(root)
known_y = torch.tensor([photo.label for photo in known.photos])
seen = list(islice(unseen.batches(side, 16),
                   lesson.choose(smoke=4, mini=None, paper=None)))
photos, unseen_y, masks = (torch.cat([getattr(batch, part) for batch in seen])
                           for part in ("images", "labels", "masks"))
masks, boxes = masks.bool(), [box for batch in seen for box in batch.boxes]
print(known, unseen, sep="\n")

# %%
before = backbones.create("tf_efficientnet_lite0").to(lesson.device,
                                                      memory_format=torch.channels_last)

def features_of_the_trunk():
    with torch.inference_mode():
        parts = [trunk(before, part.to(lesson.device)).cpu()
                 for part in tqdm(photos.split(16), "validation")]
    return {"known": trunk_features(before, known, side, device=lesson.device),
            "unseen": torch.cat(parts).clone()}

kept = cached("03 features of the trunk", features_of_the_trunk, data=data,
              settings=[side, len(photos)], takes="half a minute")
known_t, unseen_t = kept["known"], kept["unseen"]

def look(network, features):
    """Last feature maps, n 1280 h w, from features of the trunk."""
    network.eval()
    with torch.inference_mode():
        return torch.cat([tail(network, part.to(network.mean.device)).cpu()
                          for part in features.split(16)])

pooled = look(before, known_t).mean((2, 3)).clone()      # 714 1280, before any training

# %% [markdown]
# ## From a classifier to distances
#
# A classifier scores a class by a weight vector, $w_c \cdot q + b_c$. Softmax cross-entropy raises the score of the true
# class. Snell et al. keep the cross-entropy and replace the score by **minus the distance to the prototype of the class**:
#
# $$p(c \mid q) = \frac{\exp(-s\, d(q, P_c))}{\sum_{c'} \exp(-s\, d(q, P_{c'}))} \qquad\qquad
# L = -\log p(y \mid q)$$
#
# There is no $w$ and no $b$ to learn. Only the features change: images move towards their prototype and away from the
# others. The scale $s$ says what a distance of 1 means. There are three usual distances:
#
# $$d_{L1} = \sum_k |q_k - P_{ck}| \qquad d_{L2} = \sum_k (q_k - P_{ck})^2 \qquad
# d_{\cos} = 1 - \frac{q \cdot P_c}{|q|\,|P_c|}$$
#
# The first one is Eq. 4 of the Dist-CAM paper. The second one, squared, is that of Snell et al.; lesson 02 showed that it
# is a linear classifier.
#
# *Prediction 03.a:* all 40 prototypes are the same. What is the loss?

# %% tags=["prediction"]
lesson.predict("03.a", None)  # your guess, a number

# %% [markdown]
# ### Exercise 03.1 · Prototype softmax (3 points, 10 minutes)
#
# Write `prototype_loss(features, labels, prototypes, metric, scale)` with `metric` one of `"l1"`, `"l2"`, `"cosine"`.
# `features` is `b k`, `prototypes` is `c k`; the result is the mean loss of the batch.
#
# <details><summary>Hint 1</summary>Of which pairs do you need a distance, and which shape has the table of all of them? A near
# prototype is to get a large score: what do you do to the distance?</details>
# <details><summary>Hint 2</summary><code>features[:, None] - prototypes[None]</code> is <code>b c k</code>. <code>F.normalize(x, dim=1)</code> has rows of
# length 1, and one matrix product of two such matrices holds all cosines. <code>F.cross_entropy(scores, labels)</code> is the mean of
# $-\log$ softmax, and wants raw scores, not probabilities.</details>
# <details><summary>Hint 3</summary>Another softmax of distances: two families choose between two shops on the same street, and
# the nearer one is the likelier.
#
# ```python
# home, shop = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [3.0]])
# way = (home[:, None] - shop).abs().amax(-1)                       # family, shop
# (-way).softmax(1)                         # tensor([[0.8808, 0.1192], [0.1192, 0.8808]])
# ```
# </details>

# %% exercise="03.1"
def prototype_loss(features, labels, prototypes, metric="l1", scale=1.0):
    """Mean of -log softmax(-scale * distance)[label]: features b k, labels b,
    prototypes c k -> scalar."""
    ### BEGIN SOLUTION
    difference = features[:, None] - prototypes[None]                     # b c k
    if metric == "l1":
        distance = difference.abs().sum(-1)
    elif metric == "l2":
        distance = difference.square().sum(-1)
    else:
        distance = 1 - F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T
    return F.cross_entropy(-scale * distance, labels)
    ### END SOLUTION

# %% check="03.1" points=3
with check("03.1",
           hint="distances b c, then cross-entropy of -scale times distance") as ask:
    g = torch.Generator().manual_seed(0)
    f, ref = torch.rand(6, 5, generator=g), torch.rand(4, 5, generator=g)
    of = torch.tensor([0, 3, 1, 2, 2, 0])
    # -log softmax [label], on average
    loss = lambda scores: -scores.log_softmax(1)[range(6), of].mean()
    for kind in ("l1", "l2", "cosine"):
        d, truth = (losses.distances(f, ref, kind),
                    losses.prototype_softmax(f, of, ref, kind, 2.0))
        same(ask(prototype_loss, f, of, ref, kind, 2.0), truth,
             f'prototype_loss(..., "{kind}", 2.0)', suspects={
                 "A sign is missing: a small distance is a large score.":
                     lambda: loss(2 * d),
                 "The scale is missing: it multiplies the distance.": lambda: loss(-d),
                 "You divided by the scale: it multiplies the distance.":
                     lambda: loss(d / -2),
                 "You averaged over the channels: a distance is a sum over them.":
                     lambda: loss(d * -0.4),
                 "This is the Euclidean distance: here it is squared.":
                     lambda: loss(d.sqrt() * -2),
                 "This is the dot product: divide by both lengths to get the cosine.":
                     lambda: loss(2 * f @ ref.T),
                 "You took a softmax before cross_entropy, which takes one itself: "
                 "give it the scores.": lambda: loss((d * -2).softmax(1)),
                 "You summed over the batch: the loss is the mean.": lambda: 6 * truth})
### BEGIN HIDDEN TESTS
assert abs(prototype_loss(torch.rand(3, 4), torch.tensor([0, 1, 2]), torch.ones(3, 4),
                          "l1", 5.0).item() - 1.0986) < 1e-3
assert torch.allclose(prototype_loss(f, of, ref), prototype_loss(f, of, ref, "l1", 1.0))
### END HIDDEN TESTS

# %%
loss_of = yours("03.1", prototype_loss, losses.prototype_softmax)
equal = loss_of(torch.eye(40), torch.arange(40), torch.ones(40, 40), "l1", 1.0)
lesson.outcome("03.a", equal)

# %% [markdown]
# That is $\log 40$, the loss of guessing among 40 classes.
#
# ### Where do prototypes come from during training?
#
# They come from the batch. Draw $P$ classes and $K$ images of each; the means of the $K$ features are the prototypes. There
# is a trap: a sample that is part of its own prototype attracts itself. **Random features with random labels** show how
# much. There is nothing to learn, so the true loss is that of guessing, $\log P$.
#
# *Prediction 03.b:* 8 classes, so guessing gives 2.08. What is the loss with $K = 5$, if each sample is part of the mean?

# %% tags=["prediction"]
lesson.predict("03.b", None)  # your guess, a number

# %%
noise, sizes = torch.randn(4000, 16), [2, 4, 5, 10, 20]
trap = {"sample in its own mean": [], "sample left out": []}
for size in sizes:                                 # batches of 8 classes with K images
    batches = torch.arange(4000).view(size, -1, 8).permute(1, 2, 0).flatten(1)
    with_it, without = [], []
    for batch in batches:
        q, y = noise[batch], batch % 8
        with_it.append(loss_of(q, y, prototypes.class_prototypes(q, y, 8), "l2", 0.1))
        without.append(losses.batch_prototype_softmax(q, y, "l2", 0.1))
    for name, values in zip(trap, (with_it, without)):
        trap[name].append(torch.stack(values).mean().item())
flattered, honest = (values[sizes.index(5)] for values in trap.values())
guessing = torch.tensor(8.0).log().item()

# %%
plots.show(plots.curve(sizes, trap, xlabel="K, images of each class in a batch",
                       ylabel="loss on random features",
                       baselines={"guessing": guessing},
                       title=f"At K = 5: {flattered:.2f} with the sample in its own "
                             f"mean, {honest:.2f} without"),
           alt=f"Loss on random features over K; guessing gives {guessing:.2f}. "
           + "; ".join(f"{name}: {values[0]:.2f} at K = 2, {values[-1]:.2f} at 20"
                       for name, values in trap.items()) + ".")
lesson.outcome("03.b", flattered)
lesson.claim(f"A sample in its own mean lowers the loss of random features from the "
             f"{guessing:.2f} of guessing to {flattered:.2f}; left out, it is "
             f"{honest:.2f}.",
             flattered < guessing - 0.2 and honest > guessing);

# %% [markdown]
# So the library's `losses.batch_prototype_softmax` leaves each sample out of the mean of its own class.
#
# ## Triplets
#
# The other loss needs no prototypes. Take an **anchor**, a **positive** of its class and a **negative** of another class.
# The positive shall be nearer than the negative by a margin $m$. A triplet that fulfils this has loss 0 and teaches nothing.
# Hermans et al. therefore take for every image of a batch the **hardest** pair: the farthest positive and the nearest
# negative.
#
# $$L = \frac1{|A|} \sum_{a \in A} \Big[\, m + \max_{p:\, y_p = y_a,\, p \ne a} |q_a - q_p|
#       - \min_{n:\, y_n \ne y_a} |q_a - q_n| \,\Big]_+$$
#
# The distance is Euclidean, **not** squared. $A$ are the images that have a positive in the batch.
#
# ### Exercise 03.2 · Batch-hard triplets (3 points, 12 minutes)
#
# Write `triplet_loss(features, labels, margin)`. Mind three things. An image is not its own positive. An image without a
# positive does not count. Two images with the *same* features have distance 0, where the slope of a square root is
# infinite: the gradient must stay finite there.
#
# <details><summary>Hint 1</summary>Which table holds all pairs of images? In one row of it, which entries may be the positive,
# which the negative, and which neither?</details>
# <details><summary>Hint 2</summary><code>torch.cdist</code> makes the table, with slope 0 at distance 0 (by hand: clamp the squared distance
# before the root). Write $-\infty$ or $+\infty$ over what may not win, with <code>torch.where</code>, before you take a maximum or
# minimum along the rows. <code>torch.eye</code> marks every image with itself.</details>
# <details><summary>Hint 3</summary>Another extreme of what is allowed: the cheapest flight from each of three towns to another
# one. A product with the mask would give 0, the ticket home.
#
# ```python
# price = torch.tensor([[0., 9., 4.], [9., 0., 7.], [4., 7., 0.]])            # from, to
# away = torch.eye(3) == 0
# torch.where(away, price, torch.inf).amin(1)                                 # tensor([4., 7., 4.])
# ```
# </details>

# %% exercise="03.2"
def triplet_loss(features, labels, margin=0.3):
    """Mean over anchors of relu(margin + farthest positive - nearest negative):
    features b k, labels b -> scalar."""
    ### BEGIN SOLUTION
    distance = torch.cdist(features, features)                            # b b
    same_class = labels[:, None] == labels
    positive = same_class & ~torch.eye(len(labels), dtype=torch.bool,
                                       device=labels.device)
    farthest = torch.where(positive, distance, -torch.inf).amax(1)
    nearest = torch.where(same_class, torch.inf, distance).amin(1)
    return F.relu(margin + farthest - nearest)[positive.any(1)].mean()
    ### END SOLUTION

# %% check="03.2" points=3
with check("03.2",
           hint="rows of the distances: largest positive, smallest negative") as ask:
    of = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])      # the last image has no positive
    f = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    f += 0.7 * of[:, None]
    truth = losses.batch_hard_triplet(f, of, 0.5)    # the library's answer; wrong ones:
    same(ask(triplet_loss, f, of, 0.5), truth, "triplet_loss(...)", suspects={
        "You averaged over all images: one without a positive does not count.":
            8 / 9 * truth,
        "You averaged over the anchors with a loss above 0: one with 0 counts, too.":
            0.871090,
        "You summed: the loss is the mean over the anchors.": 8 * truth,
        "You squared the distances: triplets compare Euclidean ones.": 3.06215,
        "You took the nearest positive: the hardest one is the farthest.": 0.48242,
        "You took the farthest negative: the hardest one is the nearest.": 0.0,
        "The nearest negative is 0 away: is the image its own, or did a product with "
        "the mask make zeros? Write inf over what is no negative.": 3.249629,
        "Anchors below zero pull the mean down: a fulfilled triplet has loss 0 (relu).":
            0.40048,
        "This is softplus, the soft form of the margin: relu is asked for.": 1.04755,
        "The margin has the wrong sign: add it.": 0.239171,
        "The margin is missing: add it before the relu.": 0.426671,
        "You took all triplets: only the hardest of each anchor counts.": 0.139616,
        "The difference is the wrong way round: the positive is to be nearer.":
            0.83869})
    flat = torch.ones(4, 3, requires_grad=True)
    ask(triplet_loss, flat, torch.tensor([0, 0, 1, 1]), 0.5).backward()
    assert flat.grad.isfinite().all(), ("At distance 0 the gradient is NaN: clamp "
                                        "before the root, or use torch.cdist.")
### BEGIN HIDDEN TESTS
assert abs(triplet_loss(torch.tensor([[0.0], [1.0], [3.0], [4.0]]),
                        torch.tensor([0, 0, 1, 1]), 1.5).item() - 0.25) < 1e-6
assert torch.allclose(triplet_loss(f, of), triplet_loss(f, of, 0.3))
### END HIDDEN TESTS

# %% [markdown]
# ### The cheap way out
#
# Both losses look at distances. A network can change all distances at once: it makes its features longer or shorter. We
# multiply the pretrained features of $8 \times 5$ images by a factor from 0.01 to 2, and compute both losses.
#
# *Prediction 03.c:* at which factor is the triplet loss smallest?

# %% tags=["prediction"]
lesson.predict("03.c", None)  # your guess, a factor from 0.01 to 2

# %%
P, K = 8, 5
batch = next(iter(BalancedBatches(known_y, P, K, torch.Generator().manual_seed(SEED))))
factors, scale = torch.logspace(-2, 0.3, 40), SCALE / pooled.shape[1]
triplets = yours("03.2", triplet_loss, losses.batch_hard_triplet)
by_factor = {"prototype softmax, L1": [], "batch-hard triplet": []}
for factor in factors:
    scaled, y = factor * pooled[batch], known_y[batch]
    prototype_value = losses.batch_prototype_softmax(scaled, y, "l1", scale)
    by_factor["prototype softmax, L1"].append(prototype_value.item())
    by_factor["batch-hard triplet"].append(triplets(scaled, y, 0.3).item())
least = {name: factors[torch.tensor(values).argmin()].item()
         for name, values in by_factor.items()}
says = "; ".join(f"{name} {min(values):.2f} at {least[name]:.2g}"
                 for name, values in by_factor.items())
plots.show(plots.curve(factors, by_factor, xlabel="factor on all features",
                       ylabel="loss of one batch", title=f"Smallest: {says}",
                       baselines={"guessing": guessing}),
           alt="Loss over a common factor on the features, for the margin 0.3; "
               f"smallest: {says}.")

# %%
lesson.outcome("03.c", least["batch-hard triplet"])
at_zero = {name: values[0] for name, values in by_factor.items()}
lesson.claim("The triplet loss is smallest at the smallest factor, "
             f"{at_zero['batch-hard triplet']:.2f} with a margin of 0.3; the prototype "
             f"loss there is {at_zero['prototype softmax, L1']:.2f}, and guessing "
             f"{guessing:.2f}.",
             least["batch-hard triplet"] == factors[0].item()
             and at_zero["prototype softmax, L1"] > guessing - 0.1);

# %% [markdown]
# While the hardest positive is farther away than the hardest negative, the triplet loss falls if **all** features shrink. In
# the end everything is one point, the loss is the margin, and every gradient is 0. A triplet loss that rests at its margin
# has learnt nothing: it has **collapsed**. Small steps keep away from there. The prototype loss does not lead there, because
# in one point it can only guess.
#
# ## The training loop
#
# Training is a loop of five steps, and their order matters:
#
# 1. set the model into training mode, but keep the statistics of BatchNorm **frozen**: a batch of 8 classes does not look
#    like the data, so its mean and variance would mislead;
# 2. for each batch: compute the loss,
# 3. clear the gradients of the last step, since PyTorch *adds* new ones to what is there,
# 4. compute the gradients,
# 5. let the optimiser take a step.
#
# ### Exercise 03.3 · One epoch (3 points, 12 minutes)
#
# Write `one_epoch(model, loader, loss, optimizer)`. The loader gives pairs `inputs, labels`; `loss(outputs, labels)` is a
# scalar tensor. Return the mean of the batches' losses as a number. The check holds your loop against the engine of this
# course: after an epoch the weights must agree.
#
# <details><summary>Hint 1</summary>Which parts of the model are to be in training mode, and which are not? What does a gradient
# hold, if nobody clears it before the next <code>backward()</code>?</details>
# <details><summary>Hint 2</summary><code>model.train()</code> switches the whole model, and afterwards <code>part.eval()</code> switches a part of it
# back. <code>model.modules()</code> are all parts, and <code>isinstance(part, nn.BatchNorm2d)</code> finds those: their weights still learn, only
# the running statistics stay. <code>.item()</code> makes a number of a loss.</details>
# <details><summary>Hint 3</summary>Another descent: one number, three steps down the slope of $(w - 3)^2$.
#
# ```python
# w = torch.tensor(0.0, requires_grad=True)
# descent = torch.optim.SGD([w], 0.25)
# for _ in range(3):
#     height = (w - 3) ** 2
#     descent.zero_grad()
#     height.backward()
#     descent.step()
# w.item()                                                          # 2.625
# ```
# </details>

# %% exercise="03.3"
def tiny(run):
    """A tiny network after `run(net, loader, loss, optimizer)`, and what that returned:
    try tiny(one_epoch)."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(12, 3, 2, 2), torch.arange(12) % 3),
                        batch_size=4)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(),
                        nn.Linear(16, 3)).eval()
    return net, run(net, loader, F.cross_entropy,
                    torch.optim.SGD(net.parameters(), 0.2))

def one_epoch(model, loader, loss, optimizer):
    """Train in place one epoch, statistics frozen; returns the mean loss, a float."""
    ### BEGIN SOLUTION
    model.train()
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
    total = 0.0
    for inputs, labels in loader:
        value = loss(model(inputs), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        total += value.item()
    return total / len(loader)
    ### END SOLUTION

# %% check="03.3" points=3
with check("03.3", hint="train mode, BatchNorm in eval; then loss, zero_grad, "
                        "backward, step in this order: a step() before backward() "
                        "changes, in place, weights that backward() still needs"):
    def engines(net, loader, loss, optimizer):
        def step(net, batch):                  # of the engine: named terms of one batch
            net[1].eval()
            return {"loss": loss(net(batch[0]), batch[1])}
        return engine.train(net, step, loader, optimizer, engine.Plan(1),
                            progress=False)[0]["loss"]
    def never_zeroed(net, loader, loss, optimizer):
        optimizer.zero_grad = lambda set_to_none=True: None            # forgets nothing
        return engines(net, loader, loss, optimizer)
    def one_batch(net, loader, *others):
        return engines(net, DataLoader(loader.dataset, 4, sampler=range(4)), *others)
    moved = lambda net: nn.utils.parameters_to_vector(net.parameters())
    (twin, truth), (net, came) = tiny(engines), tiny(one_epoch)
    assert net.training, "Not in training mode: model.train(), then BatchNorm's eval()."
    assert not net[1].running_mean.any(), ("The statistics of BatchNorm have moved: "
                                           "freeze them after model.train().")
    same(moved(net), moved(twin), "weights after an epoch", suspects={
        "The weights have not moved: zero_grad() goes before backward(), step() after.":
            lambda: moved(tiny(lambda *_: 0)[0]),
        "Only the first batch was used: does `return` stand inside the loop?":
            lambda: moved(tiny(one_batch)[0]),
        "Gradients of all batches have added up: zero_grad() for each.":
            lambda: moved(tiny(never_zeroed)[0])})
    assert not torch.is_tensor(came), "Use .item(): a tensor keeps its graph alive."
    same(came, truth, "the mean loss", {
        "You returned the sum: divide by the number of batches.": 3 * truth,
        "You divided by the number of samples: each value is the mean of a batch "
        "already, so divide by the number of batches.": truth / 4})
### BEGIN HIDDEN TESTS
assert all(weight.requires_grad for weight in tiny(one_epoch)[0].parameters())
### END HIDDEN TESTS

# %% [markdown]
# A first use of your loop: a linear classifier of 40 classes on the pretrained features, from zero.

# %%
def by_engine(model, loader, loss, optimizer):
    def step(model, batch):                               # named terms of one batch
        return {"loss": loss(model(batch[0]), batch[1])}
    return engine.train(model, step, loader, optimizer, engine.Plan(1, device="cpu"),
                        progress=False)[0]["loss"]

loop, layer = yours("03.3", one_epoch, by_engine), nn.Linear(1280, len(kinds))
nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
batches = list(BalancedBatches(known_y, P, K, torch.Generator().manual_seed(SEED)))
loader = DataLoader(TensorDataset(pooled, known_y), batch_sampler=batches)
descent = torch.optim.SGD(layer.parameters(), 0.1)
fall = [loop(layer, loader, F.cross_entropy, descent) for _ in range(6)]
plots.show(plots.curve(range(1, 7), {"linear classifier, SGD": fall}, xlabel="epoch",
                       ylabel="mean loss", baselines={"guessing": equal.item()},
                       title=f"Loss {fall[0]:.2f} to {fall[-1]:.2f} in six epochs"),
           alt=f"Mean loss of six epochs, from {fall[0]:.2f} to {fall[-1]:.2f}; "
               f"guessing gives {equal.item():.2f}.")

# %% [markdown]
# `course_lib.engine.train` is this loop for any device, with mixed precision, several processes, and checkpoints. It does not
# wait for the device: `value.item()` in every step, as above, would make a GPU stand still. Its **step** is a function of
# the model and a batch that returns named loss terms.
#
# ## Three networks
#
# All start from the same pretrained weights. They see the same $8 \times 5$ batches, and SGD with momentum takes the same
# number of steps. They differ in the **loss** and in its learning rate (`RATES`). The classifier of the first one starts
# from zero; this will matter.
#
# | name | loss | compares |
# |---|---|---|
# | softmax | cross-entropy of a linear classifier | - |
# | prototype-l1 | prototype softmax in L1, the distance of Eq. 4 | an image with the means of its batch |
# | triplet | batch-hard triplets, margin 0.3 | images |
#
# After every epoch we keep the sum of all channels of each validation image, for the last section.

# %%
epochs = lesson.choose(smoke=2, mini=6, paper=18)

def created():
    network = backbones.create("tf_efficientnet_lite0", num_classes=len(kinds))
    nn.init.zeros_(network.classifier.weight), nn.init.zeros_(network.classifier.bias)
    return network.to(lesson.device)

def learn(name, network):
    """Weights, mean loss of each epoch, and sums of all channels after each."""
    learner = Learner(network, LOSSES[name], len(kinds), last_block=True)
    batches = BalancedBatches(known_y, P, K, torch.Generator())
    loader = DataLoader(TensorDataset(known_t, known_y), batch_sampler=batches)
    weights = [weight for weight in learner.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, RATES[name], momentum=0.9, weight_decay=1e-4)
    losses_of, views = [], []
    for epoch in tqdm(range(epochs), f"{name}, epochs"):     # one at a time, to look
        plan = engine.Plan(1, seed=1000 * SEED + epoch)
        row, = engine.train(learner, lambda model, batch: model.step(*batch), loader,
                            optimizer, plan, progress=False)
        losses_of.append(row["loss"])
        views.append(look(network, unseen_t).mean(1))
    return {"weights": network.state_dict(), "loss": losses_of,
            "views": torch.stack(views)}

# %%
networks, found = {"before": before}, {"before": look(before, unseen_t)}
views = {}

def train(name):
    network = created()
    kept = cached(f"03 network trained with {name}", lambda: learn(name, network),
                  data=data, settings=[name, side, epochs, SEED, len(photos)],
                  takes="under a minute")
    network.load_state_dict(kept["weights"])
    networks[name], found[name] = network, look(network, unseen_t)
    views[name] = torch.cat((found["before"].mean(1)[None], kept["views"]))
    print(f"{name:13} loss of each epoch",
          *(f"{value:7.3f}" for value in kept["loss"]))

train("softmax")

# %%
train("prototype-l1")

# %%
train("triplet")

# %% [markdown]
# Each loss has its own unit, so the losses do not compare. What they are *for* does: how many unseen photographs does the
# nearest prototype name?
#
# *Prediction 03.d:* by how many points does training in L1 raise the accuracy of the nearest prototype in L1?

# %% tags=["prediction"]
lesson.predict("03.d", None)  # your guess, in points

# %%
train_q = {name: look(network, known_t).mean((2, 3)).clone()
           for name, network in networks.items()}
others = [name for name in networks if name != "softmax"]
probes = cached("03 linear probes", lambda: {
    name: linear_probe(train_q[name], known_y, len(kinds))
    for name in tqdm(others, "linear probes")}, data=data, takes="some seconds")
own = networks["softmax"].classifier.to("cpu")
probes["softmax"] = own.weight.detach(), own.bias.detach()
rows, hits = {}, {}
for name in networks:
    w, b = probes[name]
    means = prototypes.class_prototypes(train_q[name], known_y, len(kinds))
    query, rows[name] = found[name].mean((2, 3)), {"classifier": w, "prototypes": means}
    hits[name] = {"classifier": (query @ w.T + b).argmax(1) == unseen_y}
    for rule in ("l1", "cosine"):
        hits[name][rule] = losses.distances(query, means, rule).argmin(1) == unseen_y

# %%
share = {name: {rule: 100 * hit.float().mean().item() for rule, hit in by.items()}
         for name, by in hits.items()}
lines = ["| accuracy, % (gain) | classifier | nearest prototype, L1 | cosine |",
         "|---|---|---|---|"]
for name, by in share.items():
    gains = [value - share["before"][rule] for rule, value in by.items()]
    lines.append(f"| {name} | " + " | ".join(
        f"{value:.1f} ({gain:+.1f})" for value, gain in zip(by.values(), gains)) + " |")
display(Markdown("\n".join(lines)))
rise = {name: share[name]["l1"] - share["before"]["l1"] for name in networks}
change = (hits["prototype-l1"]["l1"].float() - hits["before"]["l1"].float()).std()
lesson.outcome("03.d", rise["prototype-l1"], "points")
chance = 100 * change.item() / len(unseen_y) ** 0.5
print(f"standard error of a gain: {chance:.1f} points")
lesson.claim("The nearest prototype in L1 gains "
             f"{rise['prototype-l1']:.1f} points by training in L1, and "
             f"{rise['softmax']:.1f} by training a classifier.",
             rise["prototype-l1"] > 2 and rise["softmax"] > 2);

# %% [markdown]
# (The classifier of the softmax network is its own; the others get a linear probe on their features.)
#
# The L1 rule gains, but not because it was trained for: a classifier raises it as well. Gains of the size of the standard
# error are chance. And did the triplet loss take the cheap way out? A part of it:

# %%
length = {name: values.norm(dim=1).mean().item() for name, values in train_q.items()}
lesson.claim("Training with triplets has shortened the features, from "
             f"{length['before']:.1f} to {length['triplet']:.1f} on average.",
             length["triplet"] < 0.9 * length["before"]);

# %% [markdown]
# ## What it does to the maps
#
# Every network gets the maps of lesson 02 for the true class: CAM, CAM with positive weights, the sum of all channels
# (uniform), Dist-CAM, $W = P$ and $W = P - \text{mean}_c P$. A box is read from each map at its best threshold.
#
# *Prediction 03.e:* the sum of all channels has a GT-known error of about 31 % before training. What is it after training
# with triplets? No loss has asked for a place in the image.

# %% tags=["prediction"]
lesson.predict("03.e", None)  # your guess, in %

# %%
RULES = {"CAM": "cam", "CAM, positive": "cam-positive", "uniform": "uniform",
         "Dist-CAM": "dist-cam", "W = P": "prototype",
         "W = P - mean P": "prototype-centred"}
wrong = controls.wrong_classes(unseen_y, len(kinds),
                               torch.Generator().manual_seed(SEED))

def raw_maps(name, rule, classes):
    """Maps n h w of the given classes, with the rows of a network."""
    source, weights = rules.RULES[RULES[rule]]
    query = found[name].mean((2, 3))
    return maps.weighted_map(found[name],
                             weights(query, rows[name][source], classes))[:, 0]

def localised(raw, hit):
    """Localisation of the validation images; `hit`: those classified correctly."""
    score = MaxBoxAcc()
    for part in torch.arange(len(raw)).split(64):
        score.accumulate(maps.heatmap(raw[part], side), [boxes[i] for i in part],
                         hit[part])
    return score.compute()

# %%
results = {name: {} for name in networks}
todo = [(name, rule) for name in networks for rule in RULES]
for name, rule in tqdm(todo, "maps"):           # who predicts: the classifier, or Eq. 4
    hit = hits[name]["classifier" if rule.startswith("CAM") else "l1"]
    results[name][rule] = localised(raw_maps(name, rule, unseen_y), hit)
error = {name: {rule: 100 - 100 * r.max_box_acc for rule, r in by.items()}
         for name, by in results.items()}
lines = [f"| GT-known error, % | {' | '.join(networks)} |", "|---" * 5 + "|"]
for rule in RULES:
    cells = [f"{error[name][rule]:.1f}" for name in networks]
    lines.append(f"| {rule} | {' | '.join(cells)} |")
centre = 100 - 100 * results["before"]["uniform"].centre_best
lines.append("| *best centred box* |" + f" *{centre:.1f}* |" * 4)
display(Markdown("\n".join(lines)))
lesson.outcome("03.e", error["triplet"]["uniform"], "%")

# %%
trained = ("softmax", "prototype-l1", "triplet")
uniform, dist, weights_p = ([error[name][rule] for name in trained]
                            for rule in ("uniform", "Dist-CAM", "W = P"))
start_at = error["before"]
lesson.claim(f"Every loss lowers the error of the uniform map, from "
             f"{start_at['uniform']:.1f} to {max(uniform):.1f} % or less: softmax too, "
             "which compares nothing.", max(uniform) < start_at["uniform"] - 1)
lesson.claim("Every loss lowers the error of Dist-CAM, from "
             f"{start_at['Dist-CAM']:.1f} to {max(dist):.1f} % or less.",
             max(dist) < start_at["Dist-CAM"] - 2)
behind = min(a - b for a, b in zip(dist, uniform))
lesson.claim(f"Dist-CAM stays at least {behind:.1f} points behind the uniform map, "
             "which has no weights at all.", behind > 8)
ahead_p = min(a - b for a, b in zip(dist, weights_p))
lesson.claim(f"W = P, from the same prototypes, errs at least {ahead_p:.1f} points "
             "less than Dist-CAM.", ahead_p > 10);

# %% [markdown]
# Training to compare does not save the formula. But do these maps show the class at all? The control asks every rule for a
# map of a **wrong class**, on the network that was trained with triplets:

# %%
asked = [("triplet", rule) for rule in RULES]
asked += [(name, "Dist-CAM") for name in networks if name != "triplet"]
errs = {}                                               # with a wrong class
for name, rule in tqdm(asked, "maps"):
    raw = raw_maps(name, rule, wrong)
    errs[name, rule] = 100 - 100 * localised(raw, hits[name]["l1"]).max_box_acc
lines = ["| GT-known error, %, triplet | own class | wrong class | difference |",
         "|---|---|---|---|"]
for rule, value in error["triplet"].items():
    other = errs["triplet", rule]
    lines.append(f"| {rule} | {value:.1f} | {other:.1f} | {other - value:+.1f} |")
display(Markdown("\n".join(lines)))

# %%
adds = [errs[name, "Dist-CAM"] - error[name]["Dist-CAM"] for name in trained]
costs = [error[name]["Dist-CAM"] - error[name]["uniform"] for name in trained]
lesson.claim("On the three trained networks the right class gives Dist-CAM at most "
             f"{max(adds):.1f} points; its formula costs at least {min(costs):.1f} "
             "against the uniform map.", max(adds) < min(costs))
lost = {rule: errs["triplet", rule] - value for rule, value in error["triplet"].items()}
lesson.claim("Two rules depend much on the class: a wrong one costs CAM "
             f"{lost['CAM']:.1f} points and W = P - mean P "
             f"{lost['W = P - mean P']:.1f}; it costs W = P {lost['W = P']:.1f}.",
             min(lost["CAM"], lost["W = P - mean P"]) > 10 > lost["W = P"]);

# %% [markdown]
# One warning. Many papers read all boxes at one threshold, 0.2. That compares how *wide* maps are as much as where they
# are. Take $W = P$ on two networks:

# %%
at_02 = {name: 100 - 100 * by["W = P"].gt_known for name, by in results.items()}
ahead = [by["softmax"] - by["triplet"] for by in (
    at_02, {name: by["W = P"] for name, by in error.items()})]
lesson.claim(f"At 0.2 the triplet network errs {ahead[0]:.1f} points less than the "
             f"softmax network; at the best threshold of each {ahead[1]:+.1f}.",
             ahead[0] > ahead[1] + 5);

# %% [markdown]
# ## The optimiser chooses the gauge
#
# Lesson 02 ended with a weakness of CAM: a vector $v$ added to the weights of all classes changes every map and no
# prediction. Does that happen in practice? Look at one step of training.
#
# The slope of the loss in $w_c$ is $(p_c - [c = y])\, q$. The probabilities sum to 1, so the slopes of all classes sum to
# **zero**. A step of SGD is a multiple of the slope: it leaves the mean of the rows $w_c$ where it was. Adam divides each
# single slope by its own running size, so that all have about the same size. Three slopes of one channel, say 4, -3 and -1,
# sum to 0. Divided by their sizes they are 1, -1 and -1, and sum to -1. What happens over many steps, an experiment tells.
#
# ### Exercise 03.4 · An experiment: who keeps the mean row? (3 points, 12 minutes)
#
# Write `row_drift(make, features, labels, classes, steps)`. It trains a linear layer from zero (weights and bias), with
# cross-entropy, on all samples at once. `make(parameters)` gives the optimiser. The result is the length of the mean row of
# the weights, divided by the mean length of a row. Try it with all `OPTIMISERS`, on data that you make up. Then let
# `keepers()` return the names of those that keep the mean row at zero, apart from rounding.
#
# <details><summary>Hint 1</summary>Which lines of exercise 03.3 do you need, if there is only one batch and no BatchNorm? The weight of a
# linear layer is <code>classes features</code>: which axis counts the rows?</details>
# <details><summary>Hint 2</summary><code>nn.Linear</code> starts at random: <code>nn.init.zeros_</code> sets a tensor to zero. For the experiment,
# <code>torch.rand(40, 6)</code> and <code>torch.arange(40) % 4</code> are data enough. A mean row below 0.001 of a row is rounding.</details>
# <details><summary>Hint 3</summary>Another experiment with two ways of dividing: three slopes in each of two channels, divided by one size
# for all, and each by its own.
#
# ```python
# slopes = torch.tensor([[4.0, -2.0], [-3.0, 1.0], [-1.0, 1.0]])              # class, channel
# together, each = slopes / slopes.abs().max(), slopes / slopes.abs()
# torch.stack([together.sum(0), each.sum(0)])                                 # tensor([[ 0., 0.], [-1., 1.]])
# ```
# </details>

# %% exercise="03.4"
OPTIMISERS = {
    "SGD": lambda weights: torch.optim.SGD(weights, 0.1),
    "SGD, momentum": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9),
    "SGD, decay": lambda weights: torch.optim.SGD(weights, 0.1, weight_decay=0.01),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, 1e-3),
    "Adam": lambda weights: torch.optim.Adam(weights, 1e-3)}

def row_drift(make, features, labels, classes, steps=30):
    """|mean row| / mean |row| of a linear classifier trained from zero: a float."""
    ### BEGIN SOLUTION
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = make(layer.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
    return (layer.weight.mean(0).norm() / layer.weight.norm(dim=1).mean()).item()
    ### END SOLUTION

def keepers():
    """Names of the OPTIMISERS that keep the mean row at zero: a set of words."""
    ### BEGIN SOLUTION
    return {"SGD", "SGD, momentum", "SGD, decay"}
    ### END SOLUTION

# %% check="03.4" points=3
with check("03.4", hint="zero_grad, cross-entropy, backward, step") as ask:
    g, steady, told = torch.Generator().manual_seed(0), [], {}
    inputs, of = torch.rand(24, 6, generator=g), torch.arange(24) % 4
    def altered(weights, fresh=(), forget=False):
        steady[:] = weights
        for zero, drawn in zip(steady, fresh):
            zero.data.copy_(drawn.data)
        adam = OPTIMISERS["Adam"](steady)
        adam.zero_grad = (lambda set_to_none=True: 0) if forget else adam.zero_grad
        return adam
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        fresh = [*nn.Linear(6, 4).parameters()]
        random_start = common_row(lambda w: altered(w, fresh), inputs, of, 4)
        added = common_row(lambda w: altered(w, forget=True), inputs, of, 4)
        truth, matrix = common_row(altered, inputs, of, 4), steady[0]
        extent = matrix.norm(dim=1).mean()
        for which in ("Adam", "RMSprop", "SGD", "SGD, momentum", "SGD, decay"):
            torch.manual_seed(5)
            told[which] = ask(row_drift, OPTIMISERS[which], inputs, of, 4)
            assert not torch.is_tensor(told[which]), "Use .item(): return a number."
            same(told[which], common_row(OPTIMISERS[which], inputs, of, 4),
                 f"row_drift of {which}", {} if which != "Adam" else {
                     "This is the sum of the rows: take their mean.": 4 * truth,
                     "You took the mean of each row: take the mean over the classes.":
                         matrix.mean(1).norm() / extent,
                     "The division by the mean length is missing.": truth * extent,
                     "Gradients of all steps have added up: use zero_grad().": added,
                     "Your layer started at random: set it to zero.": random_start,
                     "This is one step: take as many as `steps` says.":
                         common_row(OPTIMISERS[which], inputs, of, 4, 1)})
    for which, part_of in told.items():
        assert (which in keepers()) == (part_of < 1e-3), (
            f"keepers() is wrong about {which}: your experiment gives {part_of:.3f}.")
### BEGIN HIDDEN TESTS
assert len(keepers()) == 3 and row_drift(OPTIMISERS["Adam"], inputs, of, 5, 3) > 0.01
assert abs(row_drift(OPTIMISERS["Adam"], inputs, of, 5, 3)
           - common_row(OPTIMISERS["Adam"], inputs, of, 5, 3)) < 1e-4
### END HIDDEN TESTS

# %% [markdown]
# Now on the features of the softmax network, and with maps. Two classifiers are trained from zero on the same features, one
# with SGD and one with Adam. Each draws its CAM, as it is and centred.
#
# *Prediction 03.f:* SGD's CAM has a GT-known error of about 29 %. What is the error of Adam's?

# %% tags=["prediction"]
lesson.predict("03.f", None)  # your guess, in %

# %%
drift = yours("03.4", row_drift, common_row)
for name, make in OPTIMISERS.items():
    part = drift(make, train_q["softmax"], known_y, len(kinds))
    print(f"{name:14} |mean row| / mean |row| {part:.3f}")

def classifier(optimizer, rate):
    """Weight and bias of a linear layer trained from zero on the softmax network."""
    layer = nn.Linear(1280, len(kinds))
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    batches = BalancedBatches(known_y, P, K, torch.Generator())
    loader = DataLoader(TensorDataset(train_q["softmax"], known_y),
                        batch_sampler=batches)
    def step(model, batch):
        return {"softmax": F.cross_entropy(model(batch[0]), batch[1])}
    engine.train(layer, step, loader, optimizer(layer.parameters(), rate),
                 engine.Plan(6, seed=SEED), progress=False)
    return layer.weight.detach().cpu(), layer.bias.detach().cpu()

# %%
query, common, gauge, agree = found["softmax"].mean((2, 3)), {}, {}, {}
for name, (w, b) in {"SGD": classifier(torch.optim.SGD, 0.1),
                     "Adam": classifier(torch.optim.Adam, 1e-3)}.items():
    answer, centred = (query @ w.T + b).argmax(1), maps.centred_weights(w)
    common[name] = (w.mean(0).norm() / w.norm(dim=1).mean()).item()
    agree[name] = (answer == (query @ centred.T + b).argmax(1)).float().mean().item()
    for word, each in {name: w, f"{name}, centred": centred}.items():
        raw = maps.weighted_map(found["softmax"], each[unseen_y][:, None])[:, 0]
        gauge[word] = 100 - 100 * localised(raw, answer == unseen_y).max_box_acc
        print(f"CAM of {word:14} GT-known error {gauge[word]:.1f} %")
lesson.outcome("03.f", gauge["Adam"], "%")
lesson.claim(f"SGD keeps the mean row at {common['SGD']:.3f} of a row; Adam drives "
             f"it to {common['Adam']:.2f}.",
             common["SGD"] < 0.01 < 0.2 < common["Adam"])
lesson.claim("Centring changes the answers of Adam's classifier in "
             f"{100 - 100 * agree['Adam']:.1f} % of the images, and its error from "
             f"{gauge['Adam']:.1f} to {gauge['Adam, centred']:.1f} %.",
             agree["Adam"] > 0.99 and gauge["Adam"] > gauge["Adam, centred"] + 20)
lesson.claim(f"Dist-CAM, {error['softmax']['Dist-CAM']:.1f} %, wins against Adam's CAM "
             "as it is, and loses against the same CAM, centred.",
             gauge["Adam"] - 5 > error["softmax"]["Dist-CAM"]
             > gauge["Adam, centred"] + 10);

# %% [markdown]
# So the "win" of a method over CAM may be a property of the optimiser. Why has the table above no row "CAM, centred"?

# %%
middle = max((w.mean(0).norm() / w.norm(dim=1).mean()).item()
             for w, _ in probes.values())
lesson.claim(f"The mean rows of its classifiers are at most {middle:.0e} of a row, so "
             "centring changes none of their maps.", middle < 1e-3);

# %% [markdown]
# ## Activations retract onto the object
#
# Back to the sum of all channels. Its **energy per area** is the mean heat on the object over the mean heat of the image:
# 1 is chance.
#
# *Prediction 03.g:* all three losses are computed from pooled features, which hold no place. In how many images, in %, does
# the energy on the object rise by training with triplets?

# %% tags=["prediction"]
lesson.predict("03.g", None)  # your guess, in %

# %%
energy = {name: torch.stack([                                      # epochs + 1, images
    controls.energy_per_area(maps.heatmap(raw, side), masks)
    for raw in tqdm(seen_by, name)]) for name, seen_by in views.items()}
mean = {name: values.mean(1) for name, values in energy.items()}
rose = {name: 100 * (values[-1] > values[0]).float().mean().item()
        for name, values in energy.items()}
plots.show(plots.curve(torch.arange(epochs + 1), mean, xlabel="epoch",
                       ylabel="energy per area of the object",
                       title=f"Energy on the object, from {mean['softmax'][0]:.2f} to "
                       + ", ".join(f"{values[-1]:.2f} ({name})"
                                   for name, values in mean.items())),
           alt="Energy per area of the uniform map on the object over the epochs, from "
           + ", ".join(f"{values[0]:.2f} to {values[-1]:.2f} with {name}"
                       for name, values in mean.items()) + ".")
lesson.outcome("03.g", rose["triplet"], "%")
lesson.claim("The energy on the object rises in "
             f"{rose['triplet']:.0f} % of the images with triplets, in "
             f"{rose['prototype-l1']:.0f} % with prototypes and in "
             f"{rose['softmax']:.0f} % with softmax.",
             min(rose["triplet"], rose["prototype-l1"]) > 85
             and rose["softmax"] < rose["triplet"] - 10);

# %% [markdown]
# Here the metric does matter. One reading of it: the same backgrounds stand behind all classes, so what they add to a pooled
# feature is noise. A distance adds up the noise of all channels, and falls if the background falls silent. Softmax asks for
# one direction of the feature only. If this reading is right, activity goes down off the object more than on it:

# %%
grid = unseen_t.shape[-1]
# share of each cell on the object
inside = F.adaptive_avg_pool2d(masks[:, None].float(), grid)[:, 0]
change = {}
for name, seen_by in views.items():                       # before training and after it
    first, last = seen_by[0], seen_by[-1]
    change[name] = [((last * part).sum() / (first * part).sum()).item()
                    for part in (inside, 1 - inside)]
    print(f"{name:13} activity after training, before it = 1: on the object "
          f"{change[name][0]:.2f}, off it {change[name][1]:.2f}")
on, off = zip(*(change[name] for name in ("prototype-l1", "triplet")))
lesson.claim("With prototypes and triplets, activity off the object falls to "
             f"{off[0]:.2f} and {off[1]:.2f} of what it was, on the object to "
             f"{on[0]:.2f} and {on[1]:.2f}.", all(a > 1.1 * b for a, b in zip(on, off)))
lesson.claim("Softmax raises it everywhere, off the object to "
             f"{change['softmax'][1]:.2f}.", min(change["softmax"]) > 1.1);

# %% [markdown]
# ## What was measured
#
# - **Reproduced:** training to compare draws activations onto the object. Without any classifier there are maps that localise,
#   if prototypes are taken as plain weights.
# - **Not reproduced:** that Dist-CAM as printed errs less than CAM. Training helps it, but the reason of lesson 02 stands:
#   $1/|P - q|$ follows coincidences. It wins against a CAM in a bad gauge.
# - **Limits:** a few photographs of each class, pasted objects whose background carries no class, one trained block, one
#   learning rate for each loss, thresholds chosen on the images they are scored on.
#
# The numbers beside those of this run are means over random seeds, each with its own split, scenes and training.

# %%
lesson.record("loss of random features, sample in its own mean", flattered,
              note=f"guessing: {guessing:.2f}")
for name in networks:
    for rule, value in share[name].items():
        lesson.record(f"accuracy, {name}, {rule}", value, "%")
for name in networks:
    for rule, value in error[name].items():
        at = 100 - 100 * results[name][rule].gt_known
        lesson.record(f"GT-known error, {name}, {rule}", value, "%",
                      note=f"at 0.2: {at:.1f} %")
    lesson.record(f"GT-known error, {name}, CAM, centred", error[name]["CAM"], "%",
                  note="that of CAM, as its rows sum to zero")
for (name, rule), value in errs.items():
    lesson.record(f"GT-known error, {name}, {rule}, wrong class", value, "%")
for name, rule, paper in (("softmax", "CAM", 56.2), ("triplet", "Dist-CAM", 54.7),
                          ("triplet", "W = P", None)):
    lesson.record(f"top-1 localisation error, {name}, {rule}",
                  100 - 100 * results[name][rule].top1_best, "%", paper=paper,
                  note="paper: ResNet-50 on ILSVRC val (Table 1)" if paper else "")

# %%
for name, value in gauge.items():
    lesson.record(f"GT-known error, new classifier by {name}", value, "%")
for name, values in mean.items():
    lesson.record(f"energy per area, {name}", values[-1],
                  note=f"before: {values[0]:.2f}")
    lesson.record(f"images in which it rose, {name}", rose[name], "%")
    lesson.record(f"activity off the object, {name}", change[name][1],
                  note=f"on it {change[name][0]:.2f}; before 1")
lesson.finish(fingerprint=data)

# %% [markdown]
# ## You can now
# - write a prototype loss and a batch-hard triplet loss, and name the cheap way out of each;
# - write a training loop from nothing, and say what each line is there for;
# - hold a claim about training against the network before it, another loss, a wrong class and every threshold;
# - say where the gauge of a CAM comes from, and why SGD from zero has none.
#
# **To go deeper** · Start SGD from random weights, not from zero: what happens to the mean row, with and without weight
# decay? · The triplet loss compares lengths of differences; the cosine does not see the length of a feature. What would
# collapse look like with a cosine loss?
#
# **Where things are** · `course_lib.metric_learning.losses` (and any loss of pytorch-metric-learning fits in its place);
# `course_lib.metric_learning.learner.Learner`; `course_lib.engine.train`. On whole networks, and on the real ILSVRC 2012:
# `python -m course_lib train localise --backbone resnet50 --loss triplet --data PATH --folder runs/triplet`, then
# `python -m course_lib evaluate localise --backbone resnet50 --checkpoint runs/triplet/model.safetensors --data PATH`.
#
# {{next}}
