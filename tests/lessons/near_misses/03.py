"""Wrong answers that students give in lesson 03, and a fragment of the message that each of them must get."""

PROTOTYPE = """
def prototype_loss(features, labels, prototypes, metric="l1", scale=1.0):
    difference = features[:, None] - prototypes[None]
    if metric == "l1":
        distance = difference.abs().{l1}(-1)
    elif metric == "l2":
        distance = difference.{l2}
    else:
        distance = {cosine}
    return {loss}
"""
COSINE = "1 - F.normalize(features, dim=1) @ F.normalize(prototypes, dim=1).T"


def prototype(l1="sum", l2="square().sum(-1)", cosine=COSINE, loss="F.cross_entropy(-scale * distance, labels)"):
    return PROTOTYPE.format(l1=l1, l2=l2, cosine=cosine, loss=loss)


TRIPLET = """
def triplet_loss(features, labels, margin=0.3):
    distance = {distance}
    same_class = labels[:, None] == labels
    positive = same_class & ~torch.eye(len(labels), dtype=torch.bool)
    farthest = {farthest}
    nearest = {nearest}
    return {loss}
"""


def triplet(
    distance="torch.cdist(features, features)",
    farthest="torch.where(positive, distance, -torch.inf).amax(1)",
    nearest="torch.where(same_class, torch.inf, distance).amin(1)",
    loss="F.relu(margin + farthest - nearest)[positive.any(1)].mean()",
):
    return TRIPLET.format(distance=distance, farthest=farthest, nearest=nearest, loss=loss)


EPOCH = """
def one_epoch(model, loader, loss, optimizer):
    {mode}
    total = 0.0
    for inputs, labels in loader:
        {step}
        total += {value}
    return {result}
"""
FROZEN = "model.train(); [part.eval() for part in model.modules() if isinstance(part, nn.BatchNorm2d)]"
FORWARD = "value = loss(model(inputs), labels)"


def epoch(
    mode=FROZEN,
    step=f"{FORWARD}; optimizer.zero_grad(); value.backward(); optimizer.step()",
    value="value.item()",
    result="total / len(loader)",
):
    return EPOCH.format(mode=mode, step=step, value=value, result=result)


DRIFT = """
def row_drift(make, features, labels, classes, steps=30):
    layer = nn.Linear(features.shape[1], classes)
    {start}
    optimizer = make(layer.parameters())
    for _ in range({steps}):
        {clear}
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
    w = layer.weight
    return {result}

def keepers():
    return {kept}
"""
ROWS = "(w.mean(0).norm() / w.norm(dim=1).mean()).item()"


def drift(
    start="nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)",
    steps="steps",
    clear="optimizer.zero_grad()",
    result=ROWS,
    kept='{"SGD", "SGD, momentum", "SGD, decay"}',
):
    return DRIFT.format(start=start, steps=steps, clear=clear, result=result, kept=kept)


NEAR_MISSES = {
    "03.1": [
        ("no minus", prototype(loss="F.cross_entropy(scale * distance, labels)"), "A sign is missing"),
        ("no scale", prototype(loss="F.cross_entropy(-distance, labels)"), "The scale is missing"),
        (
            "divided by the scale",
            prototype(loss="F.cross_entropy(-distance / scale, labels)"),
            "You divided by the scale",
        ),
        ("mean over the channels", prototype(l1="mean"), "You averaged over the channels"),
        ("not squared", prototype(l2="square().sum(-1).sqrt()"), "This is the Euclidean distance"),
        ("dot product", prototype(cosine="-features @ prototypes.T"), "This is the dot product"),
        (
            "softmax twice",
            prototype(loss="F.cross_entropy((-scale * distance).softmax(1), labels)"),
            "softmax before cross_entropy",
        ),
        (
            "sum over the batch",
            prototype(loss='F.cross_entropy(-scale * distance, labels, reduction="sum")'),
            "summed over the batch",
        ),
        (
            "one loss each",
            prototype(loss='F.cross_entropy(-scale * distance, labels, reduction="none")'),
            "has the shape (6,)",
        ),
    ],
    "03.2": [
        (
            "mean over all",
            triplet(farthest="(distance * same_class).amax(1)", loss="F.relu(margin + farthest - nearest).mean()"),
            "You averaged over all images",
        ),
        ("sum", triplet(loss="F.relu(margin + farthest - nearest)[positive.any(1)].sum()"), "You summed"),
        ("squared", triplet(distance="torch.cdist(features, features).square()"), "You squared the distances"),
        (
            "nearest positive",
            triplet(farthest="torch.where(positive, distance, torch.inf).amin(1)"),
            "You took the nearest positive",
        ),
        (
            "farthest negative",
            triplet(nearest="torch.where(same_class, -torch.inf, distance).amax(1)"),
            "You took the farthest negative",
        ),
        ("no relu", triplet(loss="(margin + farthest - nearest)[positive.any(1)].mean()"), "pull the mean down"),
        (
            "wrong way round",
            triplet(loss="F.relu(margin + nearest - farthest)[positive.any(1)].mean()"),
            "wrong way round",
        ),
        (
            "root of zero",
            triplet(distance="(features[:, None] - features).square().sum(-1).sqrt()"),
            "the gradient is NaN",
        ),
        (
            "self as negative",
            triplet(nearest="distance.masked_fill(positive, torch.inf).min(1).values"),
            "The nearest negative is 0 away",
        ),
        (
            "a product with the mask",
            triplet(nearest="(distance * ~same_class).amin(1)"),
            "The nearest negative is 0 away",
        ),
        (
            "mean of those above zero",
            """
def triplet_loss(features, labels, margin=0.3):
    total, count = 0, 0
    for i in range(len(labels)):
        d = (features[i] - features).square().sum(1).clamp_min(1e-12).sqrt()
        own, other = labels == labels[i], labels != labels[i]
        own[i] = False
        if own.any() and d[own].max() + margin > d[other].min():
            total, count = total + d[own].max() + margin - d[other].min(), count + 1
    return total / count
""",
            "with a loss above 0",
        ),
        (
            "softplus",
            triplet(loss="F.softplus(margin + farthest - nearest)[positive.any(1)].mean()"),
            "This is softplus",
        ),
        (
            "minus margin",
            triplet(loss="F.relu(farthest - nearest - margin)[positive.any(1)].mean()"),
            "has the wrong sign",
        ),
        ("no margin", triplet(loss="F.relu(farthest - nearest)[positive.any(1)].mean()"), "The margin is missing"),
        (
            "all triplets",
            triplet(
                loss="""torch.stack([
        F.relu(margin + distance[a, p] - distance[a, n])
        for a in range(len(labels)) for p in range(len(labels)) for n in range(len(labels))
        if positive[a, p] and not same_class[a, n]
    ]).mean()"""
            ),
            "You took all triplets",
        ),
    ],
    "03.3": [
        ("gradients add up", epoch(step=f"{FORWARD}; value.backward(); optimizer.step()"), "have added up"),
        (
            "cleared too late",
            epoch(step=f"{FORWARD}; value.backward(); optimizer.zero_grad(); optimizer.step()"),
            "The weights have not moved",
        ),
        (
            "step before backward",
            epoch(step=f"{FORWARD}; optimizer.step(); optimizer.zero_grad(); value.backward()"),
            "modified by an inplace operation",
        ),
        ("statistics move", epoch(mode="model.train()"), "statistics of BatchNorm have moved"),
        ("all in eval", epoch(mode="model.eval()"), "Not in training mode"),
        ("sum", epoch(result="total"), "You returned the sum"),
        ("by samples", epoch(result="total / len(loader.dataset)"), "by the number of samples"),
        (
            "return inside the loop",
            epoch(result="").replace("    return", "        return total / len(loader)"),
            "inside the loop",
        ),
        ("no step", epoch(step=f"{FORWARD}; optimizer.zero_grad(); value.backward()"), "The weights have not moved"),
        ("a tensor", epoch(value="value"), "keeps its graph"),
    ],
    "03.4": [
        ("from random weights", drift(start="pass"), "started at random"),
        ("gradients add up", drift(clear="pass"), "have added up"),
        ("one step", drift(steps="1"), "This is one step"),
        ("the sum of the rows", drift(result=ROWS.replace("w.mean(0)", "w.sum(0)")), "the sum of the rows"),
        (
            "mean over the features",
            drift(result=ROWS.replace("w.mean(0)", "w.mean(1)")),
            "take the mean over the classes",
        ),
        ("not divided", drift(result="w.mean(0).norm().item()"), "The division by the mean length is missing"),
        ("a tensor", drift(result=ROWS.replace(".item()", "")), "Use .item()"),
        (
            "Adam keeps it",
            drift(kept='{"SGD", "SGD, momentum", "SGD, decay", "Adam"}'),
            "keepers() is wrong about Adam",
        ),
        ("momentum forgotten", drift(kept='{"SGD", "SGD, decay"}'), "keepers() is wrong about SGD, momentum"),
    ],
}
