"""Limits of a principal: the token bucket and the charges of an account."""

from __future__ import annotations

import pytest

from cloud_verifier.engine.principals import Principal
from cloud_verifier.engine.rate_limits import BURST_SECONDS, PrincipalAccount, TokenBucket
from edge_runtime.protocol.errors import VerifierRefused


def test_a_bucket_allows_its_rate_and_a_burst_after_a_pause() -> None:
    now = 0.0
    bucket = TokenBucket(4.0, lambda: now)
    bucket.take(4 * BURST_SECONDS + 8)
    assert bucket.wait_seconds == pytest.approx(2.0)
    now = 1.5
    assert bucket.wait_seconds == pytest.approx(0.5)
    now = 2.5
    assert bucket.wait_seconds == 0
    now = 1e6
    bucket.take(4 * BURST_SECONDS + 1)
    assert bucket.wait_seconds == pytest.approx(0.25)


def test_charges_for_prompts_and_changed_limits() -> None:
    slow = Principal("", tokens_per_second=1.0, name="slow")
    account = PrincipalAccount(slow)
    account.charge(0, 159)
    account.check_rate()
    account.charge(0, 16)
    with pytest.raises(VerifierRefused, match="wait"):
        account.check_rate()
    account.update_limits(Principal("", tokens_per_second=100.0, name="slow"))
    account.check_rate()
    account.charge(10**9)
    account.update_limits(Principal("", name="slow"))
    account.check_rate()
