"""Bundles: the same files make the same bundle, and nothing a caller sends reaches outside its folder."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hotset.errors import BundleError
from hotset.store.bundles import BundleLimits, Bundles, content_digest, make_bundle


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def bundled(source: Path, limits: BundleLimits | None = None) -> tuple[str, list[str], bytes]:
    """Digest, names and bytes of a bundle."""
    archive = io.BytesIO()
    record = make_bundle(source, archive, limits or BundleLimits())
    with zipfile.ZipFile(archive) as made:
        return record.digest, made.namelist(), archive.getvalue()


def archive_of(path: Path, entries: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] | None = None) -> Path:
    """An archive as somebody else might make one."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if change:
                change(info)
            archive.writestr(info, content)
    return path


@pytest.fixture
def bundles(tmp_path: Path) -> Bundles:
    return Bundles(tmp_path / "bundles")


def left(bundles: Bundles) -> list[str]:
    return sorted(path.name for path in bundles._directory.iterdir())


def test_the_same_files_make_the_same_bundle_wherever_and_whenever(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {"main.py": "x = 1\n", "data/words.txt": "a b", "data/ü.bin": b"\x00" * 2_000_000}
    first = write(tmp_path / "here", files)
    second = write(tmp_path / "there", dict(reversed(files.items())))
    os.utime(second / "main.py", (1, 1))
    assert bundled(first) == bundled(second)
    assert bundled(first)[1] == ["data/words.txt", "data/ü.bin", "main.py"]

    (second / "main.py").chmod(0o755)
    assert bundled(first)[0] != bundled(second)[0]


def test_what_no_function_needs_stays_behind(tmp_path: Path) -> None:
    source = write(
        tmp_path / "app",
        {
            "main.py": "",
            ".hotsetignore": "*.log\n!keep.log\nbig/\n!.env\n",
            "a.log": "",
            "keep.log": "",
            "big/weights.bin": "",
            "pkg/__pycache__/m.pyc": "",
            "pkg/m.py": "",
            ".git/HEAD": "",
            ".venv/bin/x": "",
            ".env": "",
        },
    )
    (source / ".venv" / "lib64").symlink_to("lib")
    assert bundled(source)[1] == [".env", ".hotsetignore", "keep.log", "main.py", "pkg/m.py"]


def test_a_file_takes_its_requirements_along(tmp_path: Path) -> None:
    write(tmp_path, {"one.py": "", "two.py": ""})
    assert bundled(tmp_path / "one.py")[1] == ["one.py"]
    write(tmp_path, {"requirements.txt": "numpy\n"})
    assert bundled(tmp_path / "one.py")[1] == ["one.py", "requirements.txt"]


def test_links_within_the_folder_are_copied_and_others_refused(tmp_path: Path) -> None:
    write(tmp_path, {"secret": "s", "outside/x": ""})
    source = write(tmp_path / "app", {"main.py": "code"})
    (source / "again.py").symlink_to("main.py")
    assert bundled(source)[1] == ["again.py", "main.py"]

    (source / "stolen").symlink_to("../secret")
    with pytest.raises(BundleError, match="leads out of"):
        bundled(source)
    (source / "stolen").unlink()
    (source / "gone").symlink_to("nowhere")
    with pytest.raises(BundleError, match="not a regular file"):
        bundled(source)
    (source / "gone").unlink()
    (source / "folder").symlink_to("../outside")
    with pytest.raises(BundleError, match="link to a folder"):
        bundled(source)


def test_nothing_to_bundle_or_too_much_is_told(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="neither a file nor a folder"):
        bundled(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match="holds no files"):
        bundled(tmp_path / "empty")
    source = write(tmp_path / "app", {"a": "12345", "b": "12345"})
    with pytest.raises(BundleError, match="more than 1 files"):
        bundled(source, BundleLimits(files=1))
    with pytest.raises(BundleError, match="larger than"):
        bundled(source, BundleLimits(unpacked_bytes=9))
    write(source, {"back\\slash": ""})
    with pytest.raises(BundleError, match="no plain relative path"):
        bundled(source)


def test_an_uploaded_bundle_is_unpacked_under_the_name_of_its_content(tmp_path: Path, bundles: Bundles) -> None:
    source = write(tmp_path / "app", {"main.py": "x = 1\n", "bin/run": "#!/bin/sh\n", "w.bin": b"\x01" * 1_500_000})
    (source / "bin" / "run").chmod(0o755)
    digest, names, archive = bundled(source)
    assert digest not in bundles

    with bundles.upload() as upload:
        for start in range(0, len(archive), 100_000):
            upload.write(memoryview(archive)[start : start + 100_000])
        record = upload.finish()

    assert (record.digest, record.files) == (digest, len(names))
    assert record.size_bytes == sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    assert digest in bundles
    unpacked = bundles.path(digest)
    assert content_digest(unpacked) == content_digest(source) == digest
    assert (unpacked / "bin" / "run").stat().st_mode & stat.S_IXUSR
    # What is unpacked can be made into the very same bundle, and coming again changes nothing.
    assert bundled(unpacked) == (digest, names, archive)
    (tmp_path / "again.zip").write_bytes(archive)
    assert bundles.add(tmp_path / "again.zip").digest == digest
    assert left(bundles) == [digest]


def test_the_name_does_not_depend_on_who_compressed(tmp_path: Path, bundles: Bundles) -> None:
    write(tmp_path / "app", {"main.py": "x = 1\n", "pkg/m.py": ""})
    foreign = archive_of(tmp_path / "f.zip", {"pkg/": b"", "pkg/m.py": b"", "main.py": b"x = 1\n"})
    assert bundles.add(foreign).digest == bundled(tmp_path / "app")[0]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a//b",
        "./a",
        "a\\..\\b",
        "C:/x",
        "line\nbreak",
        "x" * 256,
        "d/" * 600 + "x",
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, bundles: Bundles, name: str) -> None:
    with pytest.raises(BundleError, match="no plain relative path"):
        bundles.add(archive_of(tmp_path / "x.zip", {"good.py": b"", name: b"bad"}))
    assert left(bundles) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundles", "x.zip"]


def test_links_devices_and_ciphers_are_refused(tmp_path: Path, bundles: Bundles) -> None:
    def link(info: zipfile.ZipInfo) -> None:
        info.external_attr = (stat.S_IFLNK | 0o777) << 16

    with pytest.raises(BundleError, match="a link or a device"):
        bundles.add(archive_of(tmp_path / "x.zip", {"etc": b"/etc"}, link))

    path = archive_of(tmp_path / "y.zip", {"main.py": b"x"})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the "encrypted" flag of the central directory
    path.write_bytes(content)
    with pytest.raises(BundleError, match="encrypted"):
        bundles.add(path)
    assert left(bundles) == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_are_refused(tmp_path: Path, bundles: Bundles) -> None:
    with pytest.raises(BundleError, match="both need the name"):
        bundles.add(archive_of(tmp_path / "x.zip", {"a": b"", "a/b": b""}))
    path = archive_of(tmp_path / "y.zip", {"a": b"1"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a", b"2")
    with pytest.raises(BundleError, match="both need the name"):
        bundles.add(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, bundles: Bundles) -> None:
    bomb = archive_of(tmp_path / "x.zip", {"zeros": bytes(32 << 20)})
    with pytest.raises(BundleError, match="100 times its size"):
        bundles.add(bomb)
    small = Bundles(tmp_path / "small", BundleLimits(unpacked_bytes=1000, files=3, archive_bytes=10_000))
    with pytest.raises(BundleError, match="larger than"):
        small.add(archive_of(tmp_path / "y.zip", {"a": bytes(600), "b": bytes(600)}))
    with pytest.raises(BundleError, match="more than 3 files"):
        small.add(archive_of(tmp_path / "y.zip", {str(n): b"" for n in range(4)}))
    with pytest.raises(BundleError, match="larger than"):
        small.add(bomb)
    with small.upload() as upload:
        for _ in range(10):
            upload.write(bytes(1000))
        with pytest.raises(BundleError, match="larger than"):
            upload.write(b"1")
    assert left(small) == []


def test_a_damaged_archive_is_refused(tmp_path: Path, bundles: Bundles) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"not a zip at all")
    with pytest.raises(BundleError, match="not a sound zip file"):
        bundles.add(path)
    archive_of(path, {"folder/": b""})
    with pytest.raises(BundleError, match="holds no files"):
        bundles.add(path)

    whole = archive_of(path, {"main.py": os.urandom(300)}).read_bytes()
    for cut in range(40, len(whole), 37):
        damaged = bytearray(whole)
        damaged[cut] ^= 0xFF
        path.write_bytes(damaged)
        # Damage to what matters is refused in our own words; damage to the padding around it does not matter.
        with suppress(BundleError):
            bundles.add(path)
    assert all(len(name) == 64 for name in left(bundles))


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hotset.store.bundles.os.fsync", full)
    with pytest.raises(BundleError, match="the disk has room"):
        bundles.add(archive_of(tmp_path / "x.zip", {"main.py": b"x"}))
    assert left(bundles) == []


def test_unknown_and_unused_bundles(tmp_path: Path, bundles: Bundles) -> None:
    for digest in ("f" * 64, "../bundles", ""):
        assert digest not in bundles
        with pytest.raises(BundleError, match="there is no bundle"):
            bundles.path(digest)
    kept = bundles.add(archive_of(tmp_path / "x.zip", {"main.py": b"1"})).digest
    dropped = bundles.add(archive_of(tmp_path / "x.zip", {"main.py": b"2"})).digest
    (bundles._directory / "tmp-interrupted").mkdir()
    (bundles._directory / "tmp-interrupted.zip").touch()
    for digest in (kept, dropped):
        (bundles._directory / f"{digest}.tensors").mkdir()  # what was converted of it

    assert bundles.remove_unused([kept]) == [dropped]
    assert left(Bundles(bundles._directory)) == [kept, f"{kept}.tensors"]


def test_of_two_deploys_of_one_content_one_wins(
    tmp_path: Path, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_of(tmp_path / "x.zip", {"main.py": b"1"})
    first = bundles.add(archive)
    real = Path.is_dir
    seen: list[Path] = []

    def not_yet(path: Path) -> bool:
        """The other deploy publishes between the look and the rename."""
        if path.name == first.digest and path not in seen:
            seen.append(path)
            return False
        return real(path)

    monkeypatch.setattr(Path, "is_dir", not_yet)
    assert bundles.add(archive).digest == first.digest
    assert left(bundles) == [first.digest]
