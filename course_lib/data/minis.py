"""Miniature benchmarks: scenes written in exactly the layout of the real data sets, so that one reader serves both.

    python -m course_lib data                                 photographs, then every miniature, in DATA_ROOT
    mini-ilsvrc             ImageNet's own classes and ids, validation only: for networks that were pretrained elsewhere
    mini-ilsvrc-kind        40 coarse classes, photographs split between train and val: for networks that we train
    mini-ilsvrc-creatures   six classes of the procedural world; needs no photographs and is written only when asked for
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from filelock import FileLock
from PIL import Image

from course_lib import paths
from course_lib.backbones import imagenet_classes
from course_lib.data import scenes
from course_lib.data.fetch import photographs
from course_lib.data.ilsvrc import Ilsvrc

SIZES = ((320, 240), (240, 320), (288, 288), (352, 234))    # width, height: squashing must matter, as on real photographs
PER_ITEM = {"photographs": {"train": 6, "val": 4}, "creatures": {"train": 40, "val": 20}}      # scenes of each photograph


def mini_ilsvrc(root: str | Path = "", labels: str = "wnid", source: str = "photographs", seed: int = 0) -> Path:
    """The folder of a miniature ILSVRC 2012 in CLS-LOC layout, written if it is not there yet (10-20 seconds).

    One object a scene. The same arguments and photographs give the same bytes.

    Args:
        root: the data folder; "" for the default one.
        labels: for photographs, "wnid" (ImageNet's classes, val only) or "kind" (coarse classes, train and val).
        source: "photographs" or "creatures".
        seed: of the scenes, and of the split of the photographs.
    """
    if source not in PER_ITEM or labels not in ("wnid", "kind"):
        raise ValueError(f'source is "photographs" or "creatures" and labels is "wnid" or "kind", but {source!r} and {labels!r} came.')
    root = paths.data_root(root)
    suffix = ("" if labels == "wnid" else f"-{labels}") if source == "photographs" else f"-{source}"
    folder = root / f"mini-ilsvrc{suffix}{f'-seed{seed}' if seed else ''}"
    world = scenes.creature_world() if source == "creatures" else scenes.photo_world(photographs(root), labels, seed)
    about = {"source": source, "labels": labels, "seed": seed, "per_item": PER_ITEM[source], "sizes": [list(size) for size in SIZES],
             "world": world.fingerprint}
    return _once(folder, about, lambda scratch: _write_ilsvrc(scratch, world, PER_ITEM[source], seed))


def fingerprint(folder: Path) -> str:
    """What a miniature was made from, in 12 letters, or "real data" for a folder that is not a miniature."""
    note = folder / "miniature.json"
    return json.loads(note.read_text())["world"] if note.is_file() else "real data"


def _once(folder: Path, about: dict, write: Callable[[Path], None]) -> Path:
    """Write a data set whole or not at all, once, even if two processes want it; a stale one is replaced."""
    note = folder / "miniature.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (note.is_file() and json.loads(note.read_text()) == about):
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as scratch:
                write(Path(scratch) / folder.name)
                (Path(scratch) / folder.name / note.name).write_text(json.dumps(about) + "\n")
                shutil.rmtree(folder, ignore_errors=True)
                (Path(scratch) / folder.name).rename(folder)
    return folder


def _write_ilsvrc(folder: Path, world: scenes.World, per_item: dict[str, int], seed: int) -> None:
    names = dict(imagenet_classes())
    synsets = names if set(world.classes) <= set(names) else world.classes     # all 1000, so that labels are network outputs
    wnids = list(world.classes)
    folder.mkdir()
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {name}\n" for wnid, name in sorted(synsets.items())), "utf-8")
    sets = folder / "ILSVRC" / "ImageSets" / "CLS-LOC"
    sets.mkdir(parents=True)
    for part, split in enumerate(("train", "val")):
        shots = [(pick, shot) for pick in range(len(world.items[split])) for shot in range(per_item[split])]
        order = np.random.default_rng((seed, part)).permutation(len(shots))    # any first n of val are a fair sample of it
        listing = []
        for number, (pick, shot) in enumerate((shots[i] for i in order), 1):
            label, item = world.items[split][pick]
            rng = np.random.default_rng((seed, part, pick, shot))
            scene = scenes.compose(world, split, [(label, item)], SIZES[rng.integers(len(SIZES))], rng)
            name = f"{wnids[label]}/{wnids[label]}_{number}" if split == "train" else f"ILSVRC2012_val_{number:08}"
            _write_scene(folder / "ILSVRC", f"CLS-LOC/{split}/{name}", wnids[label], scene)
            listing.append(f"{name} {number}\n")
        if listing:
            (sets / ("train_cls.txt" if split == "train" else "val.txt")).write_text("".join(listing))


def _write_scene(folder: Path, name: str, wnid: str, scene: scenes.Scene) -> None:
    image, note, mask = (folder / part / f"{name}{ending}"
                         for part, ending in (("Data", ".JPEG"), ("Annotations", ".xml"), ("Masks", ".png")))
    for path in (image, note, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(image, "JPEG", quality=92)
    Image.fromarray((scene.mask > 0).astype(np.uint8) * 255).save(mask)
    height, width = scene.mask.shape
    objects = "".join(
        f"\t<object>\n\t\t<name>{escape(wnid)}</name>\n\t\t<bndbox>\n\t\t\t<xmin>{x0}</xmin>\n\t\t\t<ymin>{y0}</ymin>\n"
        f"\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n" for x0, y0, x1, y1 in scene.boxes)
    note.write_text(
        f"<annotation>\n\t<folder>{image.parent.name}</folder>\n\t<filename>{image.stem}</filename>\n\t<size>\n"
        f"\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n{objects}</annotation>\n")


def main(argv: list[str]) -> int:
    """`python -m course_lib data`: fetch, write, and print what is there."""
    parser = argparse.ArgumentParser(prog="python -m course_lib data", description="Fetch the photographs, write the miniatures.")
    parser.add_argument("--root", default="", help="data folder (default: data/ of the checkout, or COURSE_DATA)")
    parser.add_argument("--source", choices=sorted(PER_ITEM), default="photographs")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the train/val split (default: 0)")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    if arguments.source == "photographs":
        print(photographs(arguments.root))
    for labels in ("wnid", "kind") if arguments.source == "photographs" else ("wnid",):
        folder = mini_ilsvrc(arguments.root, labels, arguments.source, arguments.seed)
        for split in ("train", "val"):
            if (folder / "ILSVRC" / "Data" / "CLS-LOC" / split).is_dir():
                print(Ilsvrc(folder, split))
    print(f"Data ready in {time.perf_counter() - start:.1f} s.")
    return 0
