"""The embedded datastore: what was written is there after a restart, and nothing else is."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from hotset.errors import StoreError
from hotset.functions.contract import FunctionKind, FunctionOptions
from hotset.store.bundles import Bundles, make_bundle
from hotset.store.datastore import BundleRecord, Datastore, FunctionRecord, ProfileRecord, version_of
from hotset.store.sqlite import FILE_NAME, MIGRATIONS, SqliteDatastore

BUNDLE = BundleRecord(digest="a" * 64, size_bytes=10, files=1, created_at_s=1.0)


def record(name: str = "embed", bundle: str = BUNDLE.digest, **changes: object) -> FunctionRecord:
    options = FunctionOptions(name=name, kind=FunctionKind.GPU, gpu_memory_bytes=1 << 20, env={"B": "2", "A": "1"})
    whole = FunctionRecord(
        options=options,
        entry="embed:Embed",
        bundle=bundle,
        requirements=("torch>=2",),
        version=version_of(options, "embed:Embed", bundle, ("torch>=2",)),
        labels={"team": "search"},
        annotations={"note": 'two\nlines, a "quote"'},
        schema={"input": {"type": "string"}},
        created_at_s=2.0,
    )
    return msgspec.structs.replace(whole, **changes)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Datastore]:
    store = SqliteDatastore(tmp_path)
    yield store
    store.close()


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    before = SqliteDatastore(tmp_path / "new" / "folder")
    profile = ProfileRecord(model=record().model, gpu_kind="virtual", load_s=0.5, loads=3, memory_bytes=7)
    before.deploy(record(), BUNDLE)
    before.deploy(record("classify"), BUNDLE)
    before.save_profiles([profile])
    before.close()

    after = SqliteDatastore(tmp_path / "new" / "folder")
    assert after.functions() == [record("classify"), record("embed")]
    assert after.function("embed") == record()
    assert after.function("embed").options.env == {"A": "1", "B": "2"}  # type: ignore[union-attr]
    assert after.function("nobody") is None
    assert after.bundles() == [BUNDLE]
    assert after.profiles() == [profile]
    after.close()


def test_a_profile_of_before_sizes_were_kept_is_still_read(tmp_path: Path) -> None:
    SqliteDatastore(tmp_path).close()
    old = '{"model":"embed@1","gpu_kind":"t4","load_s":1.0,"loads":1,"runs":0,"memory_bytes":7}'
    with closing(sqlite3.connect(tmp_path / "hotset.db")) as connection, connection:
        connection.execute("INSERT INTO profiles VALUES ('embed', 'embed@1', 't4', ?)", (old,))
    after = SqliteDatastore(tmp_path)
    assert after.profiles() == [
        ProfileRecord(model="embed@1", gpu_kind="t4", load_s=1.0, loads=1, memory_bytes=7, sizes_bytes=())
    ]
    after.close()


def test_a_redeploy_replaces_the_version_and_profiles_replace_each_other(store: Datastore) -> None:
    other = msgspec.structs.replace(BUNDLE, digest="b" * 64)
    store.deploy(record(), BUNDLE)
    store.deploy(record(bundle=other.digest), other)
    assert [f.bundle for f in store.functions()] == [other.digest]

    for load_s in (1.0, 2.0):
        store.save_profiles([ProfileRecord(model="embed@1", gpu_kind=kind, load_s=load_s) for kind in ("a100", "t4")])
    assert [(p.gpu_kind, p.load_s) for p in store.profiles()] == [("a100", 2.0), ("t4", 2.0)]


def test_removing_a_function_forgets_its_profiles_and_frees_its_bundle(store: Datastore) -> None:
    store.deploy(record("embed"), BUNDLE)
    store.deploy(record("embed-large"), BUNDLE)
    store.save_profiles([ProfileRecord(model=f"{name}@1", gpu_kind="t4") for name in ("embed", "embed-large")])

    assert store.remove_function("embed")
    assert not store.remove_function("embed")
    assert [p.model for p in store.profiles()] == ["embed-large@1"]
    assert store.forget_unused_bundles() == [BUNDLE.digest]

    assert store.remove_function("embed-large")
    assert store.forget_unused_bundles() == []
    assert store.bundles() == []


def test_a_version_changes_with_what_runs_and_not_with_labels() -> None:
    options = record().options
    same = msgspec.structs.replace(options, env={"A": "1", "B": "2"})
    larger = msgspec.structs.replace(options, max_batch=8)
    first = version_of(options, "m:C", "a", ("x",))
    assert first == version_of(same, "m:C", "a", ("x",))
    others = {
        version_of(larger, "m:C", "a", ("x",)),
        version_of(options, "m:D", "a", ("x",)),
        version_of(options, "m:C", "b", ("x",)),
        version_of(options, "m:C", "a", ("y",)),
    }
    assert len(others | {first}) == 5
    assert record().model == f"embed@{record().version}"


def test_a_function_cannot_name_another_bundle_than_the_one_it_comes_with(store: Datastore) -> None:
    with pytest.raises(StoreError, match="runs from bundle"):
        store.deploy(record(bundle="c" * 64), BUNDLE)
    assert store.functions() == []


def test_two_servers_do_not_share_a_data_directory(tmp_path: Path, store: Datastore) -> None:
    with pytest.raises(StoreError, match="another hotset server uses"):
        SqliteDatastore(tmp_path)
    store.close()
    SqliteDatastore(tmp_path).close()


def test_a_file_of_a_newer_hotset_is_left_alone(tmp_path: Path) -> None:
    SqliteDatastore(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(StoreError, match="newer hotset"):
        SqliteDatastore(tmp_path)


def test_a_file_that_is_no_database_and_a_folder_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database at all, but long enough to be looked at" * 40)
    with pytest.raises(StoreError, match="cannot be opened"):
        SqliteDatastore(tmp_path)
    with pytest.raises(StoreError, match="cannot be used"):
        SqliteDatastore(tmp_path / FILE_NAME / "folder")


def test_damage_is_told_when_it_is_met(tmp_path: Path, store: Datastore) -> None:
    store.deploy(record(), BUNDLE)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("UPDATE functions SET record = '{}'")
        connection.execute("DROP TABLE profiles")
    connection.close()
    with pytest.raises(StoreError, match="cannot be read"):
        store.functions()
    with pytest.raises(StoreError, match="cannot be read"):
        store.profiles()
    # Half of this transaction would work: neither half stays, and the store goes on.
    with pytest.raises(StoreError, match="cannot be written"):
        store.remove_function("embed")
    store.deploy(record("classify"), BUNDLE)
    assert store.function("classify") == record("classify")


DEPLOY_AND_DIE = """
import os, signal, sqlite3, sys
from pathlib import Path
from hotset.store import bundles, sqlite
from hotset.store.bundles import Bundles
from hotset.store.sqlite import SqliteDatastore
from test_sqlite import record

data, archive, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if step == "unpack":
    bundles._add = die
if step == "publish":
    bundles._publish = die
store = SqliteDatastore(data)
bundle = Bundles(data / "bundles").add(archive)
if step == "record":
    # The second statement of the transaction: the bundle is written, the function is not.
    store._connection.set_trace_callback(lambda statement: "INTO functions" in statement and die())
if step == "commit":
    store._connection.set_trace_callback(lambda statement: statement == "COMMIT" and die())
store.deploy(record(bundle=bundle.digest), bundle)
"""


@pytest.mark.parametrize("step", ["unpack", "publish", "record", "commit"])
def test_a_crash_in_the_middle_of_a_deploy_leaves_the_old_version(tmp_path: Path, step: str) -> None:
    old, new, data = tmp_path / "old.zip", tmp_path / "new.zip", tmp_path / "data"
    for archive in (old, new):
        code = tmp_path / "embed.py"
        code.write_text(f"VERSION = {archive.stem!r}\n")
        with archive.open("wb") as file:
            make_bundle(code, file)
    store = SqliteDatastore(data)
    first = Bundles(data / "bundles").add(old)
    store.deploy(record(bundle=first.digest), first)
    store.close()

    died = subprocess.run(
        [sys.executable, "-c", DEPLOY_AND_DIE, str(data), str(new), step],
        cwd=Path(__file__).parent,
        timeout=60,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL

    store, bundles = SqliteDatastore(data), Bundles(data / "bundles")
    assert [f.bundle for f in store.functions()] == [first.digest]
    assert store.bundles() == [first]
    assert (bundles.path(first.digest) / "embed.py").read_text() == "VERSION = 'old'\n"
    # What the crash left is swept away, and the same deploy works when it is tried again.
    bundles.remove_unused(store.forget_unused_bundles())
    assert [path.name for path in (data / "bundles").iterdir()] == [first.digest]
    second = bundles.add(new)
    store.deploy(record(bundle=second.digest), second)
    assert [f.bundle for f in store.functions()] == [second.digest]
    store.close()
