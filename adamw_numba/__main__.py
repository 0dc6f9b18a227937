"""`python -m adamw_numba inspect FILE`, `verify FILE`, `convert A B`."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from .saving import manifest


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 if a file is not what was saved."""
    parser = argparse.ArgumentParser(prog="python -m adamw_numba", description="Look at saved optimizers.")
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
    convert.set_defaults(command=_convert)
    given = parser.parse_args(arguments)
    try:
        given.command(given)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _inspect(given: Any) -> None:
    document = manifest.describe(given.file)
    if given.json:
        print(json.dumps(document, indent=2))
        return
    print(f"{document['class']}, step {document['step']}, schema version {document['version']}")
    print(f"saved by {', '.join(f'{name} {version}' for name, version in document['versions'].items())}")
    for title in ("config", "extra"):
        print(f"{title}: {json.dumps(document.get(title))}")
    print(f"not decayed: {[v['name'] for v in document['variables'] if v['excluded']]}")
    width = max(map(len, document["arrays"]), default=0)
    for key, entry in document["arrays"].items():
        print(f"{key:{width}}  {entry['dtype']:10}  {entry['crc32']:08x}  {tuple(entry['shape'])}")
    print(f"{len(document['arrays'])} arrays, {_bytes(document)} bytes")


def _verify(given: Any) -> None:
    print(f"{given.file}: {manifest.verify(given.file)} bytes of arrays are as they were saved")


def _convert(given: Any) -> None:
    saved = manifest.read(given.file)
    dtypes = {key: entry["dtype"] for key, entry in saved.document["arrays"].items()}
    document = {key: value for key, value in saved.document.items() if key not in ("crc32", "format", "version")}
    manifest.write(given.target, document, saved.arrays, dtypes, durable=True)


def _bytes(document: dict[str, Any]) -> int:
    entries = document["arrays"].values()
    return sum(math.prod(entry["shape"]) * manifest.DTYPES[entry["dtype"]].itemsize for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
