"""Market-1501 (Zheng et al., "Scalable Person Re-identification: A Benchmark", ICCV 2015), read from its real layout.

    bounding_box_train/0002_c1s1_000451_03.jpg      12,936 images of 751 identities
    query/0001_c1s1_001051_00.jpg                    3,368 of 750 other identities: one for each identity and camera
    bounding_box_test/-1_c1s1_000401_03.jpg         19,732; without the junk, 15,913
    parts/query/0001_c1s1_001051_00.png             the miniature only: what each pixel of the image shows (PARTS)

A file name says identity, camera (1-6), sequence, frame and number of the detection. Identity -1 is junk: a box that
cuts a person badly, neither right nor wrong, so it is left out of the gallery. Identity 0 are distractors: they stay
and match nobody. Training and testing identities differ. A query counts against the gallery without its own images in
its own camera.
"""

import re
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from course_lib.data.files import existing
from course_lib.data.images import BrokenFile, load, load_grey
from course_lib.data.miniature import check_counts

MARKET_ARCHIVE = "Market-1501-v15.09.15"
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MARKET_COUNTS = {  # as published
    "train": {"images": 12_936, "identities": 751},
    "query": {"images": 3_368, "identities": 750},
    "gallery": {"images": 15_913, "junk images": 3_819},
}
NAME = re.compile(r"(-1|\d{4})_c([1-6])s(\d)_(\d{6})_(\d{2})")
PARTS = ("background", "head", "torso", "legs", "bag")  # head with hair and hat, torso with arms, legs with shoes


class Market1501(Dataset):
    """One split; `data[i]` is (image, label), and `print` shows a table of what was found.

    Attributes:
        images: file of each image.
        identities: n, int; as in the file names: 0 = distractor.
        cameras: n, int; 1-6.
        labels: n, int; 0-based: position among the sorted identities of this split.
        classes: identity of each label, as in the file names.
        junk: number of images left out.

    Args:
        root: the folder that holds bounding_box_train, or the one above it.
        split: "train", "query" or "gallery".
    Raises:
        FileNotFoundError, BrokenFile: a sentence naming the first missing or broken file, or a count that is not the
            published one.
    """

    def __init__(self, root: str | Path, split: str = "train"):
        if split not in FOLDERS:
            raise ValueError(f"split is one of {', '.join(FOLDERS)}, but {split!r} came.")
        root = Path(root)
        self.root = root / MARKET_ARCHIVE if (root / MARKET_ARCHIVE).is_dir() else root
        self.split, folder = split, self.root / FOLDERS[split]
        files, self.images, fields = sorted(folder.glob("*.jpg")), [], []
        for file in files:
            match = NAME.match(file.name)
            if match is None:
                raise BrokenFile(
                    f"{file} is not named as in Market-1501: expected a name like 0002_c1s1_000451_03.jpg (identity, "
                    "camera 1-6, sequence, frame, detection). Rename it or take it away."
                )
            if match[1] != "-1":
                self.images.append(file)
                fields.append((int(match[1]), int(match[2])))
        if not fields:
            raise FileNotFoundError(
                f"{folder} is missing or holds no image of a person (.jpg): expected Market-1501 at {root}. Give the "
                "folder that holds bounding_box_train, query and bounding_box_test, or write the miniature with "
                "`python -m course_lib data`."
            )
        self.junk = len(files) - len(fields)
        self.identities, self.cameras = torch.tensor(fields).T.contiguous()
        known, self.labels = self.identities.unique(return_inverse=True)
        self.classes = [f"{identity:04}" for identity in known.tolist()]
        found = {"images": len(self), "identities": len(known), "junk images": self.junk}
        check_counts(self.root, f"Market-1501 ({split})", found, MARKET_COUNTS[split])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], int]:
        return load(self.images[index]), int(self.labels[index])

    def parts(self, index: int) -> UInt8[Tensor, "h w"]:
        """What each pixel of an image shows, as position in PARTS; the miniature has it, the benchmark has not."""
        path = self.root / "parts" / FOLDERS[self.split] / f"{self.images[index].stem}.png"
        return load_grey(existing(path, "is missing. Only the miniature has part masks: minis.mini_market()."))

    def __str__(self) -> str:
        persons = self.identities[self.identities > 0]
        cameras = [len(self.cameras[self.identities == identity].unique()) for identity in persons.unique()]
        seen = f"{min(cameras, default=0)}-{max(cameras, default=0)}"
        each = len(persons) / max(1, len(cameras))
        return (
            f"Market-1501, {self.split}: {self.root}\n"
            f"  images       {len(self):6,}   of {len(cameras):,} identities, {each:.1f} each\n"
            f"  cameras      {len(self.cameras.unique()):6}   an identity is seen by {seen}\n"
            f"  distractors  {len(self) - len(persons):6,}\n"
            f"  junk         {self.junk:6,}   left out\n"
            f"  part masks   {'exact' if (self.root / 'parts').is_dir() else 'none':>6}"
        )
