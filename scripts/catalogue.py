"""Makes the catalogue of GPU machines out of the tables that it comes from: ``python scripts/catalogue.py FOLDER``.

FOLDER holds ``azure-gpu-prices.csv`` (instance_type, region, on_demand_usd_per_hour) and ``aws-gpu-instances.csv`` (shapes and the
prices of us-east-1), both extracted from Karpenter's providers. What these tables lack – what is in an Azure size, and all of
Google's – is here in the script. Writes ``instance_types.csv`` and ``prices.csv`` of `kaito_core.planning`; where they come from is
in ``sources.csv`` and ``NOTICE`` beside them, which are kept by hand.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "kaito_core" / "src" / "kaito_core" / "planning" / "data"

Machine = tuple[str, str, str, int, int, int, float, str, str]
"""cloud, instance type, GPU, GPUs, usable MiB per GPU, vCPUs, GiB of RAM, GB of local NVMe, why it is retired."""

Price = tuple[str, str, str, float]
"""Instance type, region, capacity type, US dollars an hour."""

NCV3 = "NCv3 (V100) was announced to retire on 2025-09-30"

AZURE: Mapping[str, tuple[str, int, float, int, float]] = {
    # Size: GPU, GPUs, share of each, vCPUs, GiB of RAM.
    "NC4as_T4_v3": ("T4", 1, 1, 4, 28),
    "NC8as_T4_v3": ("T4", 1, 1, 8, 56),
    "NC16as_T4_v3": ("T4", 1, 1, 16, 110),
    "NC64as_T4_v3": ("T4", 4, 1, 64, 440),
    "NV6ads_A10_v5": ("A10", 1, 1 / 6, 6, 55),
    "NV12ads_A10_v5": ("A10", 1, 1 / 3, 12, 110),
    "NV18ads_A10_v5": ("A10", 1, 1 / 2, 18, 220),
    "NV36ads_A10_v5": ("A10", 1, 1, 36, 440),
    "NV36adms_A10_v5": ("A10", 1, 1, 36, 880),
    "NV72ads_A10_v5": ("A10", 2, 1, 72, 880),
    # A preview; the share is not published. By the price per A10 of the others, a third, two thirds and one: the least is taken.
    "NC8ads_A10_v4": ("A10", 1, 1 / 3, 8, 100),
    "NC16ads_A10_v4": ("A10", 1, 1 / 3, 16, 200),
    "NC32ads_A10_v4": ("A10", 1, 1, 32, 400),
    "NC24ads_A100_v4": ("A100-80GB", 1, 1, 24, 220),
    "NC48ads_A100_v4": ("A100-80GB", 2, 1, 48, 440),
    "NC96ads_A100_v4": ("A100-80GB", 4, 1, 96, 880),
    "ND96asr_v4": ("A100-40GB", 8, 1, 96, 900),
    "ND96asr_A100_v4": ("A100-40GB", 8, 1, 96, 900),
    "ND96ams_A100_v4": ("A100-80GB", 8, 1, 96, 1800),
    "ND96amsr_A100_v4": ("A100-80GB", 8, 1, 96, 1800),
    "NC40ads_H100_v5": ("H100-NVL-94GB", 1, 1, 40, 320),
    "NC80adis_H100_v5": ("H100-NVL-94GB", 2, 1, 80, 640),
    "NCC40ads_H100_v5": ("H100-NVL-94GB", 1, 1, 40, 320),
    **{
        f"ND96{kind}_H100_v5": ("H100-80GB", 8, 1, 96, 1900)
        for kind in ("isr", "is", "isf", "isrf", "is_flex", "is_noIB")
    },
    "ND96isr_H200_v5": ("H200", 8, 1, 96, 1850),
    "ND96isr_MI300X_v5": ("MI300X", 8, 1, 96, 1850),
    "ND96is_MI300X_v5": ("MI300X", 8, 1, 96, 1850),
    "ND128isr_NDR_GB200_v6": ("GB200", 4, 1, 128, 900),
    "ND128isrf_NDR_GB200_v6": ("GB200", 4, 1, 128, 900),
    "NC6s_v3": ("V100-16GB", 1, 1, 6, 112),
    "NC12s_v3": ("V100-16GB", 2, 1, 12, 224),
    "NC24s_v3": ("V100-16GB", 4, 1, 24, 448),
    "NC24rs_v3": ("V100-16GB", 4, 1, 24, 448),
    "ND40s_v2": ("V100-32GB", 8, 1, 40, 672),
    "ND40rs_v2": ("V100-32GB", 8, 1, 40, 672),
    "NC6_Promo": ("K80", 1, 1, 6, 56),
    "NC12_Promo": ("K80", 2, 1, 12, 112),
    "NC24_Promo": ("K80", 4, 1, 24, 224),
    "NC24r_Promo": ("K80", 4, 1, 24, 224),
    "NV6_Promo": ("M60", 1, 1, 6, 56),
    "NV12_Promo": ("M60", 2, 1, 12, 112),
    "NV24_Promo": ("M60", 4, 1, 24, 224),
    "NV6s_v2": ("M60", 1, 1, 6, 112),
    "NV12s_v2": ("M60", 2, 1, 12, 224),
    "NV24s_v2": ("M60", 4, 1, 24, 448),
    "NV12s_v3": ("M60", 1, 1, 12, 112),
    "NV24s_v3": ("M60", 2, 1, 24, 224),
    "NV48s_v3": ("M60", 4, 1, 48, 448),
    "NV4as_v4": ("MI25", 1, 1 / 8, 4, 14),
    "NV8as_v4": ("MI25", 1, 1 / 4, 8, 28),
    "NV16as_v4": ("MI25", 1, 1 / 2, 16, 56),
    "NV32as_v4": ("MI25", 1, 1, 32, 112),
    "NG8ads_V620_v1": ("V620", 1, 1 / 4, 8, 16),
    "NG16ads_V620_v1": ("V620", 1, 1 / 2, 16, 32),
    "NG32ads_V620_v1": ("V620", 1, 1, 32, 64),
    "NG32adms_V620": ("V620", 1, 1, 32, 176),
    "NV4ads_V710_v5": ("V710", 1, 1 / 6, 4, 16),
    "NV8ads_V710_v5": ("V710", 1, 1 / 3, 8, 32),
    "NV12ads_V710_v5": ("V710", 1, 1 / 2, 12, 64),
    "NV24ads_V710_v5": ("V710", 1, 1, 24, 128),
    "NV28adms_V710_v5": ("V710", 1, 1, 28, 160),
}

NO_GPU = re.compile(r"Standard_N(P\d|M\d)")
"""FPGAs (NP) and video encoders (NM)."""

RTX_PRO_6000 = re.compile(r"NC(\d+)(l?)ds_xl_RTXPRO6000BSE_v6\Z")
RTX_SHARES = {8: 1 / 8, 16: 1 / 4, 24: 1 / 4, 32: 1 / 4, 36: 1 / 4, 64: 1 / 2, 72: 1 / 2}
RTX_ONE = (128, 132, 144)

AWS_GPUS = {
    "t4": "T4",
    "t4g": "T4G",
    "a10g": "A10G",
    "l4": "L4",
    "l40s": "L40S",
    "h200": "H200",
    "b200": "B200",
    "b300": "B300",
    "h100": "H100-80GB",
    "rtx-pro-4500": "RTX-PRO-4500",
    "rtx-pro-server-6000": "RTX-PRO-6000",
    "radeon-pro-v520": "V520",
}
AWS_BY_MEMORY = {("v100", 32768): "V100-32GB", ("a100", 40960): "A100-40GB", ("a100", 81920): "A100-80GB"}
AWS_REGION = "us-east-1"
AWS_MORE: Sequence[tuple[str, str, int, int, float, float]] = [
    # Not in the table: instance type, GPU, GPUs, vCPUs, GiB of RAM, price in us-east-1.
    ("p3.2xlarge", "V100-16GB", 1, 8, 61, 3.06),
    ("p3.8xlarge", "V100-16GB", 4, 32, 244, 12.24),
    ("p3.16xlarge", "V100-16GB", 8, 64, 488, 24.48),
]

GCP_REGION = "us-central1"
GCP: Sequence[tuple[str, str, int, float, int, float, float, float | None]] = [
    # Machine type, GPU, GPUs, share, vCPUs, GiB of RAM, on demand and spot in us-central1. In a2 and a3 a price is that of one GPU
    # times their number, as in the source.
    ("g2-standard-4", "L4", 1, 1, 4, 16, 0.707, 0.397),
    ("g2-standard-8", "L4", 1, 1, 8, 32, 0.854, None),
    ("g2-standard-12", "L4", 1, 1, 12, 48, 1.0, None),
    ("g2-standard-16", "L4", 1, 1, 16, 64, 1.147, None),
    ("g2-standard-32", "L4", 1, 1, 32, 128, 1.734, None),
    ("g2-standard-24", "L4", 2, 1, 24, 96, 2.001, None),
    ("g2-standard-48", "L4", 4, 1, 48, 192, 4.002, None),
    ("g2-standard-96", "L4", 8, 1, 96, 384, 8.003, None),
    ("a2-highgpu-1g", "A100-40GB", 1, 1, 12, 85, 3.673, 1.928),
    ("a2-highgpu-2g", "A100-40GB", 2, 1, 24, 170, 7.347, 3.856),
    ("a2-highgpu-4g", "A100-40GB", 4, 1, 48, 340, 14.69, 7.712),
    ("a2-highgpu-8g", "A100-40GB", 8, 1, 96, 680, 29.39, 15.424),
    ("a2-megagpu-16g", "A100-40GB", 16, 1, 96, 1360, 55.74, None),
    ("a2-ultragpu-1g", "A100-80GB", 1, 1, 12, 170, 5.069, 2.76),
    ("a2-ultragpu-2g", "A100-80GB", 2, 1, 24, 340, 10.138, 5.52),
    ("a2-ultragpu-4g", "A100-80GB", 4, 1, 48, 680, 20.275, 11.04),
    ("a2-ultragpu-8g", "A100-80GB", 8, 1, 96, 1360, 40.55, 22.08),
    ("a3-highgpu-1g", "H100-80GB", 1, 1, 26, 234, 11.06, 6.33),
    ("a3-highgpu-2g", "H100-80GB", 2, 1, 52, 468, 22.12, 12.65),
    ("a3-highgpu-4g", "H100-80GB", 4, 1, 104, 936, 44.245, 25.3),
    ("a3-highgpu-8g", "H100-80GB", 8, 1, 208, 1872, 88.49, 50.6),
    ("g4-standard-6", "RTX-PRO-6000", 1, 1 / 8, 6, 22, 0.56, None),
    ("g4-standard-12", "RTX-PRO-6000", 1, 1 / 4, 12, 45, 1.125, None),
    ("g4-standard-24", "RTX-PRO-6000", 1, 1 / 2, 24, 90, 2.25, None),
    ("g4-standard-48", "RTX-PRO-6000", 1, 1, 48, 180, 4.5, None),
    ("g4-standard-96", "RTX-PRO-6000", 2, 1, 96, 360, 9.0, None),
    ("g4-standard-192", "RTX-PRO-6000", 4, 1, 192, 720, 18.0, None),
    ("g4-standard-384", "RTX-PRO-6000", 8, 1, 384, 1440, 36.0, None),
]
GCP_ELSEWHERE: Sequence[tuple[str, str, int, int, float, str, float]] = [
    ("a3-megagpu-8g", "H100-80GB", 8, 208, 1872, "us-east4", 92.94),
]


def usable() -> dict[str, int]:
    """Usable MiB of a whole GPU by its name."""
    with (DATA / "gpus.csv").open(encoding="utf-8") as file:
        return {r["gpu"]: int(r["usable_mib"]) for r in csv.DictReader(file)}


def azure(rows: Iterable[Mapping[str, str]], memory: Mapping[str, int]) -> tuple[list[Machine], list[Price]]:
    prices = [
        (r["instance_type"], r["region"], "on-demand", float(r["on_demand_usd_per_hour"]))
        for r in rows
        if not NO_GPU.match(r["instance_type"])
    ]
    machines: list[Machine] = []
    for name in sorted({p[0] for p in prices}):
        gpu, gpus, share, cpus, ram = _azure_shape(name.removeprefix("Standard_"))
        retired = NCV3 if re.search(r"NC\d+r?s_v3\Z", name) else ""
        machines.append(("azure", name, gpu, gpus, int(memory[gpu] * share), cpus, ram, "", retired))
    return machines, prices


def _azure_shape(size: str) -> tuple[str, int, float, int, float]:
    found = RTX_PRO_6000.match(size)
    if not found:
        return AZURE[size]
    cpus, small = int(found[1]), bool(found[2])
    gpus = 1 if cpus in RTX_SHARES or cpus in RTX_ONE else 2
    # The sizes of 24, 36, … vCPUs have at least the RAM of those of 16, 32, …, which is published: 4 GiB a vCPU, or 2 ("l").
    published = max(c for c in (8, 16, 32, 64, 128, 256, 320) if c <= cpus)
    return "RTX-PRO-6000", gpus, RTX_SHARES.get(cpus, 1), cpus, published * (2 if small else 4)


def aws(rows: Iterable[Mapping[str, str]], memory: Mapping[str, int]) -> tuple[list[Machine], list[Price]]:
    machines: list[Machine] = []
    prices: list[Price] = []
    for row in rows:
        name, mib = row["instance_type"], int(row["gpu_memory_mib_each"])
        gpu = AWS_BY_MEMORY.get((row["gpu_name"], mib)) or AWS_GPUS[row["gpu_name"]]
        count = int(row["gpu_count"])  # 0 where it is a part of one
        machines.append(
            (
                "aws", name, gpu, count or 1, memory[gpu] if count else mib, int(row["vcpu"]), int(row["memory_mib"]) / 1024,
                row["local_nvme_gb"], "",
            )
        )  # fmt: skip
        if row["us_east_1_on_demand_usd_per_hour"]:
            prices.append((name, AWS_REGION, "on-demand", float(row["us_east_1_on_demand_usd_per_hour"])))
    for name, gpu, count, cpus, ram, price in AWS_MORE:
        machines.append(("aws", name, gpu, count, memory[gpu], cpus, ram, "", ""))
        prices.append((name, AWS_REGION, "on-demand", price))
    return machines, prices


def gcp(memory: Mapping[str, int]) -> tuple[list[Machine], list[Price]]:
    machines: list[Machine] = []
    prices: list[Price] = []
    for name, gpu, count, share, cpus, ram, on_demand, spot in GCP:
        machines.append(("gcp", name, gpu, count, int(memory[gpu] * share), cpus, ram, "", ""))
        prices.append((name, GCP_REGION, "on-demand", on_demand))
        if spot is not None:
            prices.append((name, GCP_REGION, "spot", spot))
    for name, gpu, count, cpus, ram, region, on_demand in GCP_ELSEWHERE:
        machines.append(("gcp", name, gpu, count, memory[gpu], cpus, ram, "", ""))
        prices.append((name, region, "on-demand", on_demand))
    return machines, prices


def _read(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _write(name: str, header: str, rows: Iterable[Sequence[object]]) -> None:
    lines = [header, *(",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in row) for row in rows)]
    (DATA / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    folder, memory = Path(sys.argv[1]), usable()
    parts = [
        aws(_read(folder / "aws-gpu-instances.csv"), memory),
        azure(_read(folder / "azure-gpu-prices.csv"), memory),
        gcp(memory),
    ]
    machines = sorted(m for found, _ in parts for m in found)
    _write(
        "instance_types.csv", "cloud,instance_type,gpu,gpus,gpu_usable_mib,vcpus,memory_gib,nvme_gb,retired", machines
    )
    prices = sorted(p for _, found in parts for p in found)
    rows = [(name, region, kind, f"{usd:.6f}".rstrip("0").rstrip(".")) for name, region, kind, usd in prices]
    _write("prices.csv", "instance_type,region,capacity_type,usd_per_hour", rows)


if __name__ == "__main__":
    main()
