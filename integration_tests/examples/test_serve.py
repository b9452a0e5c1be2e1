"""serve.py: its limits, both of its models, its metrics, and the same on a local Ray."""

import http.client
import json
import os
import sys

import pytest
import torch
from helpers import REPOSITORY, in_place, minilm_path, tiny_gpt2

pytest.importorskip("litserve", reason="the serve extra is not installed")
pytest.importorskip("prometheus_client", reason="the serve extra is not installed")

sys.path.insert(0, str(REPOSITORY / "examples"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tiny GPT-2 with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2TokenizerFast

    path = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: index for index, letter in enumerate(["<end>", *alphabet])}
    made = Tokenizer(models.BPE(words, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = GPT2TokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(path)
    tiny_gpt2(vocab_size=len(words)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def server(gpt2):
    from serve_load_test import Server

    options = ["--gpt2", gpt2, "--threads", "1", "--max-body", "4000", "--max-tokens", "64"]
    with Server(*options, "--accelerator", "cpu") as running:
        yield running


def post(port, path, content, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read() or "null")
    finally:
        connection.close()


def test_embeddings_are_those_of_the_unpatched_model(server):
    from serve import Encoder

    text = "Bread needs flour, water, salt and time."
    status, answer = post(server.port, "/embed", {"text": text})
    assert status == 200
    encoder = Encoder(minilm_path(), "cpu")
    (expected,) = encoder([encoder.tokenizer(text)["input_ids"]])
    assert answer["tokens"] == expected["tokens"]
    torch.testing.assert_close(
        torch.tensor(answer["embedding"]),
        torch.tensor(expected["embedding"]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_generation_is_that_of_the_unpatched_model(server, gpt2):
    from serve import Generator

    generator = Generator(gpt2, "cpu")
    for text, count in (("a station", 5), ("the old train", 9)):
        given = {"text": text, "max_new_tokens": count}
        status, answer = post(server.port, "/generate", given)
        ids = generator.tokenizer(text)["input_ids"]
        assert (status, answer) == (200, generator([(ids, count)])[0])


@pytest.mark.parametrize(
    ("path", "content", "status", "detail"),
    [
        ("/embed", {"text": "x " * 3000}, 413, "at most 4000 bytes"),
        ("/embed", {"text": "word " * 70}, 422, "1 to 64 tokens, got 72"),
        ("/embed", {"words": "x"}, 422, "Field required"),
        ("/embed", {"text": 5}, 422, "valid string"),
        ("/embed", b"no json", 422, "JSON decode error"),
        ("/generate", {"text": "x", "max_new_tokens": 100000}, 422, "less than or equal"),
        ("/generate", {"text": "x" * 70}, 422, "1 to 64 tokens, got 70"),
        ("/generate", {"text": ""}, 422, "1 to 64 tokens, got 0"),
        ("/nothing", {"text": "x"}, 404, "Not Found"),
    ],
)
def test_what_is_over_a_limit_gets_its_status(server, path, content, status, detail):
    got, answer = post(server.port, path, content)
    assert got == status and detail in json.dumps(answer), (got, answer)


def test_a_body_without_its_length_is_bounded(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    parts = (b'{"text": "' if i == 0 else b"x" * 1000 for i in range(9))
    connection.request("POST", "/embed", parts, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_health_and_metrics(server):
    post(server.port, "/embed", {"text": "x"})
    assert server.get("/health") == (200, "ok")
    status, said = server.get("/metrics")
    assert status == 200
    assert 'requests_total{path="/embed",status="200"}' in said
    assert "requests_in_flight 0.0" in said and "request_seconds_bucket" in said


def test_ray_serves_the_same():
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray import serve
    from serve import Encoder, ray_app
    from serve_load_test import free_port

    port, paths = free_port(), [os.environ.get("PYTHONPATH"), *in_place()]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={
            "working_dir": str(REPOSITORY / "examples"),  # as `serve run --working-dir examples`
            "env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        },
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_app({"max_tokens": "64", "max_body": "4000"}))
        status, answer = post(port, "/embed", {"text": "Where is the station?"})
        encoder = Encoder(minilm_path(), "cpu")
        (expected,) = encoder([encoder.tokenizer("Where is the station?")["input_ids"]])
        assert status == 200 and answer["tokens"] == expected["tokens"]
        assert answer["embedding"] == pytest.approx(expected["embedding"], rel=1e-4, abs=1e-5)
        assert post(port, "/embed", {"text": "x " * 3000})[0] == 413
        assert post(port, "/embed", {"text": "word " * 70})[0] == 422
        assert post(port, "/embed", b"no json")[0] == 422
    finally:
        serve.shutdown()
        ray.shutdown()
