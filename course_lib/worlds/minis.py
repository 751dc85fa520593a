"""Miniature benchmarks: scenes written in exactly the layout of the real data sets, so that one reader serves both.

python -m course_lib data                                 photographs, then every miniature, in DATA_ROOT
mini-ilsvrc             ImageNet's own classes and ids, validation only: for networks that were pretrained elsewhere
mini-ilsvrc-kind        40 coarse classes, photographs split between train and val: for networks that we train
mini-ilsvrc-creatures   six classes of the procedural world; needs no photographs and is written only when asked for
mini-imagenet           40 kinds in 24 base, 6 validation and 10 novel classes, 84 px: for few-shot learning
mini-cub                every animal a class of its own, the first half of them for training: for retrieval
mini-voc                eight classes, one to three objects an image, masks, saliency: for segmentation from tags
mini-voc-creatures      the same of the procedural world; written only when asked for
mini-market-clothes     paper dolls seen by six cameras, each known by its clothes; -head: by head and bag; -both
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from filelock import FileLock
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from course_lib import paths
from course_lib.backbones import imagenet_classes
from course_lib.data.cub import Cub
from course_lib.data.ilsvrc import Ilsvrc
from course_lib.data.market1501 import FOLDERS, Market1501
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.data.voc import IGNORE, Voc, write_mask
from course_lib.worlds import dolls, scenes, tagged
from course_lib.worlds.photographs import Photographs, photographs
from course_lib.worlds.saliency import quality, saliency

SIZES = ((320, 240), (240, 320), (288, 288), (352, 234))  # width, height: squashing must matter, as on real photographs
PER_ITEM = {"photographs": {"train": 6, "val": 4}, "creatures": {"train": 40, "val": 20}}  # scenes of each photograph
PER_CLASS = {"imagenet": 30, "cub": 8}  # scenes of each class
SCORED = 150  # scenes of mini-voc's trainaug that are also in its train
VOC_VERSION = 1  # raise it when code writes another mini-voc of the same recipe
NOVEL, VALIDATION = 10, 6  # classes of mini-imagenet; the others are base classes
ANIMALS = ("bird", "hoofed", "furry", "fish", "sea", "crawling")  # groups in mini-cub


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
        raise ValueError(
            f'source is "photographs" or "creatures" and labels is "wnid" or "kind", but {source!r} and {labels!r} came.'
        )
    root = paths.data_root(root)
    suffix = ("" if labels == "wnid" else f"-{labels}") if source == "photographs" else f"-{source}"
    folder = _folder(root, f"mini-ilsvrc{suffix}", seed)
    world = scenes.creature_world() if source == "creatures" else scenes.photo_world(photographs(root), labels, seed)
    about = {
        "source": source,
        "labels": labels,
        "seed": seed,
        "per_item": PER_ITEM[source],
        "sizes": [list(size) for size in SIZES],
        "world": world.fingerprint,
    }
    return _once(folder, about, lambda scratch: _write_ilsvrc(scratch, world, PER_ITEM[source], seed))


def mini_imagenet(root: str | Path = "", seed: int = 0) -> Path:
    """The folder of a miniature miniImageNet in the layout of Ravi & Larochelle, written if it is not there yet (8 seconds).

    One object a scene, 84 px, 30 scenes a class. The seed chooses 10 novel (test) and 6 validation classes among those of
    four photographs and more; their backgrounds were never seen in training either. Still, 30 scenes show 4-9 photographs (23
    flowers): queries of an episode are more alike than those of the benchmark, which flatters rectification most of all.
    """
    root = paths.data_root(root)
    world = scenes.photo_world(photographs(root), "kind", seed)
    about = {
        "seed": seed,
        "novel": NOVEL,
        "validation": VALIDATION,
        "per_class": PER_CLASS["imagenet"],
        "world": world.fingerprint,
    }
    return _once(
        _folder(root, "mini-imagenet", seed),
        about,
        lambda scratch: _write_imagenet(scratch, world, PER_CLASS["imagenet"], seed),
    )


def mini_cub(root: str | Path = "", seed: int = 0) -> Path:
    """The folder of a miniature CUB-200-2011, written if it is not there yet (6 seconds).

    A class is one species, as a rule one photograph in eight scenes. The seed gives the classes their order: the first half
    trains, the second half tests, each on backgrounds of its own. One image in 25 is greyscale, as a few of the benchmark are.
    """
    root = paths.data_root(root)
    pictures = photographs(root)
    world = scenes.photo_world(pictures, "kind", seed)
    about = {"seed": seed, "groups": list(ANIMALS), "per_class": PER_CLASS["cub"], "world": world.fingerprint}
    return _once(
        _folder(root, "mini-cub", seed),
        about,
        lambda scratch: _write_cub(scratch, world, _species(pictures), PER_CLASS["cub"], seed),
    )


def mini_market(root: str | Path = "", identity: str = "clothes", seed: int = 0) -> Path:
    """The folder of a miniature Market-1501 of paper dolls with part masks, written if it is not there yet (5 seconds).

    Args:
        identity: what is the same in all images of a person: "clothes", "head" (hair, hat and bag), or "both". What is not is
            drawn anew for every image.
    """
    if identity not in dolls.IDENTITIES:
        raise ValueError(f"identity is one of {', '.join(dolls.IDENTITIES)}, but {identity!r} came.")
    about = {"identity": identity, "seed": seed, "world": dolls.fingerprint(identity, seed)}
    return _once(
        _folder(paths.data_root(root), f"mini-market-{identity}", seed),
        about,
        lambda scratch: _write_market(scratch, identity, seed),
    )


def mini_voc(root: str | Path = "", source: str = "photographs", seed: int = 0) -> Path:
    """The folder of a miniature PASCAL VOC 2012, written if it is not there yet (15-25 seconds).

    One to three objects a scene. `trainaug` is what is trained on (400 scenes of 192 px, or 800 creatures of 96 px), `train` its
    first 150 scenes, `val` 150 others of unseen photographs and backgrounds; new creatures are drawn, but none of a new kind.
    Saliency is computed from each image alone (see `saliency`). One class stands on a track, in training always (see `tagged`).

    Args:
        source: "photographs" or "creatures".
        seed: of the scenes, and of the split of the photographs.
    """
    if source not in tagged.RECIPES:
        raise ValueError(f'source is "photographs" or "creatures", but {source!r} came.')
    root = paths.data_root(root)
    recipe = tagged.RECIPES[source]
    world = tagged.photo_world(photographs(root), seed) if source == "photographs" else tagged.creature_world()
    about = {
        "source": source,
        "seed": seed,
        "classes": ["background", *world.classes.values()],
        "version": VOC_VERSION,
        "confounded": world.classes[recipe.confounded],
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "world": world.fingerprint,
    }
    return _once(
        _folder(root, "mini-voc" if source == "photographs" else f"mini-voc-{source}", seed),
        about,
        lambda scratch: _write_voc(scratch, world, recipe, seed),
    )


def fingerprint(folder: Path) -> str:
    """What a miniature was made from, in 12 letters, or "real data" for a folder that is not a miniature."""
    note = folder / "miniature.json"
    return json.loads(note.read_text())["world"] if note.is_file() else "real data"


def _folder(root: Path, name: str, seed: int) -> Path:
    return root / (f"{name}-seed{seed}" if seed else name)


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
    synsets = (
        names if set(world.classes) <= set(names) else world.classes
    )  # all 1000, so that labels are network outputs
    wnids = list(world.classes)
    folder.mkdir()
    (folder / "LOC_synset_mapping.txt").write_text(
        "".join(f"{wnid} {name}\n" for wnid, name in sorted(synsets.items())), "utf-8"
    )
    sets = folder / "ILSVRC" / "ImageSets" / "CLS-LOC"
    sets.mkdir(parents=True)
    for part, split in enumerate(("train", "val")):
        shots = [(pick, shot) for pick in range(len(world.items[split])) for shot in range(per_item[split])]
        order = np.random.default_rng((seed, part)).permutation(
            len(shots)
        )  # any first n of val are a fair sample of it
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
    image, note, mask = (
        folder / part / f"{name}{ending}"
        for part, ending in (("Data", ".JPEG"), ("Annotations", ".xml"), ("Masks", ".png"))
    )
    for path in (image, note, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(image, "JPEG", quality=92)
    Image.fromarray((scene.mask > 0).astype(np.uint8) * 255).save(mask)
    height, width = scene.mask.shape
    objects = "".join(
        f"\t<object>\n\t\t<name>{escape(wnid)}</name>\n\t\t<bndbox>\n\t\t\t<xmin>{x0}</xmin>\n\t\t\t<ymin>{y0}</ymin>\n"
        f"\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for x0, y0, x1, y1 in scene.boxes
    )
    note.write_text(
        f"<annotation>\n\t<folder>{image.parent.name}</folder>\n\t<filename>{image.stem}</filename>\n\t<size>\n"
        f"\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n{objects}</annotation>\n"
    )


def _write_imagenet(folder: Path, world: scenes.World, per_class: int, seed: int) -> None:
    photos = {
        label: [item for split in ("train", "val") for other, item in world.items[split] if other == label]
        for label in range(len(world.classes))
    }
    order = np.random.default_rng(seed).permutation(len(photos)).tolist()
    order.sort(key=lambda label: len(photos[label]) < 4)  # stable: classes of few photographs are base classes
    members = {"train": order[NOVEL + VALIDATION :], "val": order[NOVEL : NOVEL + VALIDATION], "test": order[:NOVEL]}
    wnids = list(world.classes)
    (folder / "images").mkdir(parents=True)
    (folder / "split").mkdir()
    (folder / "LOC_synset_mapping.txt").write_text(
        "".join(f"{wnid} {name}\n" for wnid, name in world.classes.items()), "utf-8"
    )
    for split, labels in members.items():
        lines = ["filename,label"]
        for label in sorted(labels):
            for shot in range(per_class):
                rng = np.random.default_rng((seed, label, shot))
                pick = (label, photos[label][shot % len(photos[label])])
                scene = scenes.compose(world, "train" if split == "train" else "val", [pick], (84, 84), rng)
                name = f"{wnids[label]}{shot + 1:08}.jpg"
                Image.fromarray(scene.image).save(folder / "images" / name, quality=92)
                lines.append(f"{name},{wnids[label]}")
        (folder / "split" / f"{split}.csv").write_text("\n".join(lines) + "\n")


def _species(pictures: Photographs) -> dict[str, list]:
    """Photographs of animals by species: those whose file names begin with the same word show the same one."""
    words: dict[str, list] = {}
    for photograph in sorted((p for p in pictures.cutouts if p.group in ANIMALS), key=lambda p: p.file):
        words.setdefault(Path(photograph.file).stem.lower().replace("-", "_").split("_")[0], []).append(photograph)
    return {
        word if len(own) > 1 else Path(own[0].file).stem.lower().replace("-", "_"): own for word, own in words.items()
    }


def _write_cub(folder: Path, world: scenes.World, species: dict[str, list], per_class: int, seed: int) -> None:
    lists = {name: [] for name in ("classes", "images", "image_class_labels", "bounding_boxes", "train_test_split")}
    names = list(species)
    for position, pick in enumerate(np.random.default_rng(seed).permutation(len(names))):
        name, photos = names[pick].capitalize(), species[names[pick]]
        own = f"{position + 1:03}.{name}"
        lists["classes"].append(own)
        (folder / "images" / own).mkdir(parents=True)
        for shot in range(per_class):
            rng = np.random.default_rng((seed, position, shot))
            split = "train" if position < len(names) // 2 else "val"
            size = SIZES[rng.integers(len(SIZES))]
            scene = scenes.compose(
                world, split, [(0, photos[shot % len(photos)])], (size[0] * 2 // 3, size[1] * 2 // 3), rng
            )
            number = len(lists["images"]) + 1
            lists["images"].append(f"{own}/{name}_{shot + 1:04}_{number}.jpg")
            lists["image_class_labels"].append(position + 1)
            x0, y0, x1, y1 = map(float, scene.boxes[0])
            lists["bounding_boxes"].append(f"{x0} {y0} {x1 - x0} {y1 - y0}")
            lists["train_test_split"].append(int(2 * shot < per_class))
            image = Image.fromarray(scene.image)
            (image.convert("L") if number % 25 == 0 else image).save(
                folder / "images" / lists["images"][-1], quality=92
            )
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{number} {line}\n" for number, line in enumerate(lines, 1)))


def _write_market(folder: Path, identity: str, seed: int) -> None:
    for split in FOLDERS.values():
        (folder / split).mkdir(parents=True)
        (folder / "parts" / split).mkdir(parents=True)
    for split, name, image, parts in dolls.market(identity, seed):
        Image.fromarray(image).save(folder / FOLDERS[split] / f"{name}.jpg", quality=95, subsampling=0)
        Image.fromarray(parts).save(folder / "parts" / FOLDERS[split] / f"{name}.png")


def _write_voc(folder: Path, world: scenes.World, recipe: tagged.Recipe, seed: int) -> None:
    parts = (
        "JPEGImages",
        "Annotations",
        "SegmentationClass",
        "SegmentationClassAug",
        "SALImages",
        "Tracks",
        "ImageSets/Segmentation",
    )
    for part in parts:
        (folder / part).mkdir(parents=True)
    lists = {split: [] for split in ("train", "trainaug", "val")}
    for split, count in recipe.images.items():
        for number in range(count):
            scene, track = tagged.scene(world, recipe, "val" if split == "val" else "train", number, seed)
            lists[split].append(f"2012_{number + (split == 'val') * recipe.images['trainaug'] + 1:06}")
            _write_voc_scene(folder, lists[split][-1], list(world.classes.values()), scene, track, recipe.void)
    lists["train"] = lists["trainaug"][:SCORED]
    for split, names in lists.items():
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _write_voc_scene(
    folder: Path, name: str, names: list[str], scene: scenes.Scene, track: np.ndarray, void: int
) -> None:
    image = folder / "JPEGImages" / f"{name}.jpg"
    Image.fromarray(scene.image).save(image, "JPEG", quality=92)
    Image.fromarray(saliency(np.asarray(Image.open(image)))).save(folder / "SALImages" / f"{name}.png")
    inner = scene.instances if void == 1 else minimum_filter(scene.instances, 3)
    edge = maximum_filter(scene.instances, 3) != inner
    mask = np.where(edge, np.uint8(IGNORE), scene.mask)
    write_mask(folder / "SegmentationClass" / f"{name}.png", mask)
    Image.fromarray(mask).save(folder / "SegmentationClassAug" / f"{name}.png")
    Image.fromarray(track.astype(np.uint8) * 255).save(folder / "Tracks" / f"{name}.png")
    height, width = mask.shape
    objects = "".join(
        f"\t<object>\n\t\t<name>{escape(names[label])}</name>\n\t\t<difficult>0</difficult>\n\t\t<bndbox>\n"
        f"\t\t\t<xmin>{x0 + 1}</xmin>\n\t\t\t<ymin>{y0 + 1}</ymin>\n\t\t\t<xmax>{x1 + 1}</xmax>\n\t\t\t<ymax>{y1 + 1}</ymax>\n"
        "\t\t</bndbox>\n\t</object>\n"
        for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes, strict=True)
    )
    (folder / "Annotations" / f"{name}.xml").write_text(
        f"<annotation>\n\t<folder>VOC2012</folder>\n\t<filename>{name}.jpg</filename>\n\t<size>\n\t\t<width>{width}</width>\n"
        f"\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n\t<segmented>1</segmented>\n{objects}</annotation>\n"
    )


def main(argv: list[str]) -> int:
    """`python -m course_lib data`: fetch, write, and print what is there."""
    parser = argparse.ArgumentParser(
        prog="python -m course_lib data", description="Fetch the photographs, write the miniatures."
    )
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
    if arguments.source == "photographs":
        folder = mini_imagenet(arguments.root, arguments.seed)
        print(*(MiniImageNet(folder, split) for split in ("train", "val", "test")), sep="\n")
        folder = mini_cub(arguments.root, arguments.seed)
        print(*(Cub(folder, split) for split in ("train", "test")), sep="\n")
        for identity in ("clothes", "head"):
            folder = mini_market(arguments.root, identity, arguments.seed)
            print(*(Market1501(folder, split) for split in FOLDERS), sep="\n")
    folder = mini_voc(arguments.root, arguments.source, arguments.seed)
    for split in ("trainaug", "train", "val"):
        data = Voc(folder, split)
        print(data)
    print(f"  {quality((data.saliency(i).numpy(), data.mask(i).numpy()) for i in range(len(data)))}")
    print(f"Data ready in {time.perf_counter() - start:.1f} s.")
    return 0
