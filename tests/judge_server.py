"""Judges for tests: one served on loopback over real HTTP, one in a real model folder."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.models.load import load_tokenizer

ANSWER = re.compile(r"<answer-(\d+)-(\w+)>\n(.*?)\n</answer-\1-\2>", re.S)


def shown(body):
    """Return the case's code and its answers in the order shown, as any judge would read them."""
    text = body["messages"][-1]["content"]
    found = ANSWER.findall(text)
    return found[0][1], [answer for _, _, answer in found]


def verdict(body, scores):
    return f"Some reasons.\n[[verdict-{shown(body)[0]}: {' '.join(f'{s:g}' for s in scores)}]]"


@pytest.fixture
def serve():
    """Start a server whose ``behave(body)`` returns text, or (status, text), or raises to hang up."""
    servers = []

    def start(behave, key=None):
        state = SimpleNamespace(bodies=[], keys=[], lock=threading.Lock())

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with state.lock:
                    state.bodies.append(body)
                    state.keys.append(self.headers.get("authorization"))
                if key is not None and state.keys[-1] != f"Bearer {key}":
                    return self.send(401, b'{"error": "no"}', {})
                answer = behave(body)
                status, text, *more = answer if isinstance(answer, tuple) else (200, answer)
                if isinstance(text, bytes):
                    return self.send(status, text, more[0] if more else {})
                reply = {
                    "choices": [{"message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                }
                return self.send(status, json.dumps(reply).encode(), more[0] if more else {})

            def do_GET(self):
                refused = key is not None and self.headers.get("authorization") != f"Bearer {key}"
                self.send(401 if refused else 404, b"", {})

            def send(self, status, data, headers):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        return state

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def parrot(folder, model_folder, text):
    """A Llama whose blocks do nothing and whose head says ``text`` after a colon, token by token."""
    tokenizer = load_tokenizer(str(model_folder))
    said = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    chain = [tokenizer(":", add_special_tokens=False)["input_ids"][-1], *said]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedded = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.lm_head.weight.zero_()
        for now, following in pairwise(chain):
            model.lm_head.weight[following] += 10 * embedded[now]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
