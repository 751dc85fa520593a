"""A jail for code that nobody has read: what it sees, what it may use, and how values pass its wall.

    judge       executed the set-up cell of a lesson, then forked the warder, and was told the answers only after that
      └ warder  namespaces of its own: no network, a root of Python and this library, read-only, without the checkout
          └ keeper    one for each exercise of a student: a process namespace, an empty /scratch
              └ inmate    no privileges, no new process, limits of memory, files and time; executes the student's code

An inmate is a fork of a process that has torch and the set-up cell loaded, so it costs milliseconds, and it never knew
an expected value. Values go in pickled: the course made them. What comes out is JSON and safetensors: plain data.
Functions that a check hands over stay outside: inside stands a wire that asks for their result (functions that the
packages or the handed-out notebook define are there already). Gradients pass the wall in both directions: a tensor from
the other side is a node of the graph whose backward step asks there.

Not kept in: bugs of the kernel. Not carried: gradients through functions that are asked outside, and anything but plain
data, tensors and arrays coming out; a network that was handed in comes back with its weights, buffers and modes.
"""

import builtins
import ctypes
import gc
import io
import json
import linecache
import math
import os
import pickle
import resource
import signal
import site
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from course_lib import paths

NOBODY = 65534
FILE_BYTES, OPEN_FILES, MESSAGE_BYTES, HEADER_BYTES = 16 * 2**20, 64, 32 * 2**20, 4 * 2**20
SCRATCH = Path("/scratch")  # the folder in which an inmate may write; /tmp leads there
NEW_MOUNTS, NEW_HOST, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
NO_SUID, NO_DEVICES, BIND, RECURSIVE, PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, READ_ONLY, ALL_BELOW = 442, 1, 0x8000
DEVICES = ("/dev/null", "/dev/urandom")
COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
ANSWER = "/answer/"  # what the names of students' cells begin with
TOO_LONG = "your code takes longer than {:g} s here; the solution takes far less."
ENDED = "your code ended its process, or took more memory than it may."
CANNOT = (
    "Submissions cannot be isolated here ({}), so nothing was graded. It takes Linux 5.12 or newer, and root or user "
    "namespaces (`unshare --user --net true` must work; in a container, allow them). Grade on such a machine."
)


class CannotIsolate(RuntimeError):
    """This machine gives no jail."""


class Halted(AssertionError):
    """The student's process is gone or was ended: a sentence for the student."""


# the walls ------------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _system(name: str, *arguments: Any) -> None:
    """A call of the C library; OSError if it fails."""
    given = [os.fsencode(word) if isinstance(word, str | Path) else word for word in arguments]
    if getattr(_libc, name)(*given) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)


def _mount(source: Any, target: Any, kind: Any, flags: int, data: Any = None) -> None:
    _system("mount", source, target, kind, ctypes.c_ulong(flags), data)


def _read_only(target: Path, flags: int, below: int = ALL_BELOW) -> None:
    attributes = struct.pack("4Q", READ_ONLY | flags, 0, 0, 0)
    _system("syscall", ctypes.c_long(MOUNT_SETATTR), -100, target, below, attributes, ctypes.c_size_t(len(attributes)))


def _prctl(option: int, value: int) -> None:
    _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(1, signal.SIGKILL)


def _visible() -> list[Path]:
    """What the jail shows of the disk: Python, its packages, the system's libraries, and course_lib itself."""
    given = [sys.prefix, sys.base_prefix, *site.getsitepackages(), "/usr", "/lib", "/lib64", *DEVICES, paths.HERE]
    given += ["/etc/ld.so.cache", site.getusersitepackages()]
    found = {Path(one).absolute() for one in given} | {Path(one).resolve() for one in given}
    return sorted((path for path in found if os.path.lexists(path)), key=lambda path: len(path.parts))


def _wall_in(root: Path, privileged: bool) -> None:
    """Move this process, with one thread, into namespaces whose disk is read-only and shows `_visible` alone."""
    user, group = os.getuid(), os.getgid()
    _system("unshare", NEW_MOUNTS | NEW_HOST | NEW_IPC | NEW_NET | (0 if privileged else NEW_USER))
    if not privileged:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text)
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    shown: list[Path] = []
    for path in _visible():
        target = root / path.relative_to("/")
        if any(path.is_relative_to(other) for other in shown):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(os.readlink(path))
            continue
        target.mkdir(exist_ok=True) if path.is_dir() else target.touch()
        _mount(path, target, None, BIND | RECURSIVE)
        _read_only(target, NO_SUID | (0 if str(path) in DEVICES else NO_DEVICES))
        shown.append(path)
    (root / SCRATCH.relative_to("/")).mkdir()
    if not os.path.lexists(root / "tmp"):  # Python or the library may lie below /tmp, so that is no place to cover
        (root / "tmp").symlink_to(SCRATCH)
    _read_only(root, NO_SUID | NO_DEVICES, below=0)
    os.chroot(root)  # from below a changed root no process makes a user namespace, and so none gets a privilege back
    os.chdir("/")


def _give_up(memory: int, seconds: int, privileged: bool) -> None:
    """Privileges go for good, and so do processes, threads and large files.

    Args:
        memory: bytes of addresses that this process may have.
        seconds: of a processor that it may take.
    """
    for capability in range(64):
        _prctl(24, capability)  # out of the bounding set; numbers that this kernel lacks change nothing
    if privileged:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _system("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    _prctl(38, 1)  # no new privileges
    _die_with_parent()
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(limit, (value, value))


# values ---------------------------------------------------------------------------------------------------------------


class Elsewhere(torch.autograd.Function):
    """A tensor that the other side of the wall computed: its backward step asks there."""

    @staticmethod
    def forward(ctx, value, pull, *sources):
        ctx.pull = pull
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, None, *ctx.pull(gradient)


def _packed(value: Any, ticket: Callable[[Tensor], int] | None = None) -> bytes:
    """Plain data as bytes: None, numbers, words, lists, tuples, sets, dicts, tensors and arrays; of others the kind.

    Args:
        ticket: by what number a tensor with a graph is asked for gradients; default: it goes without.
    """
    tensors: dict[str, Tensor] = {}

    def pack(one):
        if isinstance(one, Tensor | np.ndarray | np.generic):
            name = str(len(tensors))
            tensors[name] = torch.as_tensor(one).detach().cpu().contiguous().clone()
            if isinstance(one, Tensor) and ticket and one.grad_fn is not None:
                return ["grown", name, ticket(one)]
            return ["array" if isinstance(one, np.ndarray) else "tensor" if isinstance(one, Tensor) else "item", name]
        if one is None or isinstance(one, bool):
            return one
        for kind in (str, int, float):
            if isinstance(one, kind):
                return kind(one)
        if isinstance(one, dict):
            return ["dict", [[pack(key), pack(entry)] for key, entry in one.items()]]
        for name, kind in COLLECTIONS.items():
            if isinstance(one, kind):
                return [name, [*map(pack, one)]]
        return ["other", type(one).__name__]

    header = json.dumps(pack(value)).encode()
    return struct.pack(">Q", len(header)) + header + safetensors.torch.save(tensors)


def _unpacked(message: bytes, grown: Callable[[Tensor, int], Tensor]) -> Any:
    """The value that `_packed` packed; whatever an inmate sends gives plain data or an error.

    Args:
        grown: what stands for a tensor with a graph, given its values and its ticket.
    """
    length = struct.unpack(">Q", message[:8])[0]
    if length > HEADER_BYTES:
        raise ValueError("too many values")
    tensors = safetensors.torch.load(message[8 + length :])

    def unpack(one):
        if not isinstance(one, list):
            return one
        kind, content, *more = one
        if kind in ("tensor", "array", "item", "grown"):
            tensor = tensors[content]
            plain = {"array": tensor.numpy, "item": tensor.item}.get(kind, lambda: tensor)()
            return grown(tensor, more[0]) if kind == "grown" else plain
        if kind == "dict":
            return {unpack(key): unpack(entry) for key, entry in content}
        if kind == "other":
            return type(str(content)[:40], (), {})()
        return COLLECTIONS[kind](map(unpack, content))

    return unpack(json.loads(message[8 : 8 + length]))


def handed_out(names: dict[str, Any], cell: dict[str, Any]) -> dict[tuple, Any]:
    """Functions that a handed-out cell defined, by where they stand: both sides of the wall have them.

    Args:
        names: before the cell.
        cell: after it.
    """
    new = {name: value for name, value in cell.items() if names.get(name) is not value}
    inner = {(name, key): one for name, value in new.items() if isinstance(value, dict) for key, one in value.items()}
    return {(name,): value for name, value in new.items()} | inner


class _Sender(pickle.Pickler):
    """Pickles what goes in. Parameters, tensors with gradients, and functions are named; the rest goes as it is."""

    def __init__(self, file, known: dict[int, tuple], functions: list[Callable], gradients: bool):
        super().__init__(file)
        self.known, self.functions, self.gradients = known, functions, gradients
        self.parameters: list[nn.Parameter] = []
        self.sources: list[Tensor] = []

    def persistent_id(self, one):
        if isinstance(one, nn.Parameter):
            return "parameter", _place(self.parameters, one)
        if isinstance(one, Tensor) and one.requires_grad:
            return ("source", _place(self.sources, one)) if self.gradients else ("value", one.detach().clone())
        if id(one) in self.known:
            return "known", self.known[id(one)]
        if isinstance(one, FunctionType) and not _importable(one):
            return "outside", _place(self.functions, one)
        return None


def _place(things: list, one: Any) -> int:
    """The place of a thing in a list, which gets it if it lacks it."""
    for place, other in enumerate(things):
        if other is one:
            return place
    things.append(one)
    return len(things) - 1


def _importable(function: FunctionType) -> bool:
    found = sys.modules.get(function.__module__ or "")
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _graded(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


def _slopes(of: Tensor, gradient: Tensor, sources: list[Tensor]) -> list[Tensor | None]:
    return [*torch.autograd.grad(of, sources, gradient, retain_graph=True, allow_unused=True)] if sources else []


def copied(value: Any) -> Any:
    """A copy of a tensor or array, None of anything else."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else None


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class Wire:
    """Frames of bytes over a socket, with a limit on what is taken and a time at which waiting ends."""

    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.deadline: float | None = None

    def put(self, message: bytes) -> None:
        self._wait()
        self.channel.sendall(struct.pack(">Q", len(message)) + message)

    def take(self, limit: float | int = math.inf) -> bytes:
        length = struct.unpack(">Q", self._exactly(8))[0]
        if length > limit:
            raise Halted(f"your code gave {length / 2**20:.0f} MB back, and {limit / 2**20:.0f} are taken.")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            self._wait()
            part = self.channel.recv(min(count, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _wait(self) -> None:
        if self.deadline is not None:
            self.channel.settimeout(max(0.001, self.deadline - time.monotonic()))


# inside ---------------------------------------------------------------------------------------------------------------


class Inmate(Wire):
    """The student's side: executes cells and answers calls until the other side hangs up."""

    def __init__(self, channel: socket.socket, names: dict[str, Any]):
        super().__init__(channel)
        self.names = names
        self.known: dict[tuple, Any] = {}
        self.inputs: list[Tensor] = []  # of the call that goes on, which may carry gradients
        self.results: list[tuple[Tensor, list[Tensor]]] = []
        self.pulled = False  # gradients are asked for from outside, where what is outside is followed

    def serve(self) -> Any:
        """Do what is asked; returns at the answer to a request of its own."""
        while True:
            kind, *content = self._read(self.take())
            if kind == "value":
                return content[0]
            if kind == "error":
                error = _error(*content[:2])
                error.outside = content[2]
                raise error
            self.put(self._answer(getattr(self, kind), content))

    def ask(self, *request: Any) -> Any:
        self.put(_packed(request))
        return self.serve()

    def _answer(self, work: Callable, content: list) -> bytes:
        try:
            return _packed(("value", work(*content)), self._ticket)
        except BaseException as error:
            own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(ANSWER)]
            where = [own[-1].filename, own[-1].lineno, own[-1].name] if own else []
            return _packed(("error", type(error).__name__, str(error)[:2000], where, getattr(error, "outside", -1)))

    def _ticket(self, result: Tensor) -> int:
        self.results.append((result, self.inputs))
        return len(self.results) - 1

    def handed(self, stub: str) -> None:
        """Execute an exercise as it was handed out, for the functions that both sides know."""
        before = dict(self.names)
        run_cell(stub, "/handed-out", self.names)
        self.known = handed_out(before, self.names)

    def cell(self, source: str, filename: str) -> None:
        run_cell(source, filename, self.names)

    def call(self, name: str, arguments: tuple, random: Tensor) -> tuple:
        """What a function of the student's gives, what it changed, and the networks that it was given."""
        torch.set_rng_state(random)
        leaves = tree_leaves(arguments)
        before = [copied(one) for one in leaves]
        answer = eval(name, self.names)(*arguments[0], **arguments[1])
        changed = [
            (place, one)
            for place, (old, one) in enumerate(zip(before, leaves))
            if old is not None and not torch.equal(torch.as_tensor(old), torch.as_tensor(one))
        ]
        modules = [
            (place, [part.training for part in one.modules()], _state(one), [p.requires_grad for p in one.parameters()])
            for place, one in enumerate(leaves)
            if isinstance(one, nn.Module)
        ]
        return answer, [(place, one.detach() if isinstance(one, Tensor) else one) for place, one in changed], modules

    def pull(self, ticket: int, gradient: Tensor) -> list:
        """Gradients of a result with respect to what its call was given, each as if no other one depended on it."""
        self.pulled = True
        try:
            return _slopes(self.results[ticket][0], gradient, self.results[ticket][1])
        finally:
            self.pulled = False

    def _read(self, message: bytes) -> Any:
        parameters, sources, content = pickle.loads(message)
        parameters = [nn.Parameter(value, grows) for value, grows in parameters]
        anchor, trained = torch.zeros((), requires_grad=True), _graded(parameters)

        def follow(k):
            nothing = [None] * len(trained)
            return lambda slope: [None, *(nothing if self.pulled else self.ask("slopes", k, slope))]

        inputs = [Elsewhere.apply(value, follow(k), anchor, *trained) for k, value in enumerate(sources)]
        reader = pickle.Unpickler(io.BytesIO(content))
        find = {
            "parameter": parameters.__getitem__,
            "source": inputs.__getitem__,
            "value": lambda value: value,
            "known": self.known.__getitem__,
            "outside": lambda k: lambda *given, **named: self.ask("outside", k, given, named),
        }
        reader.persistent_load = lambda named: find[named[0]](named[1])
        request = reader.load()
        if request[0] == "call":
            self.inputs = inputs + trained
        return request


def _error(name: str, text: str) -> Exception:
    """An exception of a name: a built-in one, or one that is made for it."""
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = type(name[:60] or "Error", (Exception,), {})
    try:
        return kind(text)
    except TypeError:  # such as UnicodeDecodeError, which takes more
        return RuntimeError(f"{name}: {text}")


def remember(text: str, filename: str) -> None:
    """Let tracebacks find a source that is in memory, without a file of its name."""
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)


def run_cell(text: str, filename: str, names: dict[str, Any]) -> None:
    """Execute a cell as a notebook does."""
    remember(text, filename)
    exec(compile(text, filename, "exec", dont_inherit=True), names)


def _imprison(channel: socket.socket, names: dict[str, Any], memory: int, seconds: int, privileged: bool) -> None:
    """What a keeper does, and the inmate that it forks; never returns."""
    try:
        _die_with_parent()
        _system("unshare", NEW_PIDS | NEW_MOUNTS | NEW_IPC)
        _mount("tmpfs", SCRATCH, "tmpfs", NO_SUID | NO_DEVICES, "size=64m,mode=1777")
        if inmate := os.fork():
            channel.close()
            os.waitpid(inmate, 0)
            os._exit(0)
        os.setsid()
        os.chdir(SCRATCH)
        _give_up(memory, seconds, privileged)
        Inmate(channel, names).serve()
    finally:
        os._exit(0)


def _guard(orders: socket.socket, names: dict[str, Any], root: Path) -> None:
    """What the warder does: walls itself in, then forks a keeper for each socket that it is sent; never returns."""
    try:
        _die_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.closerange(3, orders.fileno())
        os.closerange(orders.fileno() + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
        os.environ.clear()
        os.environ["TMPDIR"], tempfile.tempdir = str(SCRATCH), None  # it is looked for once, and was perhaps outside
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        privileged = os.geteuid() == 0
        try:
            _wall_in(root, privileged)
        except (OSError, AttributeError) as error:
            orders.sendall(str(error).encode()[:500] or b"?")
            os._exit(1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are buried by the kernel
        gc.collect()
        gc.freeze()
        orders.sendall(b"ready")
        while True:
            request, descriptors, *_ = socket.recv_fds(orders, 64, 1)
            if not request:
                os._exit(0)
            channel = socket.socket(fileno=descriptors[0])
            keeper = os.fork()
            if keeper == 0:
                orders.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                memory, seconds = map(int, request.split())
                _imprison(channel, names, pages * resource.getpagesize() + memory, seconds, privileged)
            channel.close()
            orders.sendall(str(keeper).encode())
    finally:
        os._exit(1)


# outside --------------------------------------------------------------------------------------------------------------


class Warder:
    """The process that forks inmates. It is forked from this one, which must not know an answer yet.

    Args:
        names: of the lesson after its set-up cell.
        root: an empty folder, in whose place the jail's disk stands.
        memory: bytes that an inmate may take on top of what is loaded.
    Raises:
        CannotIsolate: a sentence, if this machine gives no jail.
    """

    def __init__(self, names: dict[str, Any], root: Path, memory: int):
        self.memory = memory
        self.orders, inside = socket.socketpair()
        if os.fork() == 0:
            self.orders.close()
            _guard(inside, names, root)
        inside.close()
        if (said := self.orders.recv(500)) != b"ready":
            raise CannotIsolate(CANNOT.format(said.decode(errors="replace") or "the jail's process ended"))

    def keeper(self, channel: socket.socket, seconds: float) -> int:
        """Start an inmate at the other end of a channel; returns the number of its keeper, which can be killed."""
        socket.send_fds(self.orders, [f"{self.memory} {math.ceil(seconds)}".encode()], [channel.fileno()])
        return int(self.orders.recv(64))


class Jail(Wire):
    """One inmate, seen from outside: a context in which functions of a student's can be called.

    Args:
        seconds: of a processor that the inmate may take for all that it is asked; of the clock, three times as many.
        stub: the exercise as it was handed out.
    """

    def __init__(self, warder: Warder, seconds: float, stub: str = ""):
        own, inside = socket.socketpair()
        super().__init__(own)
        self.keeper = warder.keeper(inside, seconds)
        try:
            self._keeper = os.pidfd_open(self.keeper)
        except ProcessLookupError:
            raise CannotIsolate(CANNOT.format("a process for a submission ended at once")) from None
        inside.close()
        self.seconds, self._left = seconds, 3 * seconds
        self._halted = ""
        self._known: dict[int, tuple] = {}
        self._functions: list[Callable] = []
        self._errors: list[Exception] = []
        self._given: list[Tensor] = []  # to the call that goes on
        self._trained: list[Tensor] = []
        self._lines: dict[str, str] = {}
        if stub:
            self.ask("handed", stub)

    def __enter__(self) -> "Jail":
        return self

    def __exit__(self, *error: Any) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._keeper, signal.SIGKILL)
        os.close(self._keeper)
        self.channel.close()

    def know(self, things: dict[tuple, Any]) -> None:
        """Functions of the handed-out cell on this side, see `handed_out`."""
        self._known = {id(thing): place for place, thing in things.items()}

    def ask(self, *request: Any) -> Any:
        """What the inmate answers.

        Raises:
            Halted: it is gone, or took too long, or sent what is no answer.
            Exception: what it raised.
        """
        self._send(request, gradients=request[0] == "call")
        while True:
            kind, *content = self._decoded(self._timed(self.take, MESSAGE_BYTES))
            if kind == "value":
                return content[0]
            if kind == "error":
                self._raise(*content)
            self._send(self._served(kind, content))

    def function(self, name: str) -> Callable:
        """A function of the student's, as a check calls it."""

        def answer(*given, **named):
            return self._call(name, (given, named))

        answer.__name__ = name
        return answer

    def _call(self, name, arguments):
        before, leaves = (self._given, self._trained), tree_leaves(arguments)
        try:
            value, changed, modules = self.ask("call", name, arguments, torch.get_rng_state())
        finally:
            self._given, self._trained = before
        for place, now in changed:
            if tuple(now.shape) != tuple(leaves[place].shape):
                raise AssertionError(f"{name} changes the shape of what it is given.")
            if isinstance(now, Tensor):
                leaves[place].detach().copy_(now)
            else:
                leaves[place][...] = now
        for place, training, state, grows in modules:
            for part, mode in zip(leaves[place].modules(), training):
                part.training = bool(mode)
            for old, now in zip(_state(leaves[place]), state):
                old.data.copy_(now)
            for weight, grow in zip(leaves[place].parameters(), grows):
                weight.requires_grad_(bool(grow))
        return value

    def _send(self, message, gradients=False):
        content = io.BytesIO()
        sender = _Sender(content, self._known, self._functions, gradients)
        sender.dump(message)
        if gradients:
            self._given, self._trained = sender.sources, _graded(sender.parameters)
        parameters = [(one.detach().clone(), one.requires_grad) for one in sender.parameters]
        sources = [one.detach().clone() for one in sender.sources]
        self._timed(self.put, pickle.dumps((parameters, sources, content.getvalue())))

    def _timed(self, work, *given):
        """What the wire does in the inmate's time; once it halted, it stays so."""
        if self._halted:
            raise Halted(self._halted)
        self.deadline = time.monotonic() + self._left
        try:
            return work(*given)
        except TimeoutError:
            self._halted = TOO_LONG.format(self.seconds)
        except (EOFError, ConnectionError):
            late = self.deadline - time.monotonic() < 2 * self.seconds
            self._halted = TOO_LONG.format(self.seconds) if late else ENDED
        except Halted as error:
            self._halted = str(error)
        finally:
            self._left = self.deadline - time.monotonic()
        raise Halted(self._halted)

    def _decoded(self, message):
        sources = self._given + self._trained

        def grown(value, ticket):
            def pull(gradient):
                slopes = self.ask("pull", ticket, gradient)
                if len(slopes) != len(sources):
                    raise Halted("your code gave gradients that are none.")
                return slopes

            return Elsewhere.apply(value, pull, *sources)

        try:
            return _unpacked(message, grown)
        except Exception as error:
            self._halted = f"your code gave back what is no answer ({type(error).__name__})."
            raise Halted(self._halted) from error

    def _served(self, kind, content):
        """The answer to a request of the inmate's."""
        try:
            if kind == "outside":
                place, given, named = content
                return "value", self._functions[place](*given, **named)
            if kind == "slopes":
                return "value", _slopes(self._given[content[0]], content[1], self._trained)
            raise Halted("your code asked for what is not there.")
        except Halted:
            raise
        except Exception as error:
            self._errors.append(error)
            return "error", type(error).__name__, str(error), len(self._errors) - 1

    def cell(self, source: str, filename: str) -> str:
        """Execute a cell of the student's; returns a sentence if it stopped, else ""."""
        self._lines[ANSWER + filename] = source
        try:
            self.ask("cell", source, ANSWER + filename)
        except Exception as error:
            place = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(ANSWER)]
            where = f"  (line {place[-1].lineno}: {place[-1].line})" if place else ""
            return f"{type(error).__name__}: {error}{where}" if not isinstance(error, Halted) else str(error)
        return ""

    def _raise(self, name, text, where, outside):
        """Raise what the inmate raised: an error of a function outside as it was, else one that shows the line."""
        if isinstance(outside, int) and 0 <= outside < len(self._errors):
            raise self._errors[outside]
        error = _error(str(name), str(text)[:2000])
        filename, line, function = where or ("", 0, "")
        lines = self._lines.get(filename, "").splitlines(True)
        if not (isinstance(line, int) and 0 < line <= len(lines)):
            raise error
        remember("".join(lines), filename)
        code = compile("\n" * (line - 1) + "raise error", filename, "exec").replace(co_name=str(function)[:60])
        exec(code, {"error": error})
