"""Every kind of page as a browser shows it: small runs that give them, pictures, and what is wrong in them.

``python tests/screenshots.py FOLDER`` makes the runs and pages below FOLDER (those that are there
stay) and a picture of each page at 1280 and 390 pixels, light and dark, and of the live page of two runs
(``docs/watching.png`` is ``live-run-20-1280-light.png``). It needs Chromium; the same is checked by
``reports/test_in_a_browser.py``.
"""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")

FAULTS = Path(__file__).with_name("page_faults.js")
"""What is asked of each page; see there."""

TINY = {
    "data": {"source": "builtin:preferences", "builtin_rows": 240},
    "partition": {"kind": "dirichlet", "column": "domain", "alpha": 0.3, "minimum": 2},
    "objective": {"name": "dpo"},
    "training": {"learning_rate": 3e-3, "batch_size": 4, "local_steps": 1},
    "evaluation": {"samples": 2, "max_examples": 40, "client_max_examples": 4},
    "output": {"verify": False},
}

GRID = {
    **TINY,
    "partition": {"kind": "iid", "client_test_fraction": 0.2},
    "federation": {"clients": 3, "rounds": 2},
}

CODES = {"Tab": 9, "Enter": 13, "Space": 32, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36}
KEYS = {"Space": " "}
"""Keys with names: the code that a browser is told, and what it calls them."""

LINKS = {
    "mobile": {"uplink": "5Mbit", "downlink": "30Mbit", "latency": "60ms", "speed": "100GFLOP"}
}


def browser():
    """The path of Chromium, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next(filter(None, found), None)


def with_clients(model, clients):
    """A run with so many clients, a few of them a round."""
    own = {"clients": clients, "rounds": 3, "clients_per_round": min(clients, 20)}
    rows = {**TINY["data"], "builtin_rows": max(240, 12 * clients)}
    return {**TINY, "model": {"path": model}, "federation": own, "data": rows}


def many_values(model, file):
    """Clients that differ in more values than colours can tell apart."""
    topics = [f"a topic with a long name, number {number}" for number in range(40)]
    rows = [
        {"prompt": f"{i} of {topic}?", "chosen": "yes", "rejected": "no", "topic": topic}
        for topic in topics
        for i in range(10)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partition = {"kind": "dirichlet", "column": "topic", "alpha": 0.3, "minimum": 2}
    data = {"source": str(file), "kind": "preference"}
    return {**with_clients(model, 12), "partition": partition, "data": data}


def grids(model):
    """A comparison of each kind."""
    base = {**GRID, "model": {"path": model}}
    objectives = {"dpo": {}, "kto": {"objective": {"name": "kto"}}}
    personal = ("local_only", "fedavg", "fedavg_ft", "ditto")
    labelled = {"data": {"source": "builtin:labelled", "builtin_rows": 240}}
    classes = {**labelled, "public": {"rows": 24}, "objective": {"name": "classification"}}
    frameworks = ("fedavg", "distillation", "split", "local_only")
    return {
        "comparison": {
            **base,
            "compare": {
                "budget": "examples",
                "amount": 8,
                "methods": ["fedavg", "fedprox"],
                "seeds": [0, 1],
                "objectives": objectives,
            },
        },
        "personal": {
            **base,
            "compare": {
                "budget": "as_set",
                "judged_by": "clients",
                "seeds": [0, 1],
                "scenarios": {"alike": {}},
                "methods": {name: {"method": {"name": name}} for name in personal},
            },
        },
        "frameworks": {
            **base,
            **classes,
            "evaluation": {"per_client": False, "samples": 0},
            "compare": {
                "budget": "as_set",
                "seeds": [0, 1],
                "scenarios": {"alike": {}},
                "methods": {name: {"method": {"name": name}} for name in frameworks},
                "links": LINKS,
            },
        },
    }


def experts(model):
    """A run whose clients hold experts."""
    method = {"name": "fedamole", "max_experts_per_client": 3, "embedding_fraction": 0.5}
    return {
        **with_clients(model, 12),
        "partition": {"kind": "column", "column": "domain"},
        "method": method,
        "adapter": {"kind": "experts", "rank": 2, "experts": 12},
    }


def shared_rows(model, file, clients):
    """An experiment with long labels and sites, several scripts, and texts that many clients have."""
    words = ("the patient was seen", "без жалоб", "and has no complaint, " * 30)
    labels = ("urgent", "routine", "a label that is rather long and should not push the table out")
    rows = [
        {
            "text": f"{words[i % 3]} {i % 400}",
            "label": labels[i % 5 % 3],
            "site": f"site number {i % 7} of a hospital with a long name",
        }
        for i in range(1200)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": model},
        "data": {"source": str(file), "kind": "labelled", "max_length": 64},
        "objective": {"name": "classification"},
        "partition": {"kind": "dirichlet", "column": "site", "alpha": 0.3, "minimum": 2},
        "federation": {"clients": clients},
    }


def pages(folder, model):
    """Make all runs that are not there yet, and write each page anew; returns name to page."""
    import fedloom
    from fedloom.experiment.experiment import Experiment
    from fedloom.reports.comparison_page import write_comparison
    from fedloom.reports.data_page import write_data_page
    from fedloom.reports.run_page import write_report
    from fedloom.runs.comparison import compare, read_comparison
    from fedloom.runs.data_statistics import data_statistics
    from fedloom.settings.toml import write_toml

    folder.mkdir(parents=True, exist_ok=True)
    runs = {f"run-{clients}": with_clients(model, clients) for clients in (3, 20, 200)}
    runs["run-values"] = many_values(model, folder / "topics.jsonl")
    runs["run-experts"] = experts(model)
    found = {}
    for name, table in runs.items():
        own = folder / name
        if not (own / "summary.json").is_file():
            table = {**table, "output": {**table["output"], "folder": str(own)}}
            fedloom.run(Experiment.from_table(table))
        found[name] = write_report([own])
    some = [folder / "run-3", folder / "run-20", folder / "run-200"]
    found["several"] = write_report(some, folder / "several.html")
    for name, table in grids(model).items():
        file = folder / f"{name}.toml"
        file.write_text(write_toml(table))
        found[name] = write_comparison(compare(read_comparison(file), folder / name, workers=1))
    found["judged"] = judged(folder, some[:2])
    for clients in (4, 40):
        table = shared_rows(model, folder / "rows.jsonl", clients)
        record = data_statistics(Experiment.from_table(table))
        found[f"rows-{clients}"] = write_data_page(record, folder / f"rows-{clients}.html")
    return found


def judged(folder, runs):
    """The page of an evaluation with two judges that need no model of their own."""
    from fedloom.evaluation.judges import choose
    from fedloom.evaluation.questions import load_benchmark
    from fedloom.reports.evaluation_page import write_evaluation
    from fedloom.runs import benchmarks

    questions = folder / "questions.jsonl"
    rows = [
        {"question": f"Where is the {own}?", "category": "places"} for own in ("cup", "pan", "jar")
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = benchmarks.EvaluateSettings.read(["generation.max_new_tokens=12"])
    target = folder / "judged"
    if not (target / "evaluation.json").is_file():
        benchmarks.evaluate_benchmark(
            benchmarks.find_candidates(runs, settings.model, False),
            load_benchmark(str(questions), None),
            choose.make_judges(["longest", "refusal"], settings.judging),
            settings,
            target,
            _Quiet(),
        )
    return write_evaluation(target)


class _Quiet:
    def begin(self, text, total):
        return lambda count: None


class Browser:
    """Chromium over its own pipe: one JSON message after another, with a zero byte between."""

    def __init__(self, program):
        self._profile = tempfile.TemporaryDirectory()
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def take_pipes():  # the descriptors that the browser reads and writes are 3 and 4
            os.dup2(to_browser, 100)
            os.dup2(from_browser, 101)
            os.dup2(100, 3)
            os.dup2(101, 4)

        self._process = subprocess.Popen(
            [
                program,
                *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"),
            ],
            preexec_fn=take_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._numbers, self._rest, self._session = count(1), b"", None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        self._ask("Page.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._ask("Browser.close")
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)
        with contextlib.suppress(OSError):  # the browser may still be writing its profile
            self._profile.cleanup()

    def _ask(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            block = os.read(self._read, 1 << 20)
            if not block:
                raise OSError("the browser has ended")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def show(self, page, width, scheme):
        """Open a page, a file or an address, in a window of a width."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._ask("Emulation.setEmulatedMedia", features=features)
        self._ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def value(self, script):
        """What a script returns in the page that is open."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script, seconds=20):
        """Wait until a script returns something true in the page that is open, and return it."""
        end = time.monotonic() + seconds
        while not (found := self.value(script)):
            assert time.monotonic() < end, f"never true in {seconds} s: {script}"
            time.sleep(0.05)
        return found

    def press(self, *keys):
        """Press keys one after another, as a keyboard does."""
        for key in keys:
            code = CODES.get(key, ord(key[0].upper()))
            own = {"key": KEYS.get(key, key), "windowsVirtualKeyCode": code}
            text = {"Enter": "\r", "Space": " "}.get(key, key if len(key) == 1 else None)
            self._ask(
                "Input.dispatchKeyEvent", type="keyDown", **own, **({"text": text} if text else {})
            )
            self._ask("Input.dispatchKeyEvent", type="keyUp", **own)

    def mouse(self, kind, x, y, held=False):
        """Move, press or release the mouse at a place of the window."""
        self._ask(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="left" if held else "none",
            buttons=int(held),
            clickCount=1,
        )

    def faults(self):
        """What is wrong in the page that is open, as sentences."""
        return self.value(FAULTS.read_text())

    def picture(self, target, height=None):
        """Take a picture of the page that is open: its top, or the whole of it."""
        width = self.value("innerWidth")
        height = height or min(16000, self.value("document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self._ask(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
        target.write_bytes(base64.b64decode(data["data"]))


def live_pictures(window, run, folder):
    """Take pictures of a run's live page, and return what is wrong in it."""
    from fedloom.reports.live_server import LivePage

    found = []
    with LivePage(run) as page:
        for width in WIDTHS:
            for scheme in SCHEMES:
                window.show(page.address, width, scheme)
                window.until("document.querySelectorAll('svg.drawn').length > 2")
                window.picture(folder / f"live-{run.name}-{width}-{scheme}.png")
                found += [f"live {run.name}, {width}, {scheme}: {own}" for own in window.faults()]
    return found


def main(folder, model="tiny"):
    made = pages(folder, model)
    with Browser(browser()) as window:
        for name, page in made.items():
            for width in WIDTHS:
                for scheme in SCHEMES:
                    window.show(page, width, scheme)
                    window.picture(folder / f"{name}-{width}-{scheme}.png")
                    for fault in window.faults():
                        print(f"{name}, {width}, {scheme}: {fault}")
        for clients in (20, 200):
            for fault in live_pictures(window, folder / f"run-{clients}", folder):
                print(fault)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
