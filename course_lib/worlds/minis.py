"""Miniature benchmarks: scenes written in exactly the layout of the real data sets, so that one reader serves both.

python -m course_lib data                                 photographs, then every miniature, in DATA_ROOT
mini-ilsvrc             ImageNet's own classes and ids, validation only: for networks that were pretrained elsewhere
mini-ilsvrc-kind        40 coarse classes, photographs split between train and val: for networks that we train
mini-ilsvrc-creatures   six classes of the procedural world; needs no photographs and is written only when asked for
mini-imagenet           40 kinds in 24 base, 6 validation and 10 novel classes, 84 px: for few-shot learning
mini-cub                every animal a class of its own, the first half of them for training: for retrieval
mini-voc                eight classes, one to three objects an image, masks, saliency: for segmentation from tags
mini-voc-creatures      the same of the procedural world; written only when asked for
mini-voc-chimeras-...   twenty classes of shared heads and bodies, see `chimeras`; written only when asked for
mini-market-clothes     paper dolls seen by six cameras, each known by its clothes; -head: by head and bag; -both
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter
from tqdm import tqdm

from course_lib import paths
from course_lib.backbones import imagenet_classes
from course_lib.data import miniature
from course_lib.data.cub import Cub
from course_lib.data.ilsvrc import SYNSETS, Ilsvrc
from course_lib.data.market1501 import FOLDERS, Market1501
from course_lib.data.miniimagenet import MiniImageNet
from course_lib.data.voc import IGNORE, Voc, write_mask
from course_lib.settings import RandomSeed
from course_lib.worlds import chimeras, dolls, packs, scenes, tagged
from course_lib.worlds.folders import writing
from course_lib.worlds.photographs import Photographs, photographs
from course_lib.worlds.saliency import quality, saliency

SCENE_SIZES = (
    (320, 240),
    (240, 320),
    (288, 288),
    (352, 234),
)  # width, height: squashing must matter, as on real photographs
PER_ITEM = {"photographs": {"train": 6, "val": 4}, "creatures": {"train": 40, "val": 20}}  # scenes of each photograph
PER_CLASS = {"imagenet": 30, "cub": 8}  # scenes of each class
SCORED = 150  # scenes of mini-voc's trainaug that are also in its train
VOC_VERSION = 1  # raise it when code writes another mini-voc of the same recipe
NOVEL, VALIDATION, KINDS = 10, 6, 40  # classes of mini-imagenet; the others are base classes. Fewer kinds: same shares
WAYS = 5  # of an episode: no split has fewer classes
NOTE = "miniature.json"
GENERATION = "-[0-9a-f]{12}$"  # end of the name of a data set that lies beside another one
_saved: ContextVar[tqdm | None] = ContextVar("saved", default=None)  # the bar of the data set that is written
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
            'source is "photographs" or "creatures" and labels is "wnid" or "kind", '
            f"but {source!r} and {labels!r} came."
        )
    world = scenes.creature_world() if source == "creatures" else scenes.photo_world(photographs(root), labels, seed)
    about = {
        "source": source,
        "labels": labels,
        "seed": seed,
        "per_item": PER_ITEM[source],
        "sizes": SCENE_SIZES,
        "world": world.fingerprint,
    }
    kind = labels if source == "photographs" else source
    folder = _folder(root, "mini-ilsvrc" if kind == "wnid" else f"mini-ilsvrc-{kind}", seed)
    images = sum(PER_ITEM[source][split] * len(world.items[split]) for split in ("train", "val"))
    return _once(folder, about, lambda scratch: _write_ilsvrc(scratch, world, PER_ITEM[source], seed), images)


def mini_imagenet(root: str | Path = "", seed: int = 0) -> Path:
    """The folder of a miniature miniImageNet, written if it is not there yet (8 seconds).

    The layout is that of Ravi & Larochelle. One object a scene, 84 px, 30 scenes a class. The seed chooses 10 novel
    (test) and 6 validation classes among those of four photographs and more; their backgrounds were never seen in
    training either. Still, 30 scenes show 4-9 photographs (23 flowers): queries of an episode are more alike than those
    of the benchmark, which flatters rectification most of all.
    """
    world = scenes.photo_world(photographs(root), "kind", seed)
    novel, validation = (max(WAYS, count * len(world.classes) // KINDS) for count in (NOVEL, VALIDATION))
    if len(world.classes) < novel + validation + WAYS:
        raise ValueError(
            f"Expected {novel + validation + WAYS} kinds of two photographs or more for {WAYS}-way episodes, got "
            f"{len(world.classes)}; get more photographs: see data/README.md."
        )
    about = {
        "seed": seed,
        "novel": novel,
        "validation": validation,
        "per_class": PER_CLASS["imagenet"],
        "world": world.fingerprint,
    }
    folder = _folder(root, "mini-imagenet", seed)
    images = PER_CLASS["imagenet"] * len(world.classes)
    return _once(folder, about, lambda scratch: _write_imagenet(scratch, world, novel, validation, seed), images)


def mini_cub(root: str | Path = "", seed: int = 0) -> Path:
    """The folder of a miniature CUB-200-2011, written if it is not there yet (6 seconds).

    A class is one species, as a rule one photograph in eight scenes. The seed gives the classes their order: the first
    half trains, the second half tests, each on backgrounds of its own. One image in 25 is greyscale, as a few of the
    benchmark are.
    """
    pictures = photographs(root)
    world = scenes.photo_world(pictures, "kind", seed)
    about = {"seed": seed, "groups": ANIMALS, "per_class": PER_CLASS["cub"], "world": world.fingerprint}
    folder = _folder(root, "mini-cub", seed)
    species = _species(pictures)
    images = PER_CLASS["cub"] * len(species)
    return _once(folder, about, lambda scratch: _write_cub(scratch, world, species, seed), images)


def mini_market(root: str | Path = "", identity: str = "clothes", seed: int = 0) -> Path:
    """The folder of a miniature Market-1501 of paper dolls with part masks, written if it is not there yet (5 seconds).

    Args:
        identity: what is the same in all images of a person: "clothes", "head" (hair, hat and bag), or "both". What is
            not is drawn anew for every image.
    """
    if identity not in dolls.IDENTITIES:
        raise ValueError(f"identity is one of {', '.join(dolls.IDENTITIES)}, but {identity!r} came.")
    about = {"identity": identity, "seed": seed, "world": dolls.market_fingerprint(identity, seed)}
    folder = _folder(root, f"mini-market-{identity}", seed)
    return _once(folder, about, lambda scratch: _write_market(scratch, identity, seed))


def mini_voc(root: str | Path = "", source: str = "photographs", seed: int = 0) -> Path:
    """The folder of a miniature PASCAL VOC 2012, written if it is not there yet (15-25 seconds).

    One to three objects a scene. `trainaug` is what is trained on (400 scenes of 192 px, or 800 creatures of 96 px),
    `train` its first 150 scenes, `val` 150 others of unseen photographs and backgrounds; new creatures are drawn, but
    none of a new kind. Saliency is computed from each image alone (see `saliency`). One class stands on a track, in
    training always (see `tagged`). Chimeras have no track, but masks of their parts: 800 scenes of 64 px.

    Args:
        source: "photographs", "creatures", or one of `chimeras.CHIMERA_LEVELS`.
        seed: of the scenes, and of the split of the photographs.
    """
    if source not in {**tagged.RECIPES, **chimeras.CHIMERA_LEVELS}:
        known = ", ".join((*tagged.RECIPES, *chimeras.CHIMERA_LEVELS))
        raise ValueError(f"source is one of {known}, but {source!r} came.")
    tells = chimeras.CHIMERA_LEVELS.get(source)
    recipe = tagged.RECIPES[source] if tells is None else chimeras.CHIMERA_RECIPE
    if tells is not None:
        world = chimeras.chimera_world(tells)
    elif source == "photographs":
        world = tagged.photo_track_world(photographs(root), seed)
    else:
        world = tagged.creature_track_world()
    about = {
        "source": source,
        "seed": seed,
        "classes": ["background", *world.classes.values()],
        "version": VOC_VERSION,
        **({"confounded": world.classes[recipe.confounded]} if recipe.confounded else {}),
        "recipe": asdict(recipe),
        "world": world.fingerprint,
    }

    def drawn(split: str, number: int) -> tuple[scenes.Scene, dict[str, np.ndarray]]:
        if tells is not None:
            scene, parts = chimeras.chimera_scene(tells, split, number, seed, recipe)
            return scene, {"Parts": parts}
        scene, track = tagged.scene(world, recipe, split, number, seed)
        return scene, {"Tracks": track.astype(np.uint8) * 255}

    folder = _folder(root, "mini-voc" if source == "photographs" else f"mini-voc-{source}", seed)
    classes, images = list(world.classes.values()), sum(recipe.images.values())
    return _once(folder, about, lambda scratch: _write_voc(scratch, classes, recipe, drawn), images)


def _folder(root: str | Path, name: str, seed: int) -> Path:
    return paths.data_root(root) / (f"{name}-seed{seed}" if seed else name)


@contextmanager
def _bar(title: str, images: int | None) -> Iterator[None]:
    """A bar of the images that are saved meanwhile, with the time left if their number is known."""
    with tqdm(desc=title, total=images, unit=" images", delay=1) as bar:
        token = _saved.set(bar)
        try:
            yield
        finally:
            _saved.reset(token)


def _once(folder: Path, about: dict, write: Callable[[Path], None], images: int | None = None) -> Path:
    """The folder of a data set, which is written once, whole or not at all, even if two processes want it.

    What is there is only read. Nothing that is there is ever removed: where the folder holds something else (the same
    miniature of other photographs or of another version of the course, or files of the user's own), the data set lies
    beside it, under the name of its fingerprint. Files that were lost are written again.
    """
    note = json.loads(json.dumps(about))  # as it is read: tuples are lists
    beside = folder.with_name(f"{folder.name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}")
    if there := next((place for place in (folder, beside) if _whole(place, note)), None):
        return there
    with writing(folder.parent, folder.name) as scratch:
        if there := next((place for place in (folder, beside) if _whole(place, note)), None):
            return there  # another process wrote it meanwhile
        place = next((place for place in (folder, beside) if _about(place) == note), None)
        if place:
            print(f"{place} lacks files; they are written again.", flush=True)
        elif not os.path.lexists(folder):
            place = folder
        elif not os.path.lexists(beside):
            place = beside
            print(f"{folder} holds other data and is left as it is; the data set is written to {beside}.", flush=True)
        else:
            raise FileExistsError(f"{folder} and {beside} hold other data; move one of them away and run again.")
        new = scratch / folder.name
        with _bar(f"Writing {folder.name}", images):
            write(new)
        files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
        counts = Counter(str(path.parent) for path in files)
        _write_lines(new / NOTE, [json.dumps({**about, "files": counts})])
        if not os.path.lexists(place):
            new.rename(place)
        for path in files:
            if not (place / path).is_file():
                (place / path.parent).mkdir(parents=True, exist_ok=True)
                os.replace(new / path, place / path)
    return place


def _about(folder: Path) -> dict:
    """What a folder says it was made from, without its counts of files; nothing if it says nothing readable."""
    try:
        return {name: value for name, value in miniature.about(folder).items() if name != "files"}
    except (OSError, ValueError):  # damaged, or a file of that name: then it is not the data set that we look for
        return {}


def _whole(folder: Path, note: dict) -> bool:
    """Whether a folder is the data set of this note and has at least the files that it had when it was written."""
    try:
        return _about(folder) == note and all(
            sum(entry.is_file() and entry.name != NOTE for entry in os.scandir(folder / part)) >= count
            for part, count in miniature.about(folder).get("files", {}).items()
        )
    except FileNotFoundError:
        return False


def _old_generations(folder: Path) -> Iterator[tuple[Path, str]]:
    """Other generations of a data set, each with why it must stay, or "" if it holds the course's own files only."""
    base = re.sub(GENERATION, "", folder.name)
    for place in sorted(folder.parent.glob(f"{base}*")):
        about = _about(place)
        if place != folder and re.sub(GENERATION, "", place.name) == base and about:
            counts = miniature.about(place).get("files")
            found = Counter(str(path.relative_to(place).parent) for path in place.rglob("*") if not path.is_dir())
            found["."] -= 1  # the note itself
            if place.is_symlink():
                yield place, "it is a link"
            elif counts is None:
                yield place, "an earlier edition wrote it and did not count its files"
            elif +(found - Counter(counts)):
                yield place, "it holds files that the course did not write"
            else:
                yield place, ""


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _save(array: np.ndarray, path: Path, **options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    if path.suffix != ".png" and (bar := _saved.get()) is not None:  # an image, not a mask of one
        bar.update()


def _annotation(folder: str, file: str, scene: scenes.Scene, names: list[str], voc: bool = False) -> str:
    """Objects as XML; VOC's counts pixels from 1, and says what is difficult and what is segmented."""
    height, width = scene.mask.shape
    difficult, segmented = ("\t\t<difficult>0</difficult>\n", "\t<segmented>1</segmented>\n") if voc else ("", "")
    objects = "".join(
        f"\t<object>\n\t\t<name>{escape(names[label])}</name>\n{difficult}\t\t<bndbox>\n\t\t\t<xmin>{x0}</xmin>\n"
        f"\t\t\t<ymin>{y0}</ymin>\n\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>\n\t\t</bndbox>\n\t</object>\n"
        for label, (x0, y0, x1, y1) in zip(scene.labels, scene.boxes + int(voc))
    )
    return (
        f"<annotation>\n\t<folder>{folder}</folder>\n\t<filename>{file}</filename>\n\t<size>\n\t\t<width>{width}</width>\n"
        f"\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>\n{segmented}{objects}</annotation>"
    )


def _write_ilsvrc(folder: Path, world: scenes.World, per_item: dict[str, int], seed: int) -> None:
    synsets, wnids = dict(imagenet_classes()), list(world.classes)
    if not world.classes.keys() <= synsets.keys():  # else all 1000, so that labels are network outputs
        synsets = world.classes
    _write_lines(folder / SYNSETS, (f"{wnid} {name}" for wnid, name in sorted(synsets.items())))
    for part, (split, listing) in enumerate({"train": "train_cls.txt", "val": "val.txt"}.items()):
        shots = [(pick, shot) for pick in range(len(world.items[split])) for shot in range(per_item[split])]
        # In any order, so that the first n of val are a fair sample of it.
        order = np.random.default_rng((seed, part)).permutation(len(shots))
        lines = []
        for number, (pick, shot) in enumerate((shots[i] for i in order), 1):
            label, item = world.items[split][pick]
            rng = np.random.default_rng((seed, part, pick, shot))
            scene = scenes.compose(world, split, [(label, item)], SCENE_SIZES[rng.integers(len(SCENE_SIZES))], rng)
            name = f"{wnids[label]}/{wnids[label]}_{number}" if split == "train" else f"ILSVRC2012_val_{number:08}"
            _write_scene(folder / "ILSVRC", f"CLS-LOC/{split}/{name}", wnids, scene)
            lines.append(f"{name} {number}")
        if lines:
            _write_lines(folder / "ILSVRC" / "ImageSets" / "CLS-LOC" / listing, lines)


def _write_scene(folder: Path, name: str, wnids: list[str], scene: scenes.Scene) -> None:
    image = folder / "Data" / f"{name}.JPEG"
    _save(scene.image, image, quality=92)
    _save((scene.mask > 0).astype(np.uint8) * 255, folder / "Masks" / f"{name}.png")
    _write_lines(folder / "Annotations" / f"{name}.xml", [_annotation(image.parent.name, image.stem, scene, wnids)])


def _write_imagenet(folder: Path, world: scenes.World, novel: int, validation: int, seed: int) -> None:
    photos = [[] for _ in world.classes]
    for label, item in [*world.items["train"], *world.items["val"]]:
        photos[label].append(item)
    order = np.random.default_rng(seed).permutation(len(photos)).tolist()
    order.sort(key=lambda label: len(photos[label]) < 4)  # stable: classes of few photographs are base classes
    known = novel + validation
    members = {"train": order[known:], "val": order[novel:known], "test": order[:novel]}
    wnids = list(world.classes)
    _write_lines(folder / SYNSETS, (f"{wnid} {name}" for wnid, name in world.classes.items()))
    for split, labels in members.items():
        lines = ["filename,label"]
        for label in sorted(labels):
            for shot in range(PER_CLASS["imagenet"]):
                rng = np.random.default_rng((seed, label, shot))
                pick = (label, photos[label][shot % len(photos[label])])
                scene = scenes.compose(world, "train" if split == "train" else "val", [pick], (84, 84), rng)
                name = f"{wnids[label]}{shot + 1:08}.jpg"
                _save(scene.image, folder / "images" / name, quality=92)
                lines.append(f"{name},{wnids[label]}")
        _write_lines(folder / "split" / f"{split}.csv", lines)


def _species(pictures: Photographs) -> dict[str, list]:
    """Photographs of animals by species: those whose file names begin with the same word show the same one."""
    words = {}
    for photograph in sorted((p for p in pictures.cutouts if p.group in ANIMALS), key=lambda p: p.file):
        name = Path(photograph.file).stem.lower().replace("-", "_")
        words.setdefault(name.split("_")[0], {})[name] = photograph
    return {word if len(own) > 1 else next(iter(own)): list(own.values()) for word, own in words.items()}


def _write_cub(folder: Path, world: scenes.World, species: dict[str, list], seed: int) -> None:
    names, shots, classes, rows = list(species), PER_CLASS["cub"], [], []
    for position, pick in enumerate(np.random.default_rng(seed).permutation(len(names))):
        name, photos = names[pick].capitalize(), species[names[pick]]
        own = f"{position + 1:03}.{name}"
        split = "train" if position < len(names) // 2 else "val"
        classes.append(own)
        for shot in range(shots):
            rng = np.random.default_rng((seed, position, shot))
            width, height = SCENE_SIZES[rng.integers(len(SCENE_SIZES))]
            item = photos[shot % len(photos)]
            scene = scenes.compose(world, split, [(0, item)], (width * 2 // 3, height * 2 // 3), rng)
            number = len(rows) + 1
            file = f"{own}/{name}_{shot + 1:04}_{number}.jpg"
            x0, y0, x1, y1 = map(float, scene.boxes[0])
            rows.append((file, position + 1, f"{x0} {y0} {x1 - x0} {y1 - y0}", int(2 * shot < shots)))
            image = Image.fromarray(scene.image)
            _save(np.asarray(image if number % 25 else image.convert("L")), folder / "images" / file, quality=92)
    lists = ("classes", "images", "image_class_labels", "bounding_boxes", "train_test_split")
    for name, entries in zip(lists, (classes, *zip(*rows))):
        _write_lines(folder / f"{name}.txt", (f"{number} {entry}" for number, entry in enumerate(entries, 1)))


def _write_market(folder: Path, identity: str, seed: int) -> None:
    for split, name, image, parts in dolls.market(identity, seed):
        _save(image, folder / FOLDERS[split] / f"{name}.jpg", quality=95, subsampling=0)
        _save(parts, folder / "parts" / FOLDERS[split] / f"{name}.png")


def _write_voc(
    folder: Path,
    classes: list[str],
    recipe: tagged.Recipe,
    drawn: Callable[[str, int], tuple[scenes.Scene, dict[str, np.ndarray]]],
) -> None:
    """Scenes of a split and number, each with further masks by the names of their folders."""
    (folder / "SegmentationClass").mkdir(parents=True)
    lists = {split: [] for split in ("train", "trainaug", "val")}
    for split, count in recipe.images.items():
        for number in range(count):
            scene, masks = drawn("val" if split == "val" else "train", number)
            name = f"2012_{number + (split == 'val') * recipe.images['trainaug'] + 1:06}"
            lists[split].append(name)
            image = folder / "JPEGImages" / f"{name}.jpg"
            _save(scene.image, image, quality=92)
            _save(saliency(np.asarray(Image.open(image))), folder / "SALImages" / f"{name}.png")
            inner = scene.instances if recipe.void == 1 else minimum_filter(scene.instances, 3)
            mask = np.where(maximum_filter(scene.instances, 3) != inner, np.uint8(IGNORE), scene.mask)
            write_mask(folder / "SegmentationClass" / f"{name}.png", mask)
            _save(mask, folder / "SegmentationClassAug" / f"{name}.png")
            for kind, own in masks.items():
                _save(own, folder / kind / f"{name}.png")
            tags = _annotation("VOC2012", image.name, scene, classes, voc=True)
            _write_lines(folder / "Annotations" / f"{name}.xml", [tags])
    lists["train"] = lists["trainaug"][:SCORED]
    for split, names in lists.items():
        _write_lines(folder / "ImageSets" / "Segmentation" / f"{split}.txt", names)


def _write_all(root: str, source: str, seed: int) -> Iterator[tuple[type, Path, Iterable[str]]]:
    """Reader, folder and splits of every miniature, each when it is written."""
    if source == "chimeras":
        for level in chimeras.CHIMERA_LEVELS:
            yield Voc, mini_voc(root, level, seed), ("trainaug", "train", "val")
        return
    with_photographs = source == "photographs"
    yield Ilsvrc, mini_ilsvrc(root, "wnid", source, seed), ("val",) if with_photographs else ("train", "val")
    if with_photographs:
        yield Ilsvrc, mini_ilsvrc(root, "kind", source, seed), ("train", "val")
        yield MiniImageNet, mini_imagenet(root, seed), ("train", "val", "test")
        yield Cub, mini_cub(root, seed), ("train", "test")
        for identity in ("clothes", "head"):
            yield Market1501, mini_market(root, identity, seed), FOLDERS
    yield Voc, mini_voc(root, source, seed), ("trainaug", "train", "val")


def main(
    root: str = "",
    source: Literal["photographs", "creatures", "chimeras"] = "photographs",
    seed: RandomSeed = 0,
    pack: str = "",
    prune: bool = False,
) -> None:
    """Fetch the photographs, write the miniatures, and print what is there.

    Args:
        root: data folder; "": data/ of the checkout, or COURSE_DATA.
        source: of the objects in the scenes.
        seed: of the scenes and of the train/val split.
        pack: write the photographs into this small archive (.zip), for machines without packages, and nothing else.
        prune: remove data sets that these replace, of other photographs or of an earlier edition.
    """
    start = time.perf_counter()
    if pack:
        print(packs.write(photographs(root), Path(pack).expanduser()))
        return
    if source == "photographs":
        print(photographs(root))
    for reader, folder, splits in _write_all(root, source, seed):
        for split in splits:
            data = reader(folder, split)
            print(data)
        for old, reason in _old_generations(folder) if prune else ():
            print(f"  {old} {f'stays: {reason}; remove it yourself' if reason else 'was removed'}.")
            if not reason:
                shutil.rmtree(old)
    print(f"  {quality((data.saliency(i).numpy(), data.mask(i).numpy()) for i in range(len(data)))}")
    print(f"Data ready in {time.perf_counter() - start:.1f} s.")
