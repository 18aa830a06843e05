"""Options that only make sense together."""

import pytest

from eventstore.settings import SettingsError, parse
from frontend.settings import FrontendSettings


@pytest.mark.parametrize("mode", ["round-robin", "random", "direct", "least-loaded"])
def test_cache_control_needs_the_mode_that_knows_of_caches(mode: str) -> None:
    asked = ["--router-mode", mode, "--enable-cache-control"]
    with pytest.raises(SettingsError, match=r"enable-cache-control\) needs --router-mode kv"):
        parse(FrontendSettings, asked, {})
    with pytest.raises(SettingsError, match="needs --router-mode kv"):
        parse(FrontendSettings, asked[:2], {"DYN_ENABLE_CACHE_CONTROL": "1"})
    kv = parse(FrontendSettings, ["--router-mode", "kv", "--enable-cache-control"], {})
    assert kv.enable_cache_control
