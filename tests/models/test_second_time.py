"""A model of averages over an interval of time: `second_time`."""

import pytest
import torch

from ditfast import DiT
from ditfast.checkpoints import to_diffusers
from ditfast.models import cost

NEW = {f"r_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


class Both(torch.nn.Module):
    """Replaces the embedder in a model with one time."""

    def __init__(self, model, r):
        super().__init__()
        self.first, self.second, self.r = model.t_embedder, model.r_embedder, r

    def forward(self, t):
        return self.first(t) + self.second(self.r - t)


def inputs(kit):
    x, _, y = kit.batch()
    return x, torch.tensor([0.1, 0.5, 0.2]), y, torch.tensor([1.0, 0.5, 0.9])


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
@torch.no_grad()
def test_the_interval_is_embedded_too(kit, conditioning):
    model, plain = (kit.tiny(conditioning=conditioning, second_time=two) for two in (True, False))
    assert model.state_dict().keys() - plain.state_dict().keys() == NEW
    x, t, y, r = inputs(kit)
    got, same = model(x, t, y, r=r), model(x, t, y)
    torch.testing.assert_close(same, model(x, t, y, r=t), rtol=0, atol=0)
    assert ((got - same).flatten(1).abs().amax(1) > 1e-5).tolist() == [True, False, True]
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in NEW})
    plain.t_embedder = Both(model, r)
    kit.close(got, plain(x, t, y))
    kit.close(model(x, t[:1], y, r=r[:1]), model(x, t[:1].expand(3), y, r=r[:1].expand(3)))


def test_new_weights_start_like_those_of_the_first_time():
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=64, depth=1, num_heads=2, second_time=True)
    for layer in (model.r_embedder.mlp[0], model.r_embedder.mlp[2]):
        assert abs(layer.weight.std() - 0.02) < 0.002 and not layer.bias.any()


def test_on_disk(kit, tmp_path):
    model = kit.tiny(second_time=True)
    model.save_pretrained(tmp_path)
    x, t, y, r = inputs(kit)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    for loaded in (DiT.from_pretrained(tmp_path), DiT.from_pretrained(tmp_path / "bare.pt", num_heads=2)):
        assert loaded.config["second_time"]
        assert torch.equal(loaded(x, t, y, r=r), model(x, t, y, r=r))
    with pytest.raises(ValueError, match="diffusers cannot express second_time=True"):
        to_diffusers(model.config, model.state_dict())


def test_cost(kit):
    one, two = (kit.tiny(second_time=second).to("meta") for second in (False, True))
    dim = 32
    assert cost.macs(two)["embedders"] - cost.macs(one)["embedders"] == 256 * dim + dim * dim
    assert cost.parameters(two)["embedders"] - cost.parameters(one)["embedders"] == 256 * dim + dim * dim + 2 * dim


def test_bad_input(kit):
    x, t, y, r = inputs(kit)
    with pytest.raises(ValueError, match="r must be None for a model with second_time=False"):
        kit.tiny()(x, t, y, r=r)
    model = kit.tiny(second_time=True)
    with pytest.raises(ValueError, match=r"r must have shape \(B,\) = \(3,\), got \(2,\)"):
        model(x, t, y, r=r[:2])
    with pytest.raises(TypeError, match="r must be a tensor, got float"):
        model(x, t, y, r=1.0)
    with pytest.raises(ValueError, match="second_time must be true or false, got 3"):
        kit.tiny(second_time=3)
