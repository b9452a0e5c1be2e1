"""Load serve.py with sentences of mixed length, patched and unpatched: throughput, latency, losses.

    python examples/serve_load_test.py                    # 5,000 requests from 32 clients, twice
    python examples/serve_load_test.py --kill-worker      # a worker dies half-way
    python examples/serve_load_test.py --overload         # a queue of 8 for 32 clients

Starts the server by itself, on the loopback alone. A request that gets 429, 5xx or no answer is
sent again, as a client would; one without an answer after that is lost, and the exit status is 1.
"""

import argparse
import csv
import datetime
import http.client
import json
import os
import queue
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

SERVER = Path(__file__).with_name("serve.py")
WORDS = "the a train leaves at nine from old station near river when rain falls people walk home"
WORDS = [*WORDS.split(), "umbrella", "yesterday", "unfortunately", "council", "temperature", "."]
SECONDS_TO_TRY = 60
SECONDS_TO_START = 180


def sentences(count: int, seed: int = 0) -> list[str]:
    """Lengths from 3 to 120 words, as many short ones as long ones on a logarithmic scale."""
    rng = random.Random(seed)
    lengths = [round(3 * 40 ** rng.random()) for _ in range(count)]
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """serve.py in a process of its own, ready when entered and gone with its workers when left."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.command = [sys.executable, str(SERVER), "--port", str(self.port), *options]

    def __enter__(self) -> "Server":
        # Threads that spin while they wait would take the processors from each other.
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        self.process = subprocess.Popen(self.command, env=environment, start_new_session=True)
        until = time.monotonic() + SECONDS_TO_START
        while self.get("/health")[0] != 200:
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # what is left of its session
        except ProcessLookupError:
            pass
        self.process.wait()

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def kill_worker(self) -> int:
        """Kills the process of the session that holds a model: the largest."""
        sizes = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:  # the session
                sizes[int(status.parent.name)] = int(fields[21])  # resident pages
        largest = max(sizes, key=lambda pid: sizes[pid])
        os.kill(largest, signal.SIGKILL)
        return largest


class Load:
    """Clients that share a list of requests; each has one connection."""

    def __init__(self, server: Server, texts: list[str], clients: int) -> None:
        self.server, self.texts = server, texts
        self.todo: queue.Queue[int] = queue.Queue()
        for index in range(len(texts)):
            self.todo.put(index)
        self.answers: dict[int, dict[str, object]] = {}
        self.seconds: list[float] = []
        self.failures: Counter[str] = Counter()
        self.threads = [threading.Thread(target=self.client) for _ in range(clients)]

    def run(self) -> float:
        started = time.perf_counter()
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()
        return time.perf_counter() - started

    def client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        while True:
            try:
                index = self.todo.get_nowait()
            except queue.Empty:
                connection.close()
                return
            body, started = json.dumps({"text": self.texts[index]}), time.perf_counter()
            while time.perf_counter() - started < SECONDS_TO_TRY:
                status = self.send(connection, index, body)
                if status == "200":
                    self.seconds.append(time.perf_counter() - started)
                    break
                self.failures[status] += 1
                time.sleep(random.uniform(0.05, 0.2))

    def send(self, connection: http.client.HTTPConnection, index: int, body: str) -> str:
        try:
            connection.request("POST", "/embed", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return type(error).__name__
        if response.status == 200:
            self.answers[index] = json.loads(content)
        return str(response.status)


def largest_difference(load: Load, name: str, count: int = 64) -> float:
    """Of some answers, from what the unpatched model says to each text alone."""
    from serve import Encoder

    encoder, worst = Encoder(name, "cpu"), 0.0
    for index in sorted(load.answers)[:count]:
        ids = encoder.tokenizer(load.texts[index])["input_ids"]
        expected = encoder([ids])[0]["embedding"]
        pairs = zip(load.answers[index]["embedding"], expected, strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    return worst


def measure(
    options: list[str], texts: list[str], clients: int, during: str = ""
) -> tuple[Load, float]:
    with Server(*options) as server:
        Load(server, texts[:200], clients).run()  # warms up
        load = Load(server, texts, clients)
        if during == "kill":

            def kill_half_way() -> None:
                while len(load.answers) < len(texts) // 2:
                    time.sleep(0.01)
                print(f"  killing worker {server.kill_worker()}", flush=True)

            threading.Thread(target=kill_half_way, daemon=True).start()
        seconds = load.run()
    return load, seconds


class Tally:
    """What the rounds of one provider came to."""

    def __init__(self) -> None:
        self.requests, self.answered, self.elapsed = 0, 0, 0.0
        self.seconds: list[float] = []
        self.failures: Counter[str] = Counter()

    def add(self, load: Load, elapsed: float) -> None:
        self.requests += len(load.texts)
        self.answered += len(load.answers)
        self.elapsed += elapsed
        self.seconds += load.seconds
        self.failures += load.failures

    @property
    def rate(self) -> float:
        return self.answered / self.elapsed

    @property
    def lost(self) -> int:
        return self.requests - self.answered

    def percentiles(self) -> tuple[float, float]:
        ordered = sorted(self.seconds)
        return statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]


def line(name: str, tally: Tally) -> str:
    p50, p99 = tally.percentiles()
    rate, lost, again = tally.rate, tally.lost, dict(tally.failures) or "none"
    return (
        f"{name:12s}{rate:8.1f} requests/s   p50 {p50 * 1e3:6.0f} ms   p99 {p99 * 1e3:6.0f} ms   "
        f"lost {lost}   sent again: {again}"
    )


def record(args: argparse.Namespace, tallies: dict[str, Tally], difference: float) -> None:
    """A row a provider, for the table in docs/serving.md."""
    import torch
    import transformers

    from eet_patch.testing.timing import device_name

    rows = []
    for provider, tally in tallies.items():
        p50, p99 = tally.percentiles()
        rows.append(
            {
                "provider": provider,
                "requests": tally.requests,
                "clients": args.clients,
                "requests_per_second": f"{tally.rate:.1f}",
                "p50_ms": f"{p50 * 1e3:.0f}",
                "p99_ms": f"{p99 * 1e3:.0f}",
                "lost": tally.lost,
                "max_difference": f"{difference:.1e}" if provider == "eet_patch" else "",
                "device": device_name("cuda:0" if torch.cuda.is_available() else "cpu"),
                "model": "MiniLM (6 layers, 384)",
                "torch": torch.__version__,
                "host": f"transformers {transformers.__version__}",
                "options": " ".join(args.options),
                "commit": os.environ.get("EET_COMMIT", ""),
                "date": datetime.date.today().isoformat(),
            }
        )
    args.record.parent.mkdir(parents=True, exist_ok=True)
    with args.record.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="turns of each provider")
    parser.add_argument("--kill-worker", action="store_true")
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--record", type=Path, help="a CSV file for the two measurements")
    parser.add_argument("options", nargs="*", help="of serve.py, behind --")
    args = parser.parse_args()
    from serve import minilm

    print(f"{args.requests} requests of mixed length from {args.clients} clients", flush=True)
    texts = sentences(args.requests)
    if args.kill_worker or args.overload:
        options = ["--timeout", "10"] if args.kill_worker else ["--max-queue", "8"]
        during, tally = "kill" if args.kill_worker else "", Tally()
        tally.add(*measure([*options, *args.options], texts, args.clients, during))
        print(line("eet_patch", tally))
        return 1 if tally.lost or (args.overload and "429" not in tally.failures) else 0
    tallies = {"transformers": Tally(), "eet_patch": Tally()}
    worst = 0.0
    # In turns, so that a machine that slows down slows both.
    for turn in range(args.rounds):
        part = texts[turn :: args.rounds]
        for provider, tally in tallies.items():
            unpatched = ["--unpatched"] if provider == "transformers" else []
            load, seconds = measure([*unpatched, *args.options], part, args.clients)
            tally.add(load, seconds)
        worst = max(worst, largest_difference(load, minilm()))
    for provider, tally in tallies.items():
        print(line(provider, tally))
    ratio = tallies["eet_patch"].rate / tallies["transformers"].rate
    print(f"{ratio:.2f}x the requests; an answer differs by {worst:.1e} at most")
    if args.record:
        record(args, tallies, worst)
    return 0 if worst < 1e-4 and not any(tally.lost for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
