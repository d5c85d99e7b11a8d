"""Downloads without a network: one error, soon, and what was downloaded before is still read."""

import socket
import time
import urllib.request

import pytest
import torch

from ditfast import DiT
from ditfast.checkpoints import files, network
from ditfast.sampling import SampleError
from ditfast.sampling.autoencoder import load_vae

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture(params=["refuses", "is silent"])
def server(request, monkeypatch, tmp_path):
    """The address of all downloads, whose server refuses connections or accepts them and says nothing."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if request.param == "refuses":
            listening.close()
        monkeypatch.setattr(network, "SECONDS", 0.2)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(files, "URL", f"{address}/")
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        yield address


def test_one_error_soon(server, tmp_path):
    start = time.perf_counter()
    for load, error, parts in (
        (lambda: DiT.from_pretrained("a/dit"), FileNotFoundError, ("'a/dit'", "hf download a/dit")),
        (lambda: load_vae("ema", "cpu"), SampleError, ("vae ema", "hf download stabilityai/sd-vae-ft-ema")),
        (lambda: files.find_model(files.RELEASED[0]), OSError, (server, f"{tmp_path}/hub/checkpoints/DiT-XL-2-256x")),
    ):
        with pytest.raises(error) as refused:
            load()
        text = str(refused.value)
        assert "\n" not in text and all(part in text for part in (*parts, "where there is a network")), text
    assert time.perf_counter() - start < 20  # with huggingface_hub's retries it is more than 30


def test_what_was_downloaded_before_is_read(server, kit, tmp_path):
    kept = tmp_path / "cache" / "models--a--dit"
    kit.tiny().save_pretrained(kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    kit.same(DiT.from_pretrained("a/dit"), kit.tiny())
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(kit.tiny().state_dict(), tmp_path / "hub" / "checkpoints" / files.RELEASED[0])
    assert equal(files.find_model(files.RELEASED[0]), kit.tiny().state_dict())


def equal(found, expected):
    return all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_server_that_answers_with_an_error_answers(monkeypatch):
    def answer(request, timeout):
        raise urllib.request.HTTPError(request.full_url, 403, "Forbidden", {}, None)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    assert network.why_no_answer("https://example.org/x") is None
