"""Tiny random models and a tiny tokenizer, made on the spot: no network, no weights. `real` tests use smollm2."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # is read at import, which a block of docs/integrations.md does too
torch.set_num_threads(min(2, os.cpu_count() or 1))
settings.register_profile("kvembed", deadline=None)  # a busy machine is no failure
settings.load_profile("kvembed")

NOTICES = (Path(__file__).parent.parent / "examples" / "notices.txt").read_text().splitlines()
MANY = [f"{one} {number}" for number in range(21) for one in NOTICES][:1000]  # as many as a transform is fitted on
SHARED = Path(__file__).parent.parent.parent / "shared"
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")


@pytest.fixture(autouse=True)
def _own_cache(request, tmp_path, monkeypatch):
    """Nothing a test stores outlives it; `real` tests read the user's cache, where smollm2 is.

    And a tiny model writes fewer texts, for every test that fits a transform waits for them.
    """
    if "real" not in request.keywords:
        monkeypatch.setenv("KVEMBED_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("kvembed.tuning.FIT_TEXTS", 200)
        monkeypatch.setattr("kvembed.tuning.QUERY_TEXTS", 150)
        monkeypatch.setattr("kvembed.layers._TEXTS", 150)
        monkeypatch.setattr("kvembed.tuning._GIVEN_TEXTS", 120)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE of 400 tokens with a BOS that is added in front, an EOS and a chat token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(NOTICES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<|im_end|>"]
    )


@pytest.fixture(scope="session")
def bare_tokenizer():
    """Like a llama or qwen GGUF's: no token is added, so an empty text has none."""
    tokenizer = Tokenizer(models.BPE(vocab={chr(i): i - 32 for i in range(32, 127)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny(model_type: str = "llama", seed: int = 0, **changes):
    """A random model of a given type: 5 layers, 4 query and 2 key-value heads, sharp attention."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 400,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 1024,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        | changes,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                # freshly made models attend almost evenly, which would hide mistakes
                weight.normal_(std=1.0 if "embed" in name else 0.35)
    return model


@pytest.fixture(scope="session")
def llama():
    return tiny()


@pytest.fixture(scope="session")
def smollm2():
    """The real default model, float32; pulled from the package index by `make test`."""
    from kvembed import models

    return models.load("smollm2", dtype="float32")


@pytest.fixture(scope="session")
def backbone_file():
    """name -> GGUF file of a real backbone, by the tool beside the checkout; skips where that is missing."""
    tool = SHARED / "tools" / "get_models.py"
    if not tool.is_file():
        pytest.skip(f"needs {tool.relative_to(SHARED.parent)}, which is not beside this checkout")
    spec = importlib.util.spec_from_file_location("get_models", tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda name: module.fetch(name, Path.home() / ".cache" / "kvembed-backbones")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not CHROMIUM.exists() or not DRIVER.exists():
        pytest.skip(f"needs {CHROMIUM} and {DRIVER} (apt-get install chromium chromium-driver)")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("needs selenium (pip install selenium)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@contextlib.contextmanager
def running(app):
    """An application on a free port, in a thread; yields the port."""
    import uvicorn

    from kvembed.server import listen_at, uvicorn_config

    server = uvicorn.Server(uvicorn_config(app))
    listener = listen_at("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def ground(browser):
    """Red, green and blue of the page behind its text."""
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in re.findall(r"\d+", colour)]


@pytest.fixture(scope="module")
def folder(embedder, tmp_path_factory):
    """The module's own `embedder`, saved."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    embedder.save_pretrained(path)
    return path
