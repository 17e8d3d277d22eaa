"""Environments: what a function imports, installed once per set of requirements.

When the server's own interpreter has everything, it is used and nothing is installed. Otherwise a virtual environment
is made and named by ``Requirements.digest``. It sees none of the server's packages; hotset's own code comes in by a
link to the package that runs now, so an upgraded server never meets an old worker, and the few packages that code
imports are installed with the function's, in one resolution, so that they agree.

An environment is built where it stays, because a virtual environment's scripts name their interpreter's absolute path;
what makes it usable is a marker, written last. One without a marker is a broken installation and is built anew.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import IO

import msgspec
from packaging.requirements import Requirement

import hotset
from hotset.errors import BundleError, InvariantError
from hotset.store.requirements import Requirements, installed_here

WORKER_PACKAGES = ("msgspec", "numpy", "orjson")
"""What hotset's code imports inside a GPU process."""

MARKER = "hotset-installed"
CODE_FOLDER = "hotset-code"
TAIL_LINES = 30
MAX_LINE_CHARACTERS = 500

_SUPERVISED = Path(__file__).with_name("supervised.py")

Progress = Callable[[str], None]
"""Takes one line of what the installer says."""


class EnvironmentStatus(Enum):
    """How far the environment for some requirements is."""

    SHARED = "shared"
    """The server's own interpreter: nothing to install."""
    ABSENT = "absent"
    """To be installed, or its installation failed or was interrupted."""
    INSTALLING = "installing"
    READY = "ready"
    """Installed, in a virtual environment of its own."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where a function runs."""

    python: str
    """Path of the interpreter."""
    digest: str
    """``Requirements.digest`` of what it was made for."""
    shared: bool
    """Whether it is the server's own interpreter."""


class InstallLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one installation may take."""

    time_s: float = 1800.0
    output_lines: int = 100_000


DEFAULT_LIMITS = InstallLimits()


class Environments:
    """The environments of one server. Methods block; any thread may call them."""

    def __init__(
        self,
        directory: Path,
        *,
        limits: InstallLimits = DEFAULT_LIMITS,
        pip_options: Sequence[str] = (),
        worker_packages: Sequence[str] = WORKER_PACKAGES,
    ) -> None:
        """``pip_options``: the operator's (``--index-url``, ``--find-links``); pip's own configuration counts too."""
        self._directory = directory.resolve()
        self._limits = limits
        self._pip_options = tuple(pip_options)
        self._worker_requirements = tuple(_declared(name) for name in worker_packages)
        self._package = Path(hotset.__file__).parent.resolve()
        self._state = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        directory.mkdir(parents=True, exist_ok=True)

    def ensure(self, requirements: Requirements, progress: Progress | None = None) -> Environment:
        """The environment for these requirements, installed now if need be; minutes when it is.

        Two calls for the same requirements install once: the second waits. ``progress`` is called, in this thread, with
        each line the installer says. Raises ``BundleError`` with the end of the installer's output when it fails.
        """
        progress = progress or _unheard
        if installed_here(requirements):
            return Environment(python=sys.executable, digest=requirements.digest, shared=True)
        folder = self._directory / requirements.digest
        environment = Environment(python=str(folder / "bin" / "python"), digest=requirements.digest, shared=False)
        if self._ready(folder):
            return environment
        with self._alone(folder, progress) as lock:
            if not self._ready(folder):
                self._build(folder, requirements, progress, lock)
        return environment

    def status(self, requirements: Requirements) -> EnvironmentStatus:
        """How far it is, at this moment."""
        if installed_here(requirements):
            return EnvironmentStatus.SHARED
        folder = self._directory / requirements.digest
        if self._ready(folder):
            return EnvironmentStatus.READY
        try:
            with _lock_file(folder).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return EnvironmentStatus.ABSENT
        except BlockingIOError:
            return EnvironmentStatus.INSTALLING
        return EnvironmentStatus.ABSENT

    def remove_unused(self, used: Collection[str]) -> list[str]:
        """Remove every environment whose digest is not in ``used`` and name them; only when no deploy is under way."""
        unused = sorted(p.name for p in self._directory.iterdir() if p.is_dir() and p.name not in used)
        for digest in unused:
            self._remove(self._directory / digest)
            _lock_file(self._directory / digest).unlink(missing_ok=True)
        return unused

    def close(self) -> None:
        """End every installation that runs, and let no more begin; their callers get a ``BundleError``."""
        with self._state:
            self._closed = True
            for process in self._running:
                _kill(process)

    def _marker(self) -> str:
        """What the marker says: an environment made for another hotset is not used."""
        return "\n".join([str(self._package), *self._worker_requirements])

    def _ready(self, folder: Path) -> bool:
        try:
            return (folder / MARKER).read_text() == self._marker()
        except FileNotFoundError:
            return False

    def _remove(self, folder: Path) -> None:
        # The marker first: what is removed by halves must not look whole.
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _alone(self, folder: Path, progress: Progress) -> Iterator[IO[bytes]]:
        """Hold the environment's lock: against threads, processes, and installers that outlive their server."""
        with _lock_file(folder).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress("waiting: the same requirements are being installed for another deployment")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock

    def _build(self, folder: Path, requirements: Requirements, progress: Progress, lock: IO[bytes]) -> None:
        self._remove(folder)
        listed = folder / "requirements.txt"
        try:
            # -I: neither the working directory nor the environment's variables choose what these programs import.
            self._run([sys.executable, "-I", "-m", "venv", "--without-pip", str(folder)], progress, lock)
            # From a file: what a caller wrote never stands on a command line.
            listed.write_text("\n".join([*requirements.lines, *self._worker_requirements]) + "\n")
            pip = [sys.executable, "-I", "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
            quiet = ["--no-input", "--no-color", "--progress-bar=off", "--disable-pip-version-check"]
            self._run(
                [*pip, *quiet, "--no-warn-script-location", *self._pip_options, "-r", str(listed)], progress, lock
            )
            self._link_hotset(folder)
            self._mark(folder)
        except OSError as error:
            self._remove(folder)
            raise BundleError(f"the environment cannot be stored ({error}); see that the disk has room") from error
        except BaseException:
            self._remove(folder)
            raise

    def _link_hotset(self, folder: Path) -> None:
        """Make ``import hotset`` find the package that runs now, and nothing that lies beside it."""
        code = folder / CODE_FOLDER
        code.mkdir()
        (code / "hotset").symlink_to(self._package, target_is_directory=True)
        site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (site_packages / "hotset.pth").write_text(f"{code}\n")

    def _mark(self, folder: Path) -> None:
        unfinished = folder / f"{MARKER}.tmp"
        with unfinished.open("w") as file:
            file.write(self._marker())
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(folder / MARKER)

    def _run(self, command: Sequence[str], progress: Progress, lock: IO[bytes]) -> None:
        """Run one step of an installation to its end, line by line; raises ``BundleError``."""
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        problem = ""
        process = self._start(command, lock)

        def out_of_time() -> None:
            nonlocal problem
            problem = f"it took longer than {self._limits.time_s:g} s"
            _kill(process)

        timer = threading.Timer(self._limits.time_s, out_of_time)
        timer.daemon = True
        timer.start()
        try:
            for count, line in enumerate(_lines(process)):
                if count >= self._limits.output_lines:
                    problem = f"it printed more than {self._limits.output_lines} lines"
                    _kill(process)
                    break
                tail.append(line)
                progress(line)
            status = process.wait()
        except BaseException:
            _kill(process)
            process.wait()
            raise
        finally:
            timer.cancel()
            with self._state:
                self._running.discard(process)
                if self._closed:
                    problem = "the server is stopping"
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if problem or status != 0:
            reason = problem or f"the installer ended with status {status}"
            raise BundleError("\n".join([f"the requirements could not be installed: {reason}", *tail]))

    def _start(self, command: Sequence[str], lock: IO[bytes]) -> subprocess.Popen[bytes]:
        with self._state:
            if self._closed:
                raise BundleError("the server is stopping; deploy again when it is back")
            process = subprocess.Popen(
                [sys.executable, "-I", str(_SUPERVISED), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
                cwd=self._directory,
                start_new_session=True,
                # The installer holds the lock too: nobody builds in the same folder until it has really ended.
                pass_fds=(lock.fileno(),),
            )
            self._running.add(process)
            return process


def _unheard(line: str) -> None:
    """The progress of an installation nobody watches."""


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What the process prints, a line at a time, no longer than ``MAX_LINE_CHARACTERS`` at once."""
    assert process.stdout is not None
    while raw := process.stdout.readline(MAX_LINE_CHARACTERS):
        yield raw.decode("utf-8", "replace").rstrip()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and all it started. It leads its own group, which its number names until it is reaped."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _declared(name: str) -> str:
    """hotset's own requirement for one of its dependencies, so that a worker meets the versions hotset was made for."""
    for line in metadata.requires("hotset") or ():
        requirement = Requirement(line)
        if requirement.name == name:
            return f"{requirement.name}{requirement.specifier}"
    raise InvariantError(f"hotset does not depend on {name}")
