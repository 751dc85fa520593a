"""What took long is computed once: a cache of tensors and figures whose names are made of all that they depend on.

A lesson uses it in one line for features, in one for a training, or for anything else in two:

    known_t = extract(lambda images: trunk(before, images), known, (224, 224), keep=fingerprint(root))
    history, pages = wsss.learner.fit_once(learner, images, watch)            # learner.net is the trained network

    def figures(): return {"map": MAP, "curve": [1.0, 2.0]}                   # tensors, numbers, words
    found = cached("centres", figures, data=fingerprint(root), settings=[side, SEED])

The first time it computes, with whatever bar `make` shows, and says that it keeps the result; afterwards it reads, and
says so. An entry is found again only if nothing changed of its name, data, settings, the code that makes it, weights,
versions of packages, and kind of processor (not the number of its threads). So it is never stale: what changed is
computed anew, and the oldest entries go.

COURSE_CACHE of the environment names the folder; "off" switches all of this off. Else it is build/cache of the
checkout, or the user's own folder of caches.
"""

import ast
import contextlib
import dataclasses
import dis
import hashlib
import inspect
import json
import os
import platform
import random
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import Dataset

from course_lib import checkpoints, paths

CACHE_BYTES = 2 * 2**30  # bytes that all entries may take together
LOCK_SECONDS = 1800  # seconds that one process waits for another that makes the same
LEFTOVER_SECONDS = 86_400  # seconds after which what an interrupted process left behind goes
CACHE_LAYOUT = 1  # of entries and keys: raise it when either means something else
KEYED_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "scikit-learn")
KEYED_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")  # they choose those of the processor
_PLAIN = (types.NoneType, bool, int, str, float, torch.dtype, torch.device, Path)
_FOREIGN = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))

_imported = {str(path): path.stat().st_mtime_ns for path in paths.HERE.rglob("*.py")}  # before anybody edits them


def cached(
    name: str,
    make: Callable[[], Any],
    *,
    data: str,
    settings: Any = None,
    code: Iterable[Any] = (),
    seed: int = 0,
    takes: str = "",
) -> Any:
    """What `make` returns, or returned earlier under the same circumstances: the same types and numbers either way.

    What comes back consists of dicts, lists, tuples, tensors (on the CPU, without gradient), numbers, words and None.
    `make` draws by generators that start from `seed`, and afterwards the generators of torch, numpy and Python stand
    where they stood before: what follows does not depend on whether the entry was there. What `make` changes elsewhere
    does not happen when the entry is there; so it should return all that is wanted.

    The code of `make` is looked through, with what it calls in the notebook, and with the modules of course_lib that it
    names. So are the values that it uses: plain ones, tensors, networks (by their weights), and attributes of data sets
    and of other objects of ours. Objects of other packages are not looked into, nor are images: what matters of them
    must stand in `settings` and `data`.

    Args:
        name: what is made, in words; it stands in the messages and in the name of the file.
        data: the `fingerprint` of the data set, "" if there is none.
        settings: what else it depends on: numbers, words, paths, tensors, networks, dataclasses, and dicts and lists of
            these.
        code: functions, classes or modules that `make` uses without naming them.
        seed: of torch, numpy and Python while `make` runs.
        takes: how long it takes, such as "about a minute".
    Raises:
        TypeError: settings or results of another type.
    """
    key = _Key()
    key.add("name", name, CACHE_LAYOUT)
    key.add("data", data)
    key.add("settings", settings, seed)
    for part in (make, *code):
        key.follow(part)
    with _generators_apart():
        return _found_or_made(name, make, key, seed, takes)


def folder() -> Path | None:
    """The folder of entries, which need not be there yet; None if COURSE_CACHE is "off"."""
    chosen = os.environ.get("COURSE_CACHE", "").strip()
    if chosen.lower() in ("off", "0", "no", "false"):
        return None
    if chosen:
        return Path(chosen).expanduser().absolute()
    root = paths.checkout()
    if root:
        return root / "build" / "cache"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "course_lib" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "course_lib"


class _Key:
    """All that a result depends on, as text; the digest of it names the file."""

    def __init__(self) -> None:
        packages = {name: _version(name) for name in KEYED_PACKAGES}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        instructions = {name: os.environ.get(name, "") for name in KEYED_VARIABLES}
        self.parts = [
            ["versions", packages, platform.python_version_tuple()[:2]],
            ["processor", platform.machine(), torch.backends.cpu.get_cpu_capability(), instructions, device],
            ["floats", str(torch.get_default_dtype())],
        ]
        self.modules: set[str] = set()  # of course_lib
        self.seen: dict[int, Any] = {}  # code by id, kept alive so that no id is used twice
        self.open: set[int] = set()  # objects that are being described

    def add(self, what: str, *values: Any) -> None:
        """Take values into the key.

        Raises:
            TypeError: a value whose content cannot be told.
        """
        self.parts.append([what, *map(self.described, values)])

    def digest(self) -> str:
        """32 letters."""
        whole = json.dumps([self.parts, sorted(_sources(frozenset(self.modules)).items())], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    def changed(self) -> list[str]:
        """Names of files of course_lib that the key depends on, and that are no longer what was imported."""
        files = [Path(path) for path in _sources(frozenset(self.modules))]
        return [
            str(path.relative_to(paths.HERE.parent))
            for path in files
            if path.stat().st_mtime_ns != _imported.get(str(path), path.stat().st_mtime_ns)
        ]

    def described(self, value: Any) -> Any:
        """A value as JSON that is equal only for equal values."""
        if isinstance(value, float):
            return ["float", value.hex()]
        if isinstance(value, bool | int | str | None):
            return value
        if isinstance(value, _PLAIN):
            return [type(value).__name__, str(value)]
        if isinstance(value, Tensor | np.ndarray | np.generic):
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            return ["tensor", str(tensor.dtype), list(tensor.shape), _bytes_of(tensor).hexdigest()]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.follow(type(value))
            fields = [part.name for part in dataclasses.fields(value) if part.repr]
            return [type(value).__qualname__, [[name, self.described(getattr(value, name))] for name in fields]]
        if isinstance(value, dict):
            pairs = [[self.described(key), self.described(part)] for key, part in value.items()]
            return ["dict", sorted(pairs, key=json.dumps)]
        if isinstance(value, list | tuple):
            return [type(value).__name__, *map(self.described, value)]
        if isinstance(value, set | frozenset):
            return ["set", *sorted(map(self.described, value), key=json.dumps)]
        if isinstance(value, slice | range):
            return [type(value).__name__, value.start, value.stop, value.step]
        if self._is_object(value):
            if id(value) in self.open:
                return ["again", type(value).__qualname__]
            self.open.add(id(value))
            told = self._network(value) if isinstance(value, nn.Module) else self._object(value)
            self.open.remove(id(value))
            return [type(value).__qualname__, told]
        if callable(value) or isinstance(value, types.ModuleType):
            self.follow(value)
            return ["code", getattr(value, "__module__", None), getattr(value, "__qualname__", str(value))]
        raise TypeError(
            f"Expected settings of numbers, words, paths, tensors, networks, dataclasses, dicts and lists, got a "
            f"{type(value).__name__}; name what matters of it."
        )

    def follow(self, part: Any) -> None:
        """Take the code of a function, class or module into the key, with all of ours that it uses."""
        if id(part) in self.seen:
            return
        self.seen[id(part)] = part
        if isinstance(part, types.ModuleType):
            self._module(part.__name__)
        elif isinstance(part, partial):
            self.follow(part.func)
            for name, value in (*enumerate(part.args), *part.keywords.items()):
                self._value(f"argument {name}", value)
        elif isinstance(part, types.MethodType):
            self.follow(part.__func__)
            self._value("self", part.__self__)
        elif isinstance(part, type):
            if self._module(part.__module__) or _foreign(part):
                return
            for base in part.__bases__:
                self.follow(base)
            self.parts.append(["class", part.__qualname__])
            for name, member in vars(part).items():
                member = getattr(member, "__func__", getattr(member, "fget", member))
                if isinstance(member, types.FunctionType):
                    self.follow(member)
                elif not name.startswith("__"):
                    self._value(name, member)
        elif isinstance(part, types.FunctionType):
            part = inspect.unwrap(part)
            self.seen[id(part)] = part
            if not (self._module(part.__module__) or _foreign(part)):
                self._function(part)
        elif self._is_object(part):
            self._value("object", part)

    def _object(self, value: Any) -> list:
        """The code of an object, and its attributes as far as their content can be told."""
        self.follow(type(value))
        told = []
        for name, part in vars(value).items():
            # What is cached follows from the other attributes; those of a network with _ are parameters and hooks.
            derived = isinstance(getattr(type(value), name, None), cached_property)
            if not (derived or (isinstance(value, nn.Module) and name.startswith("_"))):
                with contextlib.suppress(TypeError):
                    told.append([name, self.described(part)])
        return told

    def _network(self, value: nn.Module) -> list:
        """Form, numbers and hooks of a network, and attributes of those of its parts that are ours."""
        state = {**dict(value.named_parameters()), **dict(value.named_buffers())}
        told = [repr(value), [[name, self.described(part)] for name, part in state.items()]]
        for name, part in value.named_modules():
            hooks = *part._forward_hooks.values(), *part._forward_pre_hooks.values()
            told += [[name, self.described(hook)] for hook in hooks]
            if not _foreign(type(part)):
                told.append([name, self._object(part)])
        return told

    @staticmethod
    def _is_object(value: Any) -> bool:
        """Whether a value is a network, a data set, or an object of a class of ours or of the notebook."""
        code = type | types.ModuleType | types.FunctionType | types.MethodType | types.BuiltinFunctionType | partial
        return (
            hasattr(value, "__dict__")
            and not isinstance(value, code)
            and (isinstance(value, Dataset | nn.Module) or not _foreign(type(value)))
        )

    def _module(self, name: str | None) -> bool:
        """Whether a module is one of course_lib; then it is taken into the key."""
        ours = bool(name) and name.split(".")[0] == "course_lib"
        if ours:
            self.modules.add(name)
        return ours

    def _function(self, function: types.FunctionType) -> None:
        """What a function of a notebook does, by its bytecode: the source of a cell may be gone."""
        names, attributes = set(), set()
        self.parts.append(["function", function.__qualname__, _instructions(function.__code__, names, attributes)])
        self._value("defaults", function.__defaults__)
        self._value("defaults", function.__kwdefaults__)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            self._value(name, value)
            if isinstance(value, types.ModuleType) and self._module(value.__name__):
                for attribute in attributes & vars(value).keys():  # a module of a package may not be imported by it
                    if isinstance(vars(value)[attribute], types.ModuleType):
                        self.follow(vars(value)[attribute])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            with contextlib.suppress(ValueError):  # an empty cell
                self._value(name, cell.cell_contents)

    def _value(self, name: str, value: Any) -> None:
        """Take what a function uses into the key, as far as its content can be told."""
        whole = isinstance(value, Tensor) or self._is_object(value)
        if whole or not (callable(value) or isinstance(value, types.ModuleType)):
            with contextlib.suppress(TypeError):
                self.parts.append([name, self.described(value)])
                return
            self.follow(type(value))
        else:
            self.parts.append([name, getattr(value, "__qualname__", str(type(value)))])
            self.follow(value)


def _foreign(part):
    """Whether code belongs to Python or to an installed package: their versions stand in the key."""
    name = part.__module__ or ""
    file = getattr(sys.modules.get(name), "__file__", None)
    # In a kernel __main__ is the notebook, whatever file it says.
    return name != "__main__" and (name in sys.builtin_module_names or (file or "").startswith(_FOREIGN))


def _instructions(code, names, attributes):
    """Instructions and constants of a piece of bytecode, and of those inside it; adds the names of globals that it
    uses, and those of attributes."""
    names.update(step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    attributes.update(code.co_names)
    constants = [
        _instructions(constant, names, attributes)
        if isinstance(constant, types.CodeType)
        else repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)
        for constant in code.co_consts
    ]
    return [code.co_code.hex(), constants, code.co_names, code.co_freevars]


@cache
def _version(package):
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)


@cache
def _sources(modules: frozenset[str]) -> dict[str, str]:
    """Hashes of the files of modules of course_lib and of all that they import of it, by path."""
    hashes, todo = {}, {*modules, "course_lib"}
    done = set()
    while todo:
        name = todo.pop()
        done.add(name)
        file = _file(name)
        if file is None:
            continue
        text = file.read_text(encoding="utf-8")
        hashes[str(file)] = hashlib.sha256(text.encode()).hexdigest()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
            else:
                continue
            parents = (".".join(one.split(".")[:count]) for one in found for count in range(1, one.count(".") + 2))
            todo |= {one for one in parents if one.split(".")[0] == "course_lib"} - done
    return hashes


def _file(module):
    """The file of a module of course_lib, None for what is no module."""
    path = paths.HERE.joinpath(*module.split(".")[1:])
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _found_or_made(name, make, key, seed, takes):
    """See `cached`."""
    place = folder()
    if place is None:
        return _made(make, seed)[0]
    if changed := key.changed():
        _say(
            f"{name}: computed without the cache, because {', '.join(changed)} changed after it was imported; restart "
            "the kernel."
        )
        return _made(make, seed)[0]
    path = place / f"{_slug(name)}-{key.digest()}.safetensors"
    state, tree = _read(path, name)
    if state is None:
        with _alone(path, name):
            state, tree = _read(path, name)  # another process may have made it meanwhile
            if state is None:
                _say(f"{name}: not kept yet, so it is computed now{takes and f' ({takes})'}.")
                started = time.perf_counter()
                result, state, tree = _made(make, seed)
                _write(path, name, state, {"tree": tree, "seconds": time.perf_counter() - started})
                return result
    return _put_together(tree, state)


@contextlib.contextmanager
def _generators_apart() -> Iterator[None]:
    """The generators of torch, numpy and Python stand afterwards where they stood before."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _made(make, seed):
    """What `make` returns as it will be read again, its tensors by name, and the rest."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    state: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(_taken_apart(make(), state)))
    return _put_together(tree, state), state, tree


def _taken_apart(value, state):
    """JSON of a result; its tensors go into `state`, each with memory of its own."""
    if isinstance(value, Tensor):
        name = str(len(state))
        state[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return ["tensor", name]
    if isinstance(value, dict):
        return ["dict", [[_taken_apart(key, state), _taken_apart(part, state)] for key, part in value.items()]]
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_taken_apart(part, state) for part in value]]
    if isinstance(value, bool | int | float | str | None):
        return ["plain", value]
    raise TypeError(
        "Expected a result of dicts, lists, tuples, tensors, numbers and words, got a "
        f"{type(value).__name__} in it; for a network return its state_dict()."
    )


def _put_together(tree, state):
    kind, content = tree
    if kind == "tensor":
        return state[content]
    if kind == "dict":
        return {_put_together(key, state): _put_together(part, state) for key, part in content}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_put_together(part, state) for part in content)
    return content


def _bytes_of(*tensors):
    """sha256 of the numbers of tensors."""
    whole = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        whole.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return whole


def _checksum(state, tree):
    """Of everything in an entry."""
    names = sorted(state)
    whole = _bytes_of(*(state[name] for name in names))
    shapes = [[name, str(state[name].dtype), list(state[name].shape)] for name in names]
    whole.update(json.dumps([shapes, tree]).encode())
    return whole.hexdigest()


def _read(path, name):
    """Tensors and the rest of an entry, (None, None) if there is none. A damaged file is set aside."""
    if not path.is_file():
        return None, None
    try:
        state, about = checkpoints.read(path)
        if _checksum(state, about["tree"]) != about["checksum"]:
            raise ValueError("its numbers are not those that were written")
    except (RuntimeError, OSError, KeyError, ValueError):
        aside = path.with_suffix(".damaged")
        _say(f"{name}: {_shown(path)} is damaged; it is set aside as {aside.name}, and computed anew.")
        with contextlib.suppress(OSError):
            path.replace(aside)
        return None, None
    with contextlib.suppress(OSError):  # a folder that is only read
        os.utime(path)  # used just now
    _say(f"{name}: read from {_shown(path.parent)}, where it was kept; computing it took {about['seconds']:.0f} s.")
    return state, about["tree"]


def _write(path, name, state, about):
    """Keep a result; what stands in the way costs only that."""
    try:
        content = save(state, {"about": json.dumps(about | {"checksum": _checksum(state, about["tree"])})})
        if len(content) > CACHE_BYTES:
            raise OSError(f"its {len(content) / 1e9:.1f} GB are more than the {CACHE_BYTES / 1e9:.1f} GB of the cache")
        paths.write_bytes(path, content)
        _shrink(path)
    except OSError as error:
        _say(f"{name}: computed in {about['seconds']:.0f} s, but not kept: {error}.")
    else:
        _say(f"{name}: computed in {about['seconds']:.0f} s, and kept in {_shown(path.parent)} for the next time.")


def _shrink(newest):
    """Delete the entries that were not used for longest, until all fit, and what interrupted processes left behind."""
    files = []
    for file in newest.parent.iterdir():
        with contextlib.suppress(OSError):
            about = file.stat()
            if file.suffix in (".safetensors", ".damaged"):
                files.append((about.st_mtime, about.st_size, file))
            elif file.name.startswith(paths.PART) or file.suffix == ".lock":
                if time.time() - about.st_mtime > LEFTOVER_SECONDS:
                    file.unlink()
    spare = CACHE_BYTES - sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if spare >= 0:
            break
        if file != newest:
            with contextlib.suppress(OSError):
                file.unlink()
                spare += size


@contextlib.contextmanager
def _alone(path, name) -> Iterator[None]:
    """Keeps other processes from making the same; where there can be no lock, all of them may."""
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.2)
        except filelock.Timeout:
            _say(f"{name}: another process computes it at the moment; waiting for it.")
            lock.acquire(timeout=LOCK_SECONDS)
    except (OSError, NotImplementedError):  # a Timeout is an OSError, too
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _shown(path):
    """A path as messages show it: from the checkout on, if it lies there."""
    root = paths.checkout()
    return path.relative_to(root) if root and path.is_relative_to(root) else path


def _slug(name):
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())[:60]


def _say(sentence):
    print(sentence, file=sys.stderr, flush=True)
