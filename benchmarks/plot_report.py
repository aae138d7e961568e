"""Draw where a compression run lost what: weighted error by layer and projection, from its report.

python benchmarks/plot_report.py OUT/lorap_report.json picture.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt


def plot(report_file: Path, picture: Path) -> None:
    """Left: parameters by kind, before and after. Right: weighted relative error by layer."""
    report = json.loads(report_file.read_text())
    mpl.rcParams |= {"svg.hashsalt": "lorap", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, (sizes, errors) = plt.subplots(1, 2, figsize=(9.5, 3.4), width_ratios=[2, 3], layout="constrained")
    roles = list(dict.fromkeys(entry["role"] for entry in report["projections"]))
    for role in roles:
        found = [entry for entry in report["projections"] if entry["role"] == role]
        name = role.removesuffix("_proj")
        before, after = (sum(entry[key] for entry in found) / 1e6 for key in ("params_before", "params_after"))
        sizes.barh(name, before, color="#d8dee6")
        sizes.barh(name, after, color="#3b6ea5", height=0.5)
        sizes.annotate(f"{after / before:.0%}", (before, name), textcoords="offset points", xytext=(3, -3))
        if any(entry["error"] for entry in found):
            errors.plot(
                [entry["layer"] for entry in found], [entry["error"] for entry in found], label=name, marker="."
            )
    sizes.invert_yaxis()
    sizes.set(title="Parameters kept", xlabel="million parameters, all layers", xlim=(0, sizes.get_xlim()[1] * 1.12))
    errors.set(title="Activation-weighted relative error", xlabel="decoder layer", ylim=(0, None))
    errors.legend(frameon=False, ncols=5, loc="lower center")
    figure.suptitle(f"{report['model']}, recipe {report['config']['recipe']}, sparsity {report['config']['sparsity']}")
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
