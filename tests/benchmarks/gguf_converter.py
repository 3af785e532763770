"""Forge's GGUF file beside that of llama.cpp's own converter, field by field and tensor by tensor.

    python tests/benchmarks/gguf_converter.py build/real/smollm2-135m-instruct PATH/convert_hf_to_gguf.py

The converter comes with llama.cpp, or with the package convert-hf-to-gguf (in an environment of its own).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from forge_cli.results.gguf_file import write_gguf


def main() -> int:
    """Compares; returns 1 if a tensor differs."""
    model, converter = Path(sys.argv[1]), Path(sys.argv[2])
    differ = 0
    for form in ("f16", "q8_0"):
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{name}.gguf" for name in ("forge", "converter")]
            write_gguf(model, files[0], form, name=model.name, end_token_ids=[])
            command = [sys.executable, str(converter), str(model), "--outfile", str(files[1]), "--outtype", form]
            subprocess.run(command, check=True, capture_output=True)
            differ += compare(form, *(GGUFReader(file) for file in files))
    return 1 if differ else 0


def compare(form: str, own: GGUFReader, other: GGUFReader) -> int:
    """Prints fields that differ; returns how many tensors do."""
    for name in sorted({*own.fields, *other.fields}):
        values = [one.fields[name].contents() if name in one.fields else None for one in (own, other)]
        if values[0] != values[1]:
            print(f"  {name}: {str(values[0])[:60]} | {str(values[1])[:60]}")
    tensors = [{one.name: one for one in reader.tensors} for reader in (own, other)]
    same = sum(
        one.tensor_type == tensors[1][name].tensor_type and np.array_equal(one.data, tensors[1][name].data)
        for name, one in tensors[0].items()
        if name in tensors[1]
    )
    total = len({*tensors[0], *tensors[1]})
    print(f"{form}: {same} of {total} tensors are the same bytes")
    return total - same


if __name__ == "__main__":
    sys.exit(main())
