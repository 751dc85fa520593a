"""Wrong answers that students give in lesson 01, and a fragment of the message that each of them must get."""

BY_SIZE = """
def area(boxes):
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])

def hits_by_size(found, true, groups):
    hit = (iou(found, true).diagonal() >= 0.5).double()
    order = area(true).argsort(stable=True)
    return [hit[part].mean().item() for part in order.chunk(groups)]
"""

NEAR_MISSES = {
    "01.1": [
        (
            "mean over the channels",
            """
def class_map(features, weight):
    return (weight[None, :, :, None, None] * features[:, None]).mean(2)
""",
            "averaged over the channels",
        ),
        (
            "ReLU on the map",
            """
def class_map(features, weight):
    return torch.einsum("bkhw,ck->bchw", features, weight).relu()
""",
            "cut off the negative values",
        ),
        (
            "classes first",
            """
def class_map(features, weight):
    return torch.einsum("bkhw,ck->cbhw", features, weight)
""",
            "images come first",
        ),
        (
            "pooled too early",
            """
def class_map(features, weight):
    pooled = features.mean((2, 3)) @ weight.T
    return pooled[:, :, None, None].expand(-1, -1, *features.shape[2:])
""",
            "pooled the features first",
        ),
        (
            "forgotten return",
            """
def class_map(features, weight):
    torch.einsum("bkhw,ck->bchw", features, weight)
""",
            "does your function end with `return`",
        ),
        (
            "softmax of the weights",
            """
def class_map(features, weight):
    return torch.einsum("bkhw,ck->bchw", features, weight.softmax(0))
""",
            "normalised the weights",
        ),
    ],
    "01.2": [
        (
            "over the batch",
            """
def scaled(maps):
    return (maps - maps.min()) / (maps.max() - maps.min())
""",
            "of the whole batch",
        ),
        (
            "over the channels too",
            """
def scaled(maps):
    low, high = maps.amin((1, 2, 3), keepdim=True), maps.amax((1, 2, 3), keepdim=True)
    return (maps - low) / (high - low)
""",
            "over the channels too",
        ),
        (
            "divided by the maximum only",
            """
def scaled(maps):
    return maps / maps.amax((-2, -1), keepdim=True)
""",
            "divided by the maximum only",
        ),
        (
            "ReLU first",
            """
def scaled(maps):
    maps = maps.relu()
    return maps / maps.amax((-2, -1), keepdim=True)
""",
            "as Grad-CAM does",
        ),
        (
            "0 / 0 for a constant map",
            """
def scaled(maps):
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low)
""",
            "A constant map gave NaN",
        ),
        (
            "forgot keepdim",
            """
def scaled(maps):
    low, high = maps.amin((-2, -1)), maps.amax((-2, -1))
    return (maps - low) / (high - low)
""",
            "your code stopped with RuntimeError",
        ),
        (
            "an early return for a constant map",
            """
def scaled(raw):
    low, high = raw.amin((-2, -1), keepdim=True), raw.amax((-2, -1), keepdim=True)
    if (low == high).any():
        return torch.zeros_like(raw)
    return (raw - low) / (high - low)
""",
            "emptied all others",
        ),
        (
            "images one by one",
            """
def scaled(raw):
    out = torch.zeros_like(raw)
    for i, image in enumerate(raw):
        low, high = image.amin((-2, -1), keepdim=True), image.amax((-2, -1), keepdim=True)
        if (high > low).all():
            out[i] = (image - low) / (high - low)
    return out
""",
            "emptied those of its image",
        ),
        (
            "maximum of before",
            """
def scaled(raw):
    high = raw.flatten(2).max(-1)[0][..., None, None]
    return (raw - raw.flatten(2).min(-1)[0][..., None, None]) / high
""",
            "divided by the maximum as it was before",
        ),
        (
            "a constant map is all ones",
            """
def scaled(raw):
    out = torch.ones_like(raw)
    for b in range(raw.shape[0]):
        for c in range(raw.shape[1]):
            spread = raw[b, c].max() - raw[b, c].min()
            if spread > 0:
                out[b, c] = (raw[b, c] - raw[b, c].min()) / spread
    return out
""",
            "Expected zeros for a constant map, got 1",
        ),
    ],
    "01.3": [
        (
            "box around everything",
            """
def region_box(heatmap, threshold):
    rows, columns = np.nonzero(heatmap > threshold * heatmap.max())
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "only the largest connected region counts",
        ),
        (
            "x and y exchanged",
            """
def region_box(heatmap, threshold):
    regions, _ = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    x, y = np.nonzero(regions == np.bincount(regions.ravel())[1:].argmax() + 1)
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1
""",
            "Rows and columns are exchanged",
        ),
        (
            "last pixel",
            """
def region_box(heatmap, threshold):
    regions, _ = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    rows, columns = np.nonzero(regions == np.bincount(regions.ravel())[1:].argmax() + 1)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())
""",
            "one past them",
        ),
        (
            "four neighbours",
            """
def region_box(heatmap, threshold):
    regions, _ = ndimage.label(heatmap > threshold * heatmap.max())
    rows, columns = np.nonzero(regions == np.bincount(regions.ravel())[1:].argmax() + 1)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "touch at a corner",
        ),
        (
            "background wins",
            """
def region_box(heatmap, threshold):
    regions, _ = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    rows, columns = np.nonzero(regions == np.bincount(regions.ravel()).argmax())
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "did the background win",
        ),
        (
            "hottest region",
            """
def region_box(heatmap, threshold):
    regions, _ = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    rows, columns = np.nonzero(regions == regions.ravel()[heatmap.argmax()])
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "hottest region",
        ),
        (
            "absolute threshold",
            """
def region_box(heatmap, threshold):
    regions, _ = ndimage.label(heatmap > threshold, np.ones((3, 3)))
    sizes = np.bincount(regions.ravel())[1:]
    if len(sizes) == 0:
        return 0, 0, 0, 0
    rows, columns = np.nonzero(regions == sizes.argmax() + 1)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "as an absolute value",
        ),
        (
            "x, y, width, height",
            """
def region_box(heatmap, threshold):
    regions, count = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    largest = np.bincount(regions.ravel())[1:].argmax() + 1
    rows, columns = np.nonzero(regions == largest)
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
""",
            "width and height",
        ),
        (
            "forgotten + 1",
            """
def region_box(heatmap, threshold):
    regions, count = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    largest = np.bincount(regions.ravel())[1:].argmax()
    rows, columns = np.nonzero(regions == largest)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "is a + 1 missing",
        ),
        (
            "range without the last",
            """
def region_box(heatmap, threshold):
    regions, count = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    largest = max(range(1, count), key=lambda i: (regions == i).sum())
    rows, columns = np.nonzero(regions == largest)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "is a + 1 missing",
        ),
        (
            "at the threshold",
            """
def region_box(heatmap, threshold):
    regions, count = ndimage.label(heatmap >= threshold * heatmap.max(), np.ones((3, 3)))
    largest = np.bincount(regions.ravel())[1:].argmax() + 1
    rows, columns = np.nonzero(regions == largest)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "above means >",
        ),
        (
            "share of the mean",
            """
def region_box(heatmap, threshold):
    regions, count = ndimage.label(heatmap > threshold * heatmap.mean(), np.ones((3, 3)))
    largest = np.bincount(regions.ravel())[1:].argmax() + 1
    rows, columns = np.nonzero(regions == largest)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "that of the mean",
        ),
        (
            "first region",
            """
def region_box(heatmap, threshold):
    regions, count = ndimage.label(heatmap > threshold * heatmap.max(), np.ones((3, 3)))
    largest = 1
    rows, columns = np.nonzero(regions == largest)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
""",
            "region 1, the first",
        ),
    ],
    "01.4": [
        ("sorted by what was found", BY_SIZE.replace("area(true)", "area(found)"), "a bad box says nothing"),
        ("width alone", BY_SIZE.replace("area(true)", "(true[:, 2] - true[:, 0])"), "by the width alone"),
        ("not sorted", BY_SIZE.replace("area(true).argsort(stable=True)", "torch.arange(len(true))"), "did not sort"),
        (
            "largest first",
            BY_SIZE.replace("argsort(stable=True)", "argsort(stable=True).flip(0)"),
            "smallest first is asked for",
        ),
        ("mean IoU", BY_SIZE.replace(">= 0.5", "+ 0.0"), "You took the mean IoU"),
        ("more than", BY_SIZE.replace(">= 0.5", "> 0.5"), "An IoU of exactly 0.5"),
        ("counted", BY_SIZE.replace("mean()", "sum()"), "You counted"),
        ("percent", BY_SIZE.replace("hit[part]", "100 * hit[part]"), "These are percentages"),
        ("misses", BY_SIZE.replace(">= 0.5", "< 0.5"), "These are the shares of misses"),
    ],
}
