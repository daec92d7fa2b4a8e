from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

NAN, INF = float("nan"), float("inf")
MOST = torch.finfo(torch.float64).max


def check(ours, truth):
    assert_close(
        *(torch.tensor(x, dtype=torch.float64) for x in (ours, truth, truth)), torch.float32
    )


def test_accepts():
    for same in ([1.0, NAN, INF, -INF], [NAN], [INF], []):
        check(same, same)
    check([1.0 + 2.0**-24, NAN], [1.0, NAN])


@pytest.mark.parametrize(
    ("ours", "truth", "message"),
    [
        ([1.0, 0.0], [1.0, NAN], "NaN where"),
        ([1.0, NAN], [1.0, 0.0], "NaN where"),
        ([1.0, INF], [1.0, NAN], "NaN where"),
        ([1.0, MOST], [1.0, INF], "infinite where"),
        ([1.0, -MOST], [1.0, -INF], "infinite where"),
        ([1.0, -INF], [1.0, INF], "infinite where"),
        ([1.0, INF], [1.0, 2.0], "infinite where"),
        ([1.0, NAN], [1.0, INF], "NaN where"),
        ([1.0 + 2.0**-22], [1.0], "error"),
    ],
)
def test_rejects(ours, truth, message):
    with pytest.raises(AssertionError, match=message):
        check(ours, truth)
