"""Entry point of the ``forge`` command."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Runs the command line.

    Collecting garbage while a few hundred modules are imported frees nothing and costs 10 % of the start;
    ``forge_cli.run`` turns it on again before torch is imported. Forge ships no pydantic plugin, and looking
    for one reads the metadata of every installed package.
    """
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        from forge_cli.cli.app import run_app

        run_app()
    except KeyboardInterrupt:
        # Ctrl-C while modules are imported, before the command line can answer for it.
        sys.exit(130)


if __name__ == "__main__":
    main()
