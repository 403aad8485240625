"""What tiers are made of: settings, the sum of bytes, and a block's bytes out of the cache and into it."""

import pytest
import torch

from twofold.core import ConfigError
from twofold.engine.config import EngineConfig
from twofold.engine.contents import BlockContents
from twofold.engine.tiers import STAGED_BYTES


@pytest.mark.parametrize("setting", [{"kv_host_bytes": 1 << 20}, {"kv_offload_dir": "somewhere"}])
def test_tiers_without_a_prefix_cache_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        EngineConfig(enable_prefix_caching=False, **setting)
    with pytest.raises(ConfigError, match="pooling"):
        EngineConfig(runner="pooling", **setting)


def test_the_memory_of_tiers_is_in_the_sum():
    assert EngineConfig().tier_bytes == 0
    assert EngineConfig(kv_host_bytes=5).tier_bytes == 5
    assert EngineConfig(kv_offload_dir="somewhere").tier_bytes >= STAGED_BYTES
    assert EngineConfig(kv_host_bytes=5, device="cuda").tier_bytes == 0, "host memory is not the device's"


@pytest.mark.parametrize("device", ["cpu", "as another device would"])
def test_a_blocks_bytes_come_back_as_they_went(device, monkeypatch):
    def layers():
        floats = torch.randn(6, 2, 16, 8)
        return [
            {"keys": floats.to(torch.float8_e4m3fn), "values": floats.to(torch.bfloat16)},
            {"keys": floats.clone(), "values": (floats * 9).to(torch.int8), "key_scales": torch.rand(6, 2, 16)},
        ]

    source, target = layers(), layers()
    cache = {"now": source}
    contents = BlockContents(lambda: cache["now"])
    if device != "cpu":
        monkeypatch.setattr(contents, "_here", lambda parts: False)
    assert contents.nbytes == 2 * 16 * (8 * (1 + 2 + 4 + 1) + 4)
    assert "float8_e4m3fn" in contents.about and "2 layers" in contents.about
    saved = contents.save([4, 1])
    before = [part.view(torch.uint8).clone() for layer in target for part in layer.values()]
    cache["now"] = target
    contents.restore([0, 5], saved)
    for was, ours, theirs in zip(
        before, (p for layer in target for p in layer.values()), (p for layer in source for p in layer.values())
    ):
        ours, theirs = ours.view(torch.uint8), theirs.view(torch.uint8)
        assert torch.equal(ours[0], theirs[4]) and torch.equal(ours[5], theirs[1])
        assert torch.equal(ours[1:5], was[1:5]), "no other block was touched"
