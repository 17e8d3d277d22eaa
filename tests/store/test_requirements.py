"""What a function says it imports, read to one normal form."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from hotset.errors import BundleError
from hotset.store.requirements import Requirements, installed_here, parse_requirements, read_requirements


def lines(*text: str) -> tuple[str, ...]:
    return parse_requirements(text, "requirements.txt").lines


def script(folder: Path, text: str) -> Requirements:
    (folder / "main.py").write_text(text)
    return read_requirements(folder, "main.py")


def test_two_spellings_of_one_need_share_an_environment() -> None:
    tidy = parse_requirements(["numpy<3,>=1.26", "scikit-learn[extra]", "torch"], "a")
    untidy = parse_requirements(["# models", "torch", "", "Scikit_Learn[Extra]  # trees", "  NumPy >=1.26, <3"], "b")
    assert tidy == untidy
    assert tidy.lines == ("numpy<3,>=1.26", "scikit-learn[extra]", "torch")
    assert tidy.digest == untidy.digest != Requirements(("torch",)).digest
    assert len(tidy.digest) == 64


def test_requirements_of_other_platforms_are_left_out() -> None:
    assert lines("numpy; python_version >= '3'", "pywin32; sys_platform == 'win32'") == ("numpy",)


def test_packages_from_the_web_come_by_https_only() -> None:
    assert lines("m @ https://example.org/m-1.zip") == ("m @ https://example.org/m-1.zip",)
    assert lines("m @ git+https://example.org/m.git@v1") == ("m @ git+https://example.org/m.git@v1",)
    for url in ("file:///etc/m.whl", "http://example.org/m.zip", "git+ssh://example.org/m"):
        with pytest.raises(BundleError, match=r"requirements.txt, line 2: .*only https"):
            lines("numpy", f"m @ {url}")


@pytest.mark.parametrize("option", ["--index-url=http://evil.example", "-e .", "-r /etc/passwd", "--find-links ."])
def test_options_of_the_installer_never_come_from_callers(option: str) -> None:
    with pytest.raises(BundleError, match=r"line 1: -\S+ is an option of the installer"):
        lines(option)


def test_a_bad_line_is_named() -> None:
    for bad in ("numpy == ", "./local", "numpy --hash=sha256:0", "a b"):
        with pytest.raises(BundleError, match=r"requirements.txt, line 2: .* is no requirement"):
            lines("torch", bad)
    with pytest.raises(BundleError, match="line 2: numpy is required twice"):
        lines("numpy>=1", "NumPy>=2")
    with pytest.raises(BundleError, match="more than 1000 requirements"):
        lines(*(f"p{n}" for n in range(1001)))


def test_a_folder_with_neither_file_needs_nothing(tmp_path: Path) -> None:
    assert read_requirements(tmp_path) == read_requirements(tmp_path, "main.py") == Requirements()
    assert script(tmp_path, "x = 1\n") == Requirements()
    (tmp_path / "weights.onnx").write_bytes(b"\xff\x00")
    assert read_requirements(tmp_path, "weights.onnx") == Requirements()


def test_a_script_header_takes_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("torch\n")
    assert script(tmp_path, "x = 1\n").lines == ("torch",)
    header = "# /// script\n# requires-python = '>=3.11'\n# dependencies = [\n#   'NumPy>=1',\n# ]\n#\n# ///\n"
    assert script(tmp_path, '"""Doc."""\n' + header + "import numpy\n").lines == ("numpy>=1",)
    assert script(tmp_path, "# /// script\n# ///\n") == Requirements()
    assert read_requirements(tmp_path).lines == ("torch",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# /// script\n# dependencies = [\n# ///\n", "is not TOML"),
        ("# /// script\n# dependencies = 'numpy'\n# ///\n", "a list of texts"),
        ("# /// script\n# dependencies = [1]\n# ///\n", "a list of texts"),
        ("# /// script\n# requires-python = 3\n# ///\n", "a list of texts"),
        ("# /// script\n# requires-python = 'new'\n# ///\n", "no version range"),
        ("# /// script\n# requires-python = '<3.11'\n# ///\n", f"this server runs {platform.python_version()}"),
        ("# /// script\n# dependencies = ['-r x']\n# ///\n", "main.py, dependencies, line 1: -r is an option"),
        ("# /// script\n# ///\n# /// script\n# ///\n", "two '# /// script' blocks"),
        ("# /// script\n# dependencies = []\nimport numpy\n", "has no end"),
    ],
)
def test_a_bad_header_is_told(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        script(tmp_path, text)


def test_files_that_are_no_text_or_too_large_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match="not UTF-8"):
        read_requirements(tmp_path)
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(BundleError, match="larger than 1 MiB"):
        read_requirements(tmp_path)
    path.write_bytes("\ufeffnumpy\n".encode())
    assert read_requirements(tmp_path).lines == ("numpy",)


def test_what_this_interpreter_has_need_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {
        "alpha": ["Requires-Dist: beta>=2; extra == 'more'", "Requires-Dist: alpha[more]; extra == 'more'"],
        "beta": [],
        "gamma": ["Requires-Dist: beta>=3; extra == 'all'", "Requires-Dist: delta"],
    }
    for name, wants in packages.items():
        info = tmp_path / f"{name}-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("\n".join([f"Name: {name}", "Version: 2.0", *wants]))
    monkeypatch.syspath_prepend(str(tmp_path))

    def here(*text: str) -> bool:
        return installed_here(Requirements(lines(*text)))

    assert here()
    assert here("alpha", "beta<3", "gamma")
    assert not here("alpha", "beta>2")
    assert not here("no-such-package-anywhere")
    assert here("alpha[more]")
    assert not here("gamma[all]")
    assert not here("alpha @ https://example.org/alpha.zip")
