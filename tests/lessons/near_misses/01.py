"""Wrong answers that students give in lesson 01, and a fragment of the message that each of them must get."""

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
    ],
}
