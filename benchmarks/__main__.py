"""``make bench``; what can be chosen is below, what the figures mean is in README.md beside this file."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from benchmarks.bench import Bench, Options
from benchmarks.contenders import PEERS, REQUIREMENTS, chosen_peers, versions
from benchmarks.report import Report, machine
from benchmarks.services import Services

QUESTIONS = ("drain", "enqueue", "cost", "latency", "idle", "delayed", "workflows", "telemetry", "imports")

HELP = {
    "messages": "messages of a measurement of ours; peers get a share that takes them about as long",
    "rounds": "how often all take turns; the figures are medians",
    "probes": "messages sent to an idle worker, one by one",
    "idle": "seconds of idleness before a message, for example 180",
    "watch": "seconds for which an idle worker is watched",
    "backlog": "delayed messages that are present while others are processed, for example 1000000",
    "runs": "workflows",
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", default=",".join(QUESTIONS), help=f"of {', '.join(QUESTIONS)}")
    parser.add_argument("--peers", default="all", help=f"of {', '.join(p.name for p in PEERS)}; all; none")
    parser.add_argument("--url", help="a Postgres of one's own, as its superuser; by default an embedded one")
    parser.add_argument(
        "--flush-delay",
        type=int,
        default=0,
        help="µs that the embedded server waits before each flush: a slower disk",
    )
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    for option in fields(Options):
        kind = type(option.default)
        parser.add_argument(f"--{option.name}", type=kind, default=option.default, help=HELP[option.name])
    found = parser.parse_args(arguments)
    found.only = [name for name in found.only.split(",") if name]
    for name in found.only:
        if name not in QUESTIONS:
            parser.error(f"there is no question {name!r}: choose among {', '.join(QUESTIONS)}")
    try:
        found.peers = chosen_peers(found.peers.split(","))
    except ValueError as e:
        parser.error(str(e))
    return found


def main(arguments: list[str] | None = None) -> None:
    found = parse(arguments)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    report = Report(as_json=found.json)
    peers = []
    for peer in found.peers:
        if missing := peer.missing():
            report.say(f"{peer.label} is left out; to measure it: {missing}")
        else:
            peers.append(peer)
    about = machine()
    if about["load"] > 0.5:
        report.say(f"Other programs are running (load average {about['load']:.1f}): do not believe figures or ratios.")
    options = Options(**{option.name: getattr(found, option.name) for option in fields(Options)})
    with tempfile.TemporaryDirectory(prefix="dramatiq-durable-bench-") as folder:
        services = Services(Path(folder), found.url, flush_delay=found.flush_delay)
        bench = Bench(options, services, report, peers)
        try:
            for name in QUESTIONS:
                if name in found.only:
                    importlib.import_module(f"benchmarks.questions.{name}").measure(bench)
        finally:
            bench.close()
            services.close()
    venvs = {peer.venv for peer in peers}
    report.finish({**about, "peers": {v: versions(v, REQUIREMENTS[v]) for v in sorted(venvs)}})


if __name__ == "__main__":
    main()
