"""`device-profile image`: build images for boards, or prepare those of Raspberry Pi OS."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from device_profiles.image.packages import Mirrors
from device_profiles.image.recipe import read_recipe, recipe_names
from edge_runtime.common.options import add_action, add_flag, add_option
from edge_runtime.settings import xdg_directory

DESCRIPTION = """\
Images that a board boots and answers from.

`build` makes one from Debian's packages, with the runtime, its service, SSH by key only, and no password. `customise`
prepares a stock Raspberry Pi OS instead, which installs the runtime at its first boot, without a network. Both read
flexspec.toml of their boot partition (`device-profile configure --help`). `device-profile flash` writes them to cards.
"""
BUILD = """\
Builds an image for a board from Debian packages and the wheels of a lock. The base system is installed under emulation,
which takes minutes, and is cached; the rest takes a minute or two. The same inputs make the same image, bit for bit.
Needs no root where user namespaces are allowed (package uidmap); nothing is mounted.

Writes IMAGE, IMAGE.bmap (block map), IMAGE.json (what it was made from) and IMAGE.xz.

examples:
  device-profile image build --board rpi5 --bundle bundle.tar.gz
  device-profile image build --board generic-arm64 --pages 16k --output build/arm64.img --no-compress
  device-profile image build --board rpi4 --modem --mirror http://snapshot.debian.org/archive/debian/20261121T000000Z
"""
CUSTOMISE = """\
Prepares a stock Raspberry Pi OS (trixie, 64 bit): its first boot installs the runtime, without a network, configures
it and starts the service. Writes cloud-init's files (user-data, network-config, meta-data), the runtime, a draft bundle
and flexspec.toml to the boot partition of an image file, or of a card that is mounted.

examples:
  device-profile image customise 2026-10-02-raspios-trixie-arm64-lite.img --bundle bundle.tar.gz --config kitchen.toml
  device-profile image customise /media/me/bootfs --config kitchen.toml --user me --ssh-key ~/.ssh/id_ed25519.pub
"""


def add_parser(commands: Any) -> None:
    """Add `image` and its actions to the subparsers."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        "image",
        help="build an image for a board, or prepare Raspberry Pi OS",
        description=DESCRIPTION,
        formatter_class=raw,
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--bundle", type=Path, metavar="BUNDLE", help="draft bundle: a directory, or an archive of one")
    shared.add_argument(
        "--wheel", type=Path, metavar="FILE", help="FlexSpec's wheel (default: built from this checkout)"
    )

    build = add_action(
        actions, "build", _build, "build an image", parents=[shared], description=BUILD, formatter_class=raw
    )
    build.add_argument("--board", required=True, choices=recipe_names(), help="the board")
    build.add_argument("--output", type=Path, metavar="FILE", help="default: build/flexspec-BOARD.img")
    build.add_argument(
        "--pages", choices=("4k", "16k"), help="page size of the kernel (default: the board's usual one)"
    )
    build.add_argument("--cache", type=Path, default=_default_cache(), metavar="DIR", help="default: %(default)s")
    add_option(build, "--mirror URL", "mirror of Debian", default=Mirrors().debian)
    add_option(build, "--security-mirror URL", "mirror of Debian's security updates", default=Mirrors().security)
    add_flag(build, "--modem", "with ModemManager, for LTE and 5G")
    add_flag(build, "--no-compress", "do not write IMAGE.xz")

    customise = add_action(
        actions,
        "customise",
        _customise,
        "prepare a stock Raspberry Pi OS",
        parents=[shared],
        description=CUSTOMISE,
        formatter_class=raw,
    )
    customise.add_argument(
        "place", type=Path, metavar="IMAGE_OR_BOOT_PARTITION", help="image file, or mounted partition"
    )
    customise.add_argument(
        "--config", type=Path, metavar="FILE", help="flexspec.toml of the board (default: one to fill in)"
    )
    add_option(customise, "--user NAME", "administrator to create", default="flexspec")
    customise.add_argument(
        "--ssh-key",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="public key that may log in as that user",
    )


def _build(options: argparse.Namespace) -> int:
    from device_profiles.image.build import ImageOptions, build_image, default_epoch

    output: Path = options.output or Path("build", f"flexspec-{options.board}.img")
    config = ImageOptions(
        board=options.board,
        recipe=read_recipe(options.board),
        output=output,
        cache=options.cache,
        mirrors=Mirrors(options.mirror, options.security_mirror),
        pages=options.pages,
        bundle=options.bundle,
        wheel=options.wheel,
        modem=options.modem,
        epoch=default_epoch(),
        compress=not options.no_compress,
    )
    manifest = build_image(config, _say)
    print(f"{output}: {manifest.image_bytes / 1e6:.0f} MB, SHA-256 {manifest.image_sha256}")
    return 0


def _customise(options: argparse.Namespace) -> int:
    from device_profiles.image.build import default_epoch
    from device_profiles.image.customise import CustomiseOptions, customise

    config = CustomiseOptions(
        wheel=options.wheel,
        bundle=options.bundle,
        configuration=options.config,
        user=options.user,
        ssh_keys=options.ssh_key,
        epoch=default_epoch(),
    )
    for name in customise(options.place, config, _say):
        print(f"{options.place}: {name}")
    return 0


def _default_cache() -> Path:
    return (xdg_directory(os.environ, "XDG_CACHE_HOME", ".cache") or Path("/var/cache")) / "flexspec/image"


def _say(text: str) -> None:
    print(text, flush=True)
