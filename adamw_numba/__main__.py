"""`python -m adamw_numba inspect FILE`, `verify FILE`, `convert A B`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from ._version import __version__
from .saving import archive, folders, manifest
from .saving.stores import targets

_BROKEN_PIPE = 141  # what a shell reports of a process that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns
    -------
    int
        The exit status: 0; 1 if a file is not what was saved, or cannot be read or written; 141 if whatever reads
        the output has closed it.
    """
    given = _parser().parse_args(arguments)
    try:
        given.command(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends: what is left goes nowhere, without another message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m adamw_numba", description="Look at saved optimizers.")
    parser.add_argument("--version", action="version", version=f"adamw_numba {__version__}")
    commands = parser.add_subparsers(required=True)
    inspect = commands.add_parser("inspect", help="print what a file holds")
    inspect.add_argument("file")
    inspect.add_argument("--json", action="store_true", help="the whole document, as JSON")
    inspect.set_defaults(command=_inspect)
    verify = commands.add_parser("verify", help="read everything and compare the checksums")
    verify.add_argument("file")
    verify.set_defaults(command=_verify)
    convert = commands.add_parser("convert", help="write the same state into another kind of store")
    convert.add_argument("file")
    convert.add_argument("target")
    convert.add_argument("--force", action="store_true", help="replace a target that exists")
    convert.set_defaults(command=_convert)
    return parser


def _inspect(given: Any) -> None:
    document = folders.describe(given.file)
    if given.json:
        print(json.dumps(document, indent=2))
        return
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    print(f"{document['class']}, step {document['step']}, schema version {document['version']}")
    print(f"saved by {_printable(versions)}")
    for title in ("config", "extra"):
        print(f"{title}: {json.dumps(document.get(title))}")
    print(f"not decayed: {[v['name'] for v in document['variables'] if v['excluded']]}")
    for group in document.get("groups", []):
        print(f"group of {group['names']}: {json.dumps(group['own'])}")
    keys = [_printable(manifest.decoded(key)) for key in document["arrays"]]
    width = max(map(len, keys), default=0)
    files = document.get("files", ())
    for key, entry in zip(keys, document["arrays"].values(), strict=True):
        checksum = "in parts" if files else f"{entry['crc32']:08x}"
        print(f"{key:{width}}  {entry['dtype']:10}  {checksum}  {tuple(entry['shape'])}")
    print(f"{len(keys)} arrays, {_bytes(document)} bytes" + (f", in {len(files)} files" if files else ""))


def _verify(given: Any) -> None:
    print(f"{given.file}: {folders.verify(given.file)} bytes of arrays are as they were saved")


def _convert(given: Any) -> None:
    targets.check_target(given.target)
    if not given.force and targets.exists(given.target):
        raise FileExistsError(f"{given.target} exists; expected a new target, or `--force` to replace it")
    saved = folders.read(given.file)
    dtypes = {key: entry["dtype"] for key, entry in saved.document["arrays"].items()}
    document = {key: value for key, value in saved.document.items() if key not in ("crc32", "format", "version")}
    archive.write(given.target, document, saved.arrays, dtypes, durable=True)
    print(f"{given.target}: wrote {len(dtypes)} arrays, {_bytes(saved.document)} bytes, of step {document['step']}")


def _bytes(document: dict[str, Any]) -> int:
    entries = document["arrays"].values()
    return sum(math.prod(entry["shape"]) * manifest.DTYPES[entry["dtype"]].itemsize for entry in entries)


def _printable(text: str) -> str:
    """A text of one line, without what would steer a terminal: a file may come from anybody."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())
