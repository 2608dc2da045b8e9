"""Peak memory of a run on a large table: numbers, a column of categories, two classes.

    python benchmarks/large_table.py [ROWS] [csv|parquet] [COLUMNS]

Writes the table in chunks, trains one epoch on it in a separate process, and prints its seconds, its peak RSS, and how
much of that is private memory, which, unlike file pages, the system cannot reclaim.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars

CHUNK = 250_000


def write(path, rows, columns):
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            numbers = generator.normal(size=(count, columns)).round(3)
            job = generator.integers(0, 8, count)
            label = np.where(numbers[:, 0] + (job > 3) + generator.normal(size=count) > 0, "yes", "no")
            frame = polars.DataFrame(numbers, schema=[f"x{i}" for i in range(columns)])
            frame = frame.with_columns(polars.Series("job", [f"job{j}" for j in job]), polars.Series("y", label))
            frame.write_csv(file, include_header=start == 0)


def own_memory(process):
    """Returns the process's peak private memory in MiB, without file pages."""
    peak = 0
    while process.poll() is None:
        words = Path(f"/proc/{process.pid}/status").read_text().split()
        peak = max(peak, int(words[words.index("RssAnon:") + 1]) // 1024 if "RssAnon:" in words else 0)
        time.sleep(0.1)
    return peak


def main():
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000_000
    kind = sys.argv[2] if len(sys.argv) > 2 else "csv"
    columns = int(sys.argv[3]) if len(sys.argv) > 3 else 10
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        write(table, rows, columns)
        if kind == "parquet":
            table = table.with_suffix(".parquet")
            polars.scan_csv(Path(folder) / "table.csv").sink_parquet(table)
        start = time.monotonic()
        words = (
            f"fit --model Classification --model.backbone TabularMLP --model.backbone.widths [32] --data TabularData "
            f"--data.target {table} --data.batch_size 4096 --trainer.max_epochs 1 --trainer.logger false "
            f"--trainer.default_root_dir {folder}"
        )
        process = subprocess.Popen([sys.executable, "-m", "tl_modules", *words.split()])
        own = own_memory(process)
        if process.returncode:
            raise SystemExit(process.returncode)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        size = table.stat().st_size / 2**20
        print(f"{rows:,} rows of {columns} numbers, {size:,.0f} MiB of {kind}: {time.monotonic() - start:,.0f} s")
        print(f"peak {peak:,.0f} MiB, private {own:,.0f} MiB")


if __name__ == "__main__":
    main()
