"""Figures of the papers, in one place: what stands beside ours in lessons, tables and the report. In percent."""

# Shen et al., "Distance-Based Class Activation Map for Metric Learning", Table 1: top-1 localisation error of CAM and
# of Dist-CAM on ILSVRC 2012.
DIST_CAM_TABLE_1 = {
    "resnet18": (59.5, 56.7),
    "resnet50": (56.2, 54.7),
    "resnet101": (56.6, 54.9),
    "densenet161": (62.4, 57.6),
    "densenet169": (62.3, 56.6),
    "densenet201": (62.5, 56.4),
}

# Test classes of miniImageNet, 5-way: name, is it transductive, {shots: accuracy}.
FEW_SHOT = (
    ("CSPN, WRN-28-10 (Liu et al., ECCV 2020)", "no", {1: "61.84", 5: "78.64"}),
    ("BD-CSPN, WRN-28-10 (Liu et al., ECCV 2020)", "yes", {1: "70.31", 5: "81.89"}),
    ("ResNet-12 (Shen et al., section 4.1) [1]", "not said", {1: "77.14 ± 0.42"}),
)
FEW_SHOT_CAVEAT = (
    "[1] Shen et al. explain a ResNet-12 that they trained after Liu et al. and call 77.14 ± 0.42 state of the art in "
    "5-way 1-shot. Liu et al. report 70.31 at best, with a wider network, so the figure is not theirs. The data of the "
    "figure, the episodes, their queries, the size of the images and what ± means are not said. It is quoted, not a "
    "target."
)
IMAGENET_CAVEAT = (
    "The network was pretrained on ImageNet, which holds the test classes of miniImageNet: there its figures are no "
    "few-shot learning of classes never seen."
)

# CUB-200-2011: Recall@1, 2, 4, 8, and what to know before comparing.
RETRIEVAL = {
    "multi-similarity loss (Wang et al., CVPR 2019)": (
        (65.7, 77.0, 86.3, 91.2),
        "BN-Inception, 512 dimensions; BatchNorm frozen in the code, unmentioned in the paper",
    ),
    "Proxy-Anchor loss (Kim et al., CVPR 2020)": (
        (69.9, 79.6, 86.6, 91.4),
        "ResNet-50, 512 dimensions, of the released model; pools by mean plus maximum",
    ),
}

# Luo et al., "Bag of Tricks", Market-1501, ResNet-50: rank-1 and mAP when a trick is added to those above it.
REID_TRICKS = {
    "none": (87.7, 74.0),
    "warmup": (88.7, 75.2),
    "erasing": (91.3, 79.3),
    "smoothing": (91.4, 80.3),
    "stride": (92.0, 81.7),
    "bnneck": (94.1, 85.7),
    "center": (94.5, 85.9),
    "re-ranking": (95.4, 94.2),
}

# mIoU of segmentation seeds on VOC's train and val, by method.
SEED_MIOU = {
    "cam": {"train": 47.43},
    "seam": {"train": 55.41, "val": 52.54},
    "eps": {"train": 69.5},
    "seam+p2p": {"train": 61.54, "val": 58.41},
    "eps+p2p": {"train": 70.5},
}

# Du et al., CVPR 2022, Tables 5, 6 and 7: mIoU of segmentation seeds on train, and on val where it is given.
CONTRAST_TABLES = {
    5: {
        "CAM": (47.43,),
        "SEAM": (55.41, 52.54),
        "+ cross-prototype": (59.08, 55.75),
        "+ cross-CAM": (60.35, 57.33),
        "+ intra-view": (59.80, 56.97),
        "+ prototype mining": (60.91, 58.20),
        "+ pixel sampling": (61.54, 58.41),
    },
    6: {
        "K = 0": (55.41,),
        "K = 4": (60.02,),
        "K = 8": (60.87,),
        "K = 16": (61.08,),
        "K = 32": (61.54,),
        "K = 64": (60.55,),
    },
    7: {
        "CAM": (47.43,),
        "rescale": (61.54,),
        "rescale + flip": (61.63,),
        "rescale + rotation": (58.57,),
        "rescale + translation": (59.31,),
    },
}

# Du et al., CVPR 2022, Tables 1 and 2: mIoU of pseudo masks on VOC's train, by method and refinement.
PSEUDO_MASKS = {
    "seam": {"none": 55.4, "crf": 56.8, "psa": 63.6},
    "seam+p2p": {"none": 61.5, "crf": 64.0, "psa": 69.2, "irn": 70.1},
    "eps": {"none": 69.5, "crf": 71.4},
    "eps+p2p": {"none": 70.5, "crf": 73.3},
}

# Du et al., CVPR 2022, Tables 3 and 4: mIoU of DeepLab on these masks, on VOC, by method and head. ResNet38 on SEAM,
# ResNet101 on EPS; which of the two heads of the name ASPP it was is not said.
SEGMENTATION_MIOU = {
    ("seam", "large-fov"): {"val": 64.5, "test": 65.7},
    ("seam+p2p", "large-fov"): {"val": 67.7, "test": 67.4},
    ("eps", "large-fov"): {"val": 71.0, "test": 71.8},
    ("eps+p2p", "large-fov"): {"val": 72.3, "test": 73.5},
    ("eps", "aspp"): {"val": 70.9, "test": 70.8},
    ("eps+p2p", "aspp"): {"val": 72.6, "test": 73.6},
}
