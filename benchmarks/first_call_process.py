"""One fresh process of gpt2_first_call.py: prints what its first call took as a line of JSON.

    python benchmarks/first_call_process.py '{"patched": true, "started": ..., ...}'

Imports nothing but what a user's script does until the first call is over.
"""

import json
import sys
import threading
import time


def main() -> None:
    given = json.loads(sys.argv[1])
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel  # noqa: F401

    if given["patched"]:
        import eet_patch

        eet_patch.enable()
    device, on_gpu = given["device"], given["device"] != "cpu"
    imported = time.monotonic() - given["started"]

    if on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in every row of generation
    layers, hidden_size, heads = given["shape"]
    config = GPT2Config(n_layer=layers, n_embd=hidden_size, n_head=heads, n_positions=1024)
    dtype = getattr(torch, given["dtype"])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    prompt = torch.randint(0, config.vocab_size, (given["batch_size"], given["seq_len"]))
    prompt = prompt.to(device)
    mask = torch.ones_like(prompt)

    def generate(new_tokens: int) -> torch.Tensor:
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        tokens = model.generate(prompt, attention_mask=mask, **settings)
        if on_gpu:
            torch.cuda.synchronize(device)
        return tokens

    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.monotonic()
    tokens = generate(given["new_tokens"])
    found = {"imported_s": imported, "first_call_s": time.monotonic() - started}
    started = time.monotonic()
    generate(given["new_tokens"])
    found["second_call_s"] = time.monotonic() - started

    found |= memory(given, model, generate)
    if given["patched"]:
        row = eet_patch.report()["gpt2_sample"]
        found["replaced"], found["fallbacks"] = row.replaced, row.fallbacks
        eet_patch.disable()
    import gpt2_common  # only now: it imports eet_patch

    logits = gpt2_common.logits_after(model, tokens, given["new_tokens"])
    found["gap"] = gpt2_common.largest_gap(logits, tokens[:, given["seq_len"] :])
    print(json.dumps(found))


def memory(given: dict, model, generate) -> dict[str, int]:
    """Bytes of the model, of the KV cache and of the peak in a call of `memory_tokens`; and of what
    report() counted at most while it ran."""
    import torch

    config, new_tokens = model.config, given["memory_tokens"]
    itemsize = model.lm_head.weight.itemsize
    tokens = given["batch_size"] * (given["seq_len"] + new_tokens - 1)
    found = {
        "model": sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()}),
        "kv_cache": 2 * config.n_layer * config.n_embd * tokens * itemsize,
    }
    stop, most = threading.Event(), [0]

    def poll() -> None:
        import eet_patch

        while not stop.is_set():
            most[0] = max(most[0], sum(eet_patch.report().memory.values()))
            stop.wait(0.005)

    poller = threading.Thread(target=poll)
    if given["patched"]:
        poller.start()
    if given["device"] != "cpu":
        torch.cuda.reset_peak_memory_stats(given["device"])
    try:
        generate(new_tokens)
    finally:
        stop.set()
    if given["patched"]:
        poller.join()
        found["reported"] = most[0]
    if given["device"] != "cpu":
        found["peak"] = torch.cuda.max_memory_allocated(given["device"])
        free, total = torch.cuda.mem_get_info(given["device"])
        # Contexts, kernels, graphs; of other processes too, if the GPU is shared.
        found["outside"] = total - free - torch.cuda.memory_reserved(given["device"])
    return found


if __name__ == "__main__":
    main()
