"""Wrong answers that students give in lesson 07, and a fragment of the message that each of them must get."""

TAGS = """
def tag_loss(logits, tags):
    each = tags * F.softplus(-logits) + (1 - tags) * F.softplus(logits)
    return {}
"""

SWEEP = """
def confusions(best, score, truth, thresholds, classes):
    counted, bins = {counted}, len(thresholds) + 1
    truth = {truth}
    below = torch.bucketize(score[counted], thresholds{right})
    cells = (truth[counted] * classes + best[counted]) * bins + below
    counts = cells.bincount(minlength=classes**2 * bins).view(classes, classes, bins)
    above = counts.flip(-1).cumsum(-1).flip(-1)[..., 1:].permute(2, 0, 1)
    {above}
    rest = counts.sum((1, 2)) - above.sum(2)
    return {result}
"""
RIGHT = {
    "counted": "truth != 255",
    "truth": "truth",
    "right": "",
    "above": "",
    "result": "torch.cat((above[..., :1] + rest[..., None], above[..., 1:]), 2)",
}

CORRELATED = """
def correlated(maps, features):
    f = features.flatten(2)
    f = f / (f.norm(dim={over}, keepdim=True) + 1e-5)
    affinity = {affinity}
    return (maps.flatten(2) @ ({weights})).view(maps.shape)
"""
SPREAD = {"over": 1, "affinity": "(f.mT @ f).relu()", "weights": "affinity / (affinity.sum(1, keepdim=True) + 1e-5)"}

PUSHES = """
def pushes(cam, saliency, tags, regions, overlap):
    maps = {maps}
    eps.saliency_loss(maps, saliency, tags, {tau}).backward()
    push = {sign}({field}).sum(1)
    return {{name: {means} for name, where in regions.items()}}
"""
PUSH = {
    "maps": "cam.clone().requires_grad_()",
    "tau": "overlap",
    "sign": "-",
    "field": "maps.grad[:, 1:] * tags[:, :, None, None]",
    "means": "push[where].mean().item()",
}
CONCLUSION = """
def conclusion():
    return {{"fails, on the object": "{}", "fails, on the track": "{}",
            "passes, on the object": "{}", "passes, on the track": "{}"}}
"""

NEAR_MISSES = {
    "07.1": [
        (
            "softmax",
            """
def tag_loss(logits, tags):
    return -(tags * logits.log_softmax(1)).sum(1).mean()
""",
            "two tags of one image compete",
        ),
        ("sum", TAGS.format("each.sum()"), "You summed: the mean over images and classes"),
        ("sum over the classes", TAGS.format("each.sum(1).mean()"), "You summed over the classes"),
        ("only the tags that are there", TAGS.format("(tags * each).mean()"), "Only the tags that are 1 count"),
        (
            "sign",
            """
def tag_loss(logits, tags):
    return (tags * F.softplus(logits) + (1 - tags) * F.softplus(-logits)).mean()
""",
            "turned round",
        ),
        (
            "squared error",
            """
def tag_loss(logits, tags):
    return (logits.sigmoid() - tags).square().mean()
""",
            "squared error",
        ),
        (
            "sigmoid twice",
            """
def tag_loss(logits, tags):
    return F.binary_cross_entropy_with_logits(logits.sigmoid(), tags)
""",
            "sigmoid twice",
        ),
        (
            "unstable",
            """
def tag_loss(logits, tags):
    p = logits.sigmoid()
    return -(tags * p.log() + (1 - tags) * (1 - p).log()).mean()
""",
            "the logarithm of 0",
        ),
        (
            "exp overflows",
            """
def tag_loss(logits, tags):
    return (tags * torch.log(1 + torch.exp(-logits)) + (1 - tags) * torch.log(1 + torch.exp(logits))).mean()
""",
            "exp overflows",
        ),
        (
            "a small number added",
            """
def tag_loss(logits, tags):
    p = torch.sigmoid(logits)
    total = 0.0
    for q, tag in zip(p.flatten(), tags.flatten()):
        total += -torch.log(q + 1e-8) if tag == 1 else -torch.log(1 - q + 1e-8)
    return total / tags.numel()
""",
            "clamp",
        ),
        (
            "no gradient",
            """
def tag_loss(logits, tags):
    with torch.no_grad():
        return F.binary_cross_entropy_with_logits(logits, tags)
""",
            "carries no gradient",
        ),
        (
            "clamped",
            """
def tag_loss(logits, tags):
    p = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    return -(tags * p.log() + (1 - tags) * (1 - p).log()).mean()
""",
            "clamp",
        ),
        ("one for each image", TAGS.format("each.mean(1)"), "tag_loss(...) has the shape (5,)"),
    ],
    "07.2": [
        ("not strictly above", SWEEP.format(**RIGHT | {"right": ", right=True"}), "A score equal to the threshold"),
        ("no background", SWEEP.format(**RIGHT | {"result": "above"}), "Column 0 is empty"),
        (
            "the earlier bins",
            SWEEP.format(**RIGHT | {"above": "above = counts.cumsum(-1)[..., :-1].permute(2, 0, 1)"}),
            "not the earlier ones",
        ),
        (
            "void as background",
            SWEEP.format(**RIGHT | {"counted": "truth > -1", "truth": "torch.where(truth == 255, 0, truth)"}),
            "Void pixels (255) were counted",
        ),
        ("exchanged", SWEEP.format(**RIGHT | {"result": RIGHT["result"] + ".mT"}), "Rows are the truth"),
        ("thresholds last", SWEEP.format(**RIGHT | {"result": RIGHT["result"] + ".permute(1, 2, 0)"}), "first axis"),
        (
            "summed from the start",
            SWEEP.format(**RIGHT | {"above": "above = counts.cumsum(-1)[..., 1:].permute(2, 0, 1)"}),
            "Sum from the far end",
        ),
        (
            "the first bin, too",
            SWEEP.format(**RIGHT | {"above": "above = counts.flip(-1).cumsum(-1).flip(-1)[..., :-1].permute(2, 0, 1)"}),
            "only the bins after it",
        ),
        ("void left in", SWEEP.format(**RIGHT | {"counted": "truth > -1"}), "Void pixels (255) have no cell"),
        (
            "no minlength",
            SWEEP.replace("bincount(minlength=classes**2 * bins)", "bincount()").format(**RIGHT),
            "A class that no pixel has",
        ),
        ("not summed", SWEEP.format(**RIGHT | {"above": "above = counts[..., 1:].permute(2, 0, 1)"}), "One bin only"),
    ],
    "07.3": [
        ("not divided", CORRELATED.format(**SPREAD | {"weights": "affinity"}), "Divide by the sum of the weights."),
        (
            "divided over j",
            CORRELATED.format(**SPREAD | {"weights": "affinity / (affinity.sum(2, keepdim=True) + 1e-5)"}),
            "You divided by the sum over j",
        ),
        ("no ReLU", CORRELATED.format(**SPREAD | {"affinity": "f.mT @ f"}), "Negative cosines took part"),
        (
            "no lengths",
            CORRELATED.format(**SPREAD | {"affinity": "(features.flatten(2).mT @ features.flatten(2)).relu()"}),
            "inner products",
        ),
        ("softmax", CORRELATED.format(**SPREAD | {"weights": "(f.mT @ f).softmax(1)"}), "This is a softmax"),
        ("lengths over the pixels", CORRELATED.format(**SPREAD | {"over": 2}), "over the channels"),
        (
            "images mixed",
            """
def correlated(maps, features):
    n, c, h, w = maps.shape
    f = F.normalize(features, dim=1).transpose(0, 1).flatten(1)         # all images in one list
    affinity = (f.T @ f).relu()
    spread = maps.transpose(0, 1).flatten(1) @ affinity / (affinity.sum(0) + 1e-5)
    return spread.view(c, n, h, w).transpose(0, 1)
""",
            "The images were mixed",
        ),
        (
            "no floor",
            """
def correlated(maps, features):
    f = F.normalize(features.flatten(2), dim=1)
    affinity = (f.mT @ f).relu()
    return (maps.flatten(2) @ affinity / affinity.sum(1, keepdim=True)).view(maps.shape)
""",
            "Features of zero gave NaN",
        ),
        (
            "flat",
            """
def correlated(maps, features):
    f = F.normalize(features.flatten(2), dim=1)
    affinity = (f.mT @ f).relu()
    return maps.flatten(2) @ affinity / (affinity.sum(1, keepdim=True) + 1e-5)
""",
            "correlated(...) has the shape (2, 3, 12)",
        ),
    ],
    "07.4": [
        ("the gradient itself", PUSHES.format(**PUSH | {"sign": ""}), "a step goes against it"),
        (
            "background, too",
            PUSHES.format(**PUSH | {"field": "maps.grad * F.pad(tags, (1, 0), value=1)[:, :, None, None]"}),
            "Channel 0 takes part",
        ),
        ("all classes", PUSHES.format(**PUSH | {"field": "maps.grad[:, 1:]"}), "Classes without a tag take part"),
        ("the usual rule", PUSHES.format(**PUSH | {"tau": "eps.OVERLAP"}), "pass `overlap` on"),
        ("added up", PUSHES.format(**PUSH | {"means": "push[where].sum().item()"}), "take their mean"),
        (
            "a list",
            PUSHES.replace(
                "return {{name: {means} for name, where in regions.items()}}",
                "return [{means} for where in regions.values()]",
            ).format(**PUSH),
            "Return a dict with the names",
        ),
        (
            "the input collects the gradient",
            PUSHES.format(**PUSH | {"maps": "cam.requires_grad_()"}).replace(
                "maps.grad[:, 1:]", "(0 * maps.grad)[:, 1:]"
            ),
            "pushes(...)",
        ),
        (
            "the object is left",
            CONCLUSION.format("left alone", "left alone", "up", "down"),
            "fails, on the object: the",
        ),
        ("the track is pushed", CONCLUSION.format("down", "down", "up", "down"), "fails, on the track: the"),
        ("who passes falls", CONCLUSION.format("down", "left alone", "down", "down"), "passes, on the object: the"),
        ("who passes stays", CONCLUSION.format("down", "left alone", "up", "up"), "passes, on the track: the"),
    ],
}
