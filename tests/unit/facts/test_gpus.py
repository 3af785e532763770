"""GPUs by name, and amounts of memory as people write them."""

from __future__ import annotations

from collections import Counter

import pytest

from forge_cli.errors import ConfigError
from forge_cli.facts.gpus import find_gpu, list_gpus, match_device, parse_memory
from forge_cli.units import GIB

GPUS = list_gpus()


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("h100", "h100-sxm"),
        ("a100", "a100-80gb"),
        ("A100 40GB", "a100-40gb"),
        ("Tesla T4", "t4"),
        ("MI300X", "mi300x"),
    ],
)
def test_names_as_people_write_them(name, found):
    assert find_gpu(name).name == found


def test_unknown_name_offers_near_ones_and_exit_code_2():
    with pytest.raises(ConfigError, match="did you mean rtx-4090") as caught:
        find_gpu("rtx-4900")
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"one of t4, .*mi300x; or give its memory"):
        find_gpu("qqqqqqqq")


@pytest.mark.parametrize(
    ("device", "gib", "found"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA GeForce RTX 3090 Ti", 23.6, "rtx-3090-ti"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.0, "rtx-pro-6000"),
        ("NVIDIA A10G", 22.0, "a10g"),
        ("NVIDIA A10", 22.0, "a10"),
    ],
)
def test_what_torch_sees_is_found(device, gib, found):
    assert match_device(device, round(gib * GIB)).name == found


def test_unknown_device_is_none():
    assert match_device("Some Accelerator 9000", GIB) is None
    assert match_device("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB) is None


def test_names_are_unique():
    names = [name for gpu in GPUS for name in (gpu.name, *gpu.aliases, gpu.device)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert len(GPUS) >= 35


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_figures_are_of_one_kind(gpu):
    # Drivers and error correction leave 90 to 100 % of a card; a slip of GB for GiB would be outside.
    assert 0.89 < gpu.usable_bytes / gpu.memory_bytes < 1
    assert 0.2 * GIB < gpu.context_bytes < GIB
    assert 2.5e11 < gpu.bandwidth_bytes < 1e13
    # Balance of the chips: bf16 operations per byte. With sparsity counted it would be twice as high.
    assert 60 < gpu.peak_flops / gpu.bandwidth_bytes < 450


def test_anchors():
    # facts of published notes: an H100 shows 79.1 GiB, a 24 GB card about 23.5, a T4 14.6 to 14.7.
    assert find_gpu("h100").usable_bytes / GIB == pytest.approx(79.1, abs=0.1)
    assert find_gpu("rtx-4090").usable_bytes / GIB == pytest.approx(23.5, abs=0.1)
    assert find_gpu("t4").usable_bytes / GIB == pytest.approx(14.7, abs=0.2)
    assert not find_gpu("t4").has_bf16 and find_gpu("l4").has_bf16


def test_peaks_agree_with_trl():
    from trl.trainer.utils import get_peak_flops

    compared = 0
    for gpu in GPUS:
        theirs = get_peak_flops(gpu.device, "bfloat16" if gpu.has_bf16 else "float16")
        # TRL gives the A10G the A10's rate; AWS's and NVIDIA's sheets say 70.
        if theirs is not None and gpu.name != "a10g":
            compared += 1
            assert gpu.peak_flops == pytest.approx(theirs, rel=0.01), gpu.name
    assert compared >= 12


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GiB", 16 * GIB),
        ("16 gib", 16 * GIB),
        ("24GB", 24_000_000_000),
        ("24G", 24 * GIB),
        ("1.5TiB", 1536 * GIB),
        ("512M", GIB // 2),
    ],
)
def test_amounts_of_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["16", "GiB", "-4GiB", "0GiB", "16 Gi", "16 GiBs", ""])
def test_other_words_are_no_amounts(text):
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_memory(text)
