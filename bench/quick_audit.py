"""How long `elr audit DATA` takes on photos of 250 pixels, all defaults, on this machine.

Enlarges images of CIFAR-10 with human labels to JPEGs of 250 pixels, runs the command as a user
does and prints the seconds from the command to the review page.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import sets
from PIL import Image

SIDE = 250


def enlarge(made: sets.StudySet, folder: Path) -> Path:
    """Write the pictures of a set as large JPEGs; return the CSV file that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "labels.csv"
    with made.csv.open(newline="") as source, table.open("w", newline="") as target:
        rows = list(csv.DictReader(source))
        writer = csv.writer(target)
        writer.writerow(("path", "label", "true_label"))
        for number, row in enumerate(rows):
            name = f"{number:05d}.jpg"
            with Image.open(made.root / row["path"]) as picture:
                large = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            large.save(folder / name, quality=90)
            writer.writerow((name, row["label"], row["true_label"]))
    return table


def main() -> None:
    """Make the pictures, audit them, print what it took."""
    parser = sets.cifar_arguments(__doc__)
    parser.add_argument("--images", type=int, default=3000)
    args = parser.parse_args()
    result = args.out / f"quick-{args.images}.json"
    if not args.table:
        csv_path = args.out / "rand1.csv"
        made = sets.cifar(csv_path, args.cifar, args.labels, "rand1", args.images, 0)
        table = enlarge(made, args.out / "pictures")
        words = ["audit", table, "--out", args.out / "audit", "--overwrite", "--json", "--quiet"]
        words += ["--backbone", "tf_efficientnet_lite0", "--weights", args.weights]
        words += ["--truth-column", "true_label"]
        started = time.monotonic()
        command = [sys.executable, "-m", "elrcli", *map(str, words)]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = round(time.monotonic() - started)
        found = json.loads(printed)
        figures = {"images": args.images, "seconds": seconds, "truth": found["truth"]}
        result.write_text(json.dumps(figures, indent=2) + "\n")
    print(result.read_text())


if __name__ == "__main__":
    main()
