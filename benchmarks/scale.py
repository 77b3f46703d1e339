"""How a run grows with the number of its clients: time, memory, files and the page.

    .venv/bin/python benchmarks/scale.py [--clients 10 100 1000 10000] [--sampled 10] [--rounds 20]

Each number of clients is run in a process of its own, with so many clients a round (all of fewer),
four rows a client that fedloom makes itself, the tiny model, and a method that keeps tensors with
every client (SCAFFOLD). Told are CPU seconds, as others may use the machine, and the resident memory
of the process after each round. With ``--kills`` the run with most clients is made again, killed that
many times in the middle of a round and resumed, and ends with the same adapter. Growth is fitted as a
power of the number of clients, from the second number on. ``--result FILE.md`` writes the table, and
the picture beside it.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, os, signal, sys, time
from pathlib import Path
import fedloom
from fedloom.runs.observers import Silent

folder, table, kill_in = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
found = {"rounds": [], "memory": []}

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

class Watch(Silent):
    began = 0.0
    def begin(self, plan):
        found["start"] = self.began = time.process_time()
        found["memory_at_start"] = memory()
        print(json.dumps({"ready": self.began}), flush=True)
    def client_done(self, round, client, done, of):
        if round == kill_in and done == of // 2:
            os.kill(os.getpid(), signal.SIGKILL)
    def round_done(self, record):
        now = time.process_time()
        found["rounds"].append(now - self.began)
        found["memory"].append(memory())
        self.began = now
    def warning(self, text):
        print("warning:", text, file=sys.stderr)

if (folder / "run.json").exists():
    fedloom.resume(folder, observer=Watch())
else:
    fedloom.run(table, observer=Watch())
print(json.dumps(found))
"""

PAGE = """
import sys, time
from pathlib import Path
from fedloom.reports.run_page import write_report
start = time.process_time()
print(write_report([Path(sys.argv[1])]).stat().st_size, time.process_time() - start)
"""

SHOWN = (
    ("start", "start, s"), ("round", "a round, s"), ("rounds_a_minute", "rounds a minute"),
    ("early", "memory early, MB"), ("late", "memory late, MB"), ("sent", "sent a round, kB"),
    ("files", "run folder, MB"), ("page", "page, kB"), ("page_seconds", "page made in, s"),
)  # fmt: skip
"""What the table has a column for."""


def table_of(folder: Path, clients: int, given) -> dict:
    """Return the experiment of a run."""
    return {
        "model": {"path": "tiny"},
        "adapter": {"rank": 2, "layers": 1, "targets": ["q_proj", "v_proj"]},
        "data": {"source": "builtin:preferences", "builtin_rows": 4 * clients + 20},
        "partition": {"kind": "iid"},
        "objective": {"name": "simpo"},
        "method": {"name": given.method},
        "federation": {
            "clients": clients,
            "clients_per_round": min(clients, given.sampled),
            "rounds": given.rounds,
        },
        "training": {"batch_size": 1, "local_steps": 1},
        "evaluation": {
            "every": given.rounds,
            "max_examples": 20,
            "per_client": False,
            "samples": 0,
        },
        "output": {"folder": str(folder), "verify": False},
    }


def child(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a process with one thread."""
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=one
    )


def play(folder: Path, table: dict, kill_in: int = 0) -> dict:
    """Run or resume; return what the process told, also where it was killed in a round."""
    done = child(CHILD, str(folder), json.dumps(table), str(kill_in))
    if done.returncode and not kill_in:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def adapter(folder: Path) -> str:
    """Return the SHA-256 of the adapter."""
    return hashlib.sha256(
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def measured(folder: Path, clients: int, given) -> dict:
    """Run once, make its page, and return all numbers of a line of the table."""
    found = play(folder, table_of(folder, clients, given))
    rounds, memory = found["rounds"][1:], found["memory"][1:]  # without the evaluation of the start
    middle = sorted(rounds[:-1])[len(rounds[:-1]) // 2]  # the last one evaluates
    page, seconds = child(PAGE, str(folder)).stdout.split()
    lines = (folder / "rounds.jsonl").read_text().splitlines()[1:]
    sent = sum(sum(json.loads(line)[way] for way in ("bytes_up", "bytes_down")) for line in lines)
    files = {
        path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()
    }
    return {
        "clients": clients,
        "start": found["start"],
        "round": middle,
        "rounds_a_minute": 60 / middle,
        "early": memory[1],
        "late": memory[-1],
        "sent": sent / len(rounds) / 1e3,
        "files": sum(files.values()) / 1e6,
        "page": int(page) / 1e3,
        "page_seconds": float(seconds),
    }


def exponent(rows: list[dict], name: str) -> float:
    """Return the slope of a line through the logarithms, from the second row on."""
    points = [
        (math.log(row["clients"]), math.log(max(row[name], 1e-9))) for row in rows[1:] or rows
    ]
    across, up = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    spread = sum((x - across) ** 2 for x, _ in points)
    return sum((x - across) * (y - up) for x, y in points) / spread if spread else math.nan


def killed(folder: Path, table: dict, kills: int) -> tuple[str, list[float]]:
    """Run with so many kills; return the adapter, and CPU seconds from each resume to its first round."""
    rounds = table["federation"]["rounds"]
    resumed = []
    for place in range(kills + 1):
        kill_in = 1 + (place + 1) * (rounds - 1) // (kills + 1) if place < kills else 0
        found = play(folder, table, kill_in)
        if place:
            resumed.append(found.get("ready", found.get("start")))
    return adapter(folder), resumed


def markdown(rows: list[dict], given) -> str:
    """Return the table with the fitted exponents below it."""
    lines = [
        f"{given.sampled} clients a round of all there are, {given.rounds} rounds, {given.method}, four "
        "rows a client, the tiny model, one thread. Seconds are of the CPU; memory is resident, after "
        "the second and after the last round.",
        "",
        "| clients | " + " | ".join(title for _, title in SHOWN) + " |",
        "| --- |" + " --- |" * len(SHOWN),
    ]
    for row in rows:
        cells = " | ".join(
            f"{row[name]:.3g}" if row[name] < 100 else f"{row[name]:.0f}" for name, _ in SHOWN
        )
        lines.append(f"| {row['clients']} | {cells} |")
    fitted = " | ".join(f"{exponent(rows, name):.2f}" for name, _ in SHOWN)
    lines.append(f"| exponent | {fitted} |")
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], file: Path) -> None:
    """Draw each number over the number of clients, both on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, title in SHOWN:
        if name in ("start", "round", "late", "files", "page"):
            values = [row[name] for row in rows]
            label = f"{title}: exponent {exponent(rows, name):.2f}"
            axes.loglog([row["clients"] for row in rows], values, "o-", label=label)
    axes.set_xlabel("clients")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file)


def main() -> None:
    """Run all, print the table, and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--sampled", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--method", default="scaffold")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows = []
        for clients in given.clients:
            folder = Path(name) / str(clients)
            rows.append(measured(folder, clients, given))
            print(rows[-1], flush=True)
        text = markdown(rows, given)
        if given.kills:
            again = Path(name) / "killed"
            digest, resumed = killed(again, table_of(again, given.clients[-1], given), given.kills)
            assert digest == adapter(folder), "another adapter after the kills"
            told = ", ".join(f"{seconds:.1f}" for seconds in resumed)
            text += (
                f"\nKilled {given.kills} times with {given.clients[-1]} clients: the same adapter. CPU "
                "seconds of the resumed processes until training goes on, imports and tokenised rows "
                f"included: {told}.\n"
            )
    print(text)
    if given.result is not None:
        given.result.write_text(text + f"\n![the same, drawn]({given.result.stem}.svg)\n")
        picture(rows, given.result.with_suffix(".svg"))


if __name__ == "__main__":
    main()
