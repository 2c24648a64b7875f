"""What others published of tokenizers of protein structures, second-hand: copied from tables, and not measured."""

from provq.evaluation.leaderboard import Entry

AREAS_FROM = "table of GeoBPE and notes on StructTokenBench, second-hand"
STRUCTURES_FROM = "table of the vq_encoder_decoder repository (GCP-VQVAE), second-hand"
AREA_COLUMNS = ("BindInt/fold", "BindBio/fold", "CatBio/fold", "Con/superfamily", "mean")
SETS = ("CASP14", "CASP15", "CASP16", "CAMEO24", "zero-shot")

# Areas under the curve in percent, means over batches, by `AREA_COLUMNS`.
_AREAS = {
    "ProteinMPNN": (51.83, 78.42, 82.49, 84.68, 75.92),
    "MIF": (50.38, 85.79, 85.85, 92.66, 79.82),
    "FoldSeek": (53.18, 32.37, 56.33, 51.31, 51.90),
    "ProTokens": (44.66, 58.47, 67.68, 70.64, 65.37),
    "ESM3": (44.30, 62.84, 65.33, 80.53, 69.24),
    "VanillaVQ": (47.25, 62.02, 67.58, 74.60, 68.30),
    "AminoAseed": (47.11, 65.73, 65.95, 86.60, 72.43),
    "GeoBPE-Transfer": (59.19, 94.94, 95.01, 84.84, 80.20),
}

# TM-score and RMSD in angstrom of backbones, by `SETS`.
_STRUCTURES = {
    "GCP-VQVAE Large": ((0.989, 0.54), (0.988, 0.53), (0.986, 0.76), (0.992, 0.44), (0.967, 0.82)),
    "GCP-VQVAE Lite": ((0.975, 0.84), (0.967, 0.92), (0.976, 1.06), (0.979, 0.74), (0.947, 1.12)),
    "AIDO": ((0.983, 0.66), (0.966, 0.86), (0.881, 4.98), (0.985, 0.59), (0.920, 2.01)),
    "ESM3": ((0.973, 1.10), (0.942, 1.34), (0.910, 4.49), (0.974, 1.02), (0.847, 6.51)),
    "DPLM-2": ((0.906, 2.09), (0.827, 6.38), (0.785, 14.2), (0.924, 1.94), (0.714, 12.2)),
    "FoldToken4": ((0.899, 2.00), (0.914, 1.69), (0.821, 5.41), (0.935, 1.41), (0.826, 4.55)),
    "InstaDeep": ((0.894, 1.89), (0.791, 8.56), (0.835, 6.94), (0.911, 2.17), (0.766, 10.4)),
    "AminoAseed": ((0.395, 14.67), (0.383, 18.58), (0.343, 25.95), (0.463, 12.62), (0.416, 19.26)),
}


def published_areas() -> list[Entry]:
    """Areas under the curve on functional sites, as shares of 1."""
    entries = []
    for name, areas in _AREAS.items():
        remark = "; starts from features of a language model" if name == "GeoBPE-Transfer" else ""
        numbers = {f"{column}_auroc_batch": area / 100 for column, area in zip(AREA_COLUMNS, areas, strict=True)}
        entries.append(Entry(name, AREAS_FROM + remark, [numbers], is_published=True))
    return entries


def published_structures() -> list[Entry]:
    """How well structures are built again."""
    entries = []
    for name, pairs in _STRUCTURES.items():
        numbers: dict[str, float | None] = {}
        for place, (tm, rmsd) in zip(SETS, pairs, strict=True):
            numbers |= {f"{place}/tm": tm, f"{place}/rmsd": rmsd}
        entries.append(Entry(name, STRUCTURES_FROM, [numbers], is_published=True))
    return entries
