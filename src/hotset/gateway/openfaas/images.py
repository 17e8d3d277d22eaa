"""What an image names.

    sha256:DIGEST, NAME@sha256:DIGEST   a bundle, by its content
    NAME[:TAG]                          a bundle that was pushed under this name (``hotset push PATH NAME:TAG``)
    /absolute/path                      a file or folder on the server, when it allows that

A registry's host in front is ignored when nothing was pushed under the whole name: ``example.com/me/echo`` finds
``me/echo``.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

from hotset.errors import BundleError, ConfigurationError
from hotset.store.bundles import Bundles, make_bundle
from hotset.store.datastore import BundleRecord, Datastore, ImageRecord

_DIGEST = re.compile(r"(?:.+@)?sha256:([0-9a-f]{64})")
NAME_PATTERN = "^[a-z0-9][a-z0-9._-]*(:[0-9]{1,5})?(/[a-z0-9][a-z0-9._-]*)*(:[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127})?$"
"""``HOST:PORT/REPOSITORY:TAG``."""
_NAME = re.compile(NAME_PATTERN)


class Images:
    """Names of bundles. Methods block; the gateway calls them in threads."""

    def __init__(
        self, store: Datastore, bundles: Bundles, known: dict[str, BundleRecord], *, allow_local: bool = False
    ) -> None:
        """``known``: every bundle the server has, by digest; what is read from a path is added to it."""
        self._store = store
        self._bundles = bundles
        self._known = known
        self._allow_local = allow_local
        self._named = {image.name: image for image in store.named(ImageRecord)}

    def listed(self) -> list[ImageRecord]:
        return sorted(self._named.values(), key=lambda image: image.name)

    def push(self, name: str, bundle: BundleRecord) -> ImageRecord:
        """Give the bundle this name, which may have been another's until now."""
        image = ImageRecord(name=normal(name), digest=bundle.digest, pushed_at_s=time.time())
        self._store.name_image(image, bundle)
        self._named[image.name] = image
        return image

    def remove(self, name: str) -> bool:
        """Forget the name; functions that were deployed from it stay. False: there is none of that name."""
        key = normal(name)
        self._named.pop(key, None)
        return self._store.remove_named(ImageRecord, key)

    def digest(self, image: str) -> str:
        """Digest of the bundle that is meant; raises ``BundleError`` with how to make it known."""
        by_digest = _DIGEST.fullmatch(image)
        if by_digest is not None:
            return by_digest[1]
        if not image:
            raise BundleError("image: give the image of the function: push one with `hotset push PATH NAME:TAG`")
        if image.startswith(("/", "file:")):
            return self._local(image.removeprefix("file://").removeprefix("file:"))
        if _NAME.fullmatch(image):
            found = self._named.get(normal(image)) or self._named.get(normal(without_registry(image)))
            if found is not None:
                return found.digest
        raise BundleError(
            f"there is no image {image[:200]!r} on this server, which pulls from no registry: push its files with "
            f"`hotset push PATH {image[:200]}`"
        )

    def _local(self, text: str) -> str:
        if not self._allow_local:
            raise BundleError(
                "image: this server reads no paths of its own: push the files with `hotset push PATH NAME:TAG`, or "
                "start it with --allow-local-images"
            )
        path = Path(text)
        if not path.is_absolute() or not path.exists():
            raise BundleError(f"image: {text[:200]!r} is no file or folder that the server can read")
        with tempfile.NamedTemporaryFile(suffix=".zip") as archive:
            make_bundle(path, archive)
            archive.flush()
            bundle = self._bundles.add(Path(archive.name))
        self._known[bundle.digest] = bundle
        return bundle.digest


def normal(name: str) -> str:
    """With a tag: ``echo`` is ``echo:latest``. Raises ``ConfigurationError`` when it is no image name."""
    if not _NAME.fullmatch(name) or len(name) > 255:
        raise ConfigurationError(f"{name[:80]!r} is no image name: write one such as me/echo:1.0")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def without_registry(name: str) -> str:
    """``docker.io/me/echo`` -> ``me/echo``; a first part without a dot or a port is no registry."""
    host, slash, rest = name.partition("/")
    return rest if slash and ("." in host or ":" in host or host == "localhost") else name
