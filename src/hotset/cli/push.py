"""``hotset push``: files to the server, under an image name that deployments use."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import click

from hotset.cli.options import gateway_option, json_option, status_line
from hotset.cli.output import write_json
from hotset.cli.remote import Remote
from hotset.store.bundles import make_bundle


def send_bundle(remote: Remote, source: Path, say: Callable[[str], None]) -> str:
    """Bundle a file or folder and send it unless the server has it; returns its digest."""
    with tempfile.TemporaryFile() as archive:
        bundle = make_bundle(source, archive)
        if not remote.has_bundle(bundle.digest):
            size, sent = archive.tell(), 0
            archive.seek(0)

            def progress(piece: int) -> None:
                nonlocal sent
                sent += piece
                say(f"Uploading {source.name}: {sent / 1e6:.1f} of {size / 1e6:.1f} MB")

            remote.upload(bundle.digest, archive, progress)
    return bundle.digest


def push_image(remote: Remote, source: Path, image: str, say: Callable[[str], None]) -> str:
    """Send the files and give them the name; returns their digest."""
    digest = send_bundle(remote, source, say)
    remote.change("PUT", f"/system/images/{quote(image, safe='/:')}", {"digest": digest})
    return digest


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("image", metavar="NAME[:TAG]")
@gateway_option
@json_option
def push(source: Path, image: str, gateway: str, as_json: bool) -> None:
    """Send the files of SOURCE to the server under an image name, for ``hotset deploy --image`` or faas-cli."""
    with Remote(gateway) as remote, status_line(f"Bundling {source}", quiet=as_json) as say:
        digest = push_image(remote, source, image, say)
    if as_json:
        write_json({"image": image, "digest": digest})
    else:
        click.echo(f"Pushed {image} (sha256:{digest}).")
