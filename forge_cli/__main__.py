"""Entry point of the ``forge`` command."""

from __future__ import annotations

import gc
import os


def main() -> None:
    """Runs the command line.

    Collecting garbage while a few hundred modules are imported frees nothing and costs 10 % of the start;
    ``forge_cli.run`` turns it on again before torch is imported. Forge ships no pydantic plugin, and looking
    for one reads the metadata of every installed package.
    """
    gc.disable()
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from forge_cli.cli.app import run_app

    run_app()


if __name__ == "__main__":
    main()
