"""Environments: installed once, whole or not at all, with the reason when it fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from wheels import make_wheel, repack

import hotset
from hotset.errors import BundleError, InvariantError
from hotset.store.environments import Environments, EnvironmentStatus, InstallLimits
from hotset.store.requirements import Requirements

GREETING = Requirements(("greeting==1.0",))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, "greeting", "TEXT = 'hello'\n")
    make_wheel(folder, "unlucky", "", requires=("no-such-package-anywhere",))
    repack(folder, "msgspec")
    return folder


class World:
    """The environments of one server, which installs from a folder of wheels."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder = folder
        self.wheels = wheels
        self.heard: list[str] = []

    def server(self, limits: InstallLimits | None = None, worker_packages: Sequence[str] = ()) -> Environments:
        return Environments(
            self.folder,
            limits=limits or InstallLimits(time_s=120.0),
            pip_options=["--no-index", "--find-links", str(self.wheels)],
            worker_packages=worker_packages,
        )

    def installations(self) -> int:
        return sum("Successfully installed" in line for line in self.heard)


@pytest.fixture
def world(tmp_path: Path, wheels: Path) -> World:
    return World(tmp_path / "environments", wheels)


def run(python: str, code: str) -> str:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_is_installed_when_the_server_has_it_all(world: World) -> None:
    server = world.server()
    for requirements in (Requirements(), Requirements(("msgspec>=0.1", "numpy"))):
        environment = server.ensure(requirements, world.heard.append)
        assert (environment.python, environment.shared) == (sys.executable, True)
        assert server.status(requirements) is EnvironmentStatus.SHARED
    assert world.heard == list(world.folder.iterdir()) == []


def test_an_environment_has_the_requirements_hotset_and_nothing_of_the_servers(world: World) -> None:
    server = world.server(worker_packages=["msgspec"])
    assert server.status(GREETING) is EnvironmentStatus.ABSENT
    environment = server.ensure(GREETING, world.heard.append)

    assert not environment.shared
    assert environment.python.startswith(str(world.folder / GREETING.digest))
    assert server.status(GREETING) is EnvironmentStatus.READY
    assert world.installations() == 1
    seen = run(
        environment.python,
        "import greeting, hotset, hotset.functions.contract, importlib.util as u, pathlib;"
        "print(greeting.TEXT, pathlib.Path(hotset.__file__).resolve(), u.find_spec('uvicorn'), u.find_spec('numpy'))",
    )
    assert seen == f"hello {Path(hotset.__file__).resolve()} None None"

    # A restarted server installs nothing; one that needs something else of its workers starts afresh.
    restarted = world.server(worker_packages=["msgspec"])
    assert restarted.ensure(GREETING, world.heard.append) == environment
    assert world.installations() == 1
    assert world.server().status(GREETING) is EnvironmentStatus.ABSENT

    other = Requirements(("other",))
    (world.folder / other.digest).mkdir()
    assert restarted.remove_unused({GREETING.digest}) == [other.digest]
    assert restarted.remove_unused(()) == [GREETING.digest]
    assert list(world.folder.iterdir()) == []


def test_two_deploys_of_the_same_requirements_install_once(world: World) -> None:
    server, waits = world.server(), threading.Event()
    second_heard: list[str] = []
    second: list[str] = []

    def second_deploy() -> None:
        def progress(line: str) -> None:
            second_heard.append(line)
            waits.set()

        second.append(server.ensure(GREETING, progress).python)

    thread = threading.Thread(target=second_deploy)

    def progress(line: str) -> None:
        """The first deploy goes on once the second is known to wait for it."""
        if not world.heard:
            assert server.status(GREETING) is EnvironmentStatus.INSTALLING
            thread.start()
            assert waits.wait(60)
        world.heard.append(line)

    first = server.ensure(GREETING, progress)
    thread.join(60)
    assert second == [first.python]
    assert world.installations() == 1
    assert second_heard == ["waiting: the same requirements are being installed for another deployment"]


def test_a_failed_installation_shows_the_installers_own_words(world: World) -> None:
    server, unlucky = world.server(), Requirements(("unlucky",))
    with pytest.raises(BundleError) as failed:
        server.ensure(unlucky, world.heard.append)
    first, *rest = str(failed.value).splitlines()
    assert first == "the requirements could not be installed: the installer ended with status 1"
    assert any("No matching distribution found for no-such-package-anywhere" in line for line in rest)
    assert rest == world.heard[-len(rest) :]
    assert server.status(unlucky) is EnvironmentStatus.ABSENT
    assert not (world.folder / unlucky.digest).exists()


INSTALL_AND_DIE = """
import os, signal, sys
from pathlib import Path
from hotset.store.environments import Environments
from hotset.store.requirements import Requirements

def progress(line):
    if "Installing collected packages" in line:
        os.kill(os.getpid(), signal.SIGKILL)

options = ["--no-index", "--find-links", sys.argv[2]]
server = Environments(Path(sys.argv[1]), pip_options=options, worker_packages=())
server.ensure(Requirements(("greeting==1.0",)), progress)
"""


def test_an_installation_cut_short_by_a_crash_is_never_used(world: World) -> None:
    died = subprocess.run(
        [sys.executable, "-c", INSTALL_AND_DIE, str(world.folder), str(world.wheels)], timeout=120, check=False
    )
    assert died.returncode == -signal.SIGKILL
    server = world.server()
    assert (world.folder / GREETING.digest / "pyvenv.cfg").exists()
    assert server.status(GREETING) in (EnvironmentStatus.ABSENT, EnvironmentStatus.INSTALLING)

    # This waits for the lock, which the orphaned installer held too: that it comes means the installer is gone.
    environment = server.ensure(GREETING, world.heard.append)
    assert world.installations() == 1
    assert run(environment.python, "import greeting; print(greeting.TEXT)") == "hello"


def test_an_installation_has_limits(world: World) -> None:
    with pytest.raises(BundleError, match="it took longer than 0 s"):
        world.server(InstallLimits(time_s=0.0)).ensure(GREETING)
    with pytest.raises(BundleError, match="it printed more than 0 lines"):
        world.server(InstallLimits(time_s=120.0, output_lines=0)).ensure(GREETING)
    assert not (world.folder / GREETING.digest).exists()


def test_a_stopping_server_ends_its_installations(world: World) -> None:
    server = world.server()
    with pytest.raises(BundleError, match="the server is stopping"):
        server.ensure(GREETING, lambda line: server.close())
    with pytest.raises(BundleError, match="the server is stopping"):
        server.ensure(GREETING)


def test_a_full_disk_and_a_broken_listener_leave_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class ListenerError(Exception):
        pass

    def broken(line: str) -> None:
        raise ListenerError(line)

    with pytest.raises(ListenerError):
        world.server().ensure(GREETING, broken)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Environments, "_run", full)
    with pytest.raises(BundleError, match="the disk has room"):
        world.server().ensure(GREETING)
    assert not (world.folder / GREETING.digest).exists()


def test_a_worker_can_only_need_what_hotset_itself_does(world: World) -> None:
    with pytest.raises(InvariantError, match="does not depend on nothing-we-know"):
        world.server(worker_packages=["nothing-we-know"])
