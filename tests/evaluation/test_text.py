"""Windows of the protocol."""

import numpy as np
import pytest

from qjax.evaluation import batches, calibration_windows, encode, windows
from qjax.evaluation.text import checked_windows, padded_batches


class Letters:
    """A tokenizer of one token a letter, with the interface of the `tokenizers` package."""

    def encode(self, text, add_special_tokens=True):
        self.ids = [99] * add_special_tokens + [ord(letter) for letter in text]
        return self


def test_encode_adds_nothing():
    assert encode(Letters(), "ab").tolist() == [97, 98]
    assert encode(Letters(), "").dtype == np.int32


def test_windows_start_once_and_drop_the_rest():
    rows = windows(np.arange(10, 18), length=4, start_id=1)
    np.testing.assert_array_equal(rows, [[1, 10, 11, 12], [13, 14, 15, 16]])
    np.testing.assert_array_equal(windows([3, 4, 5], length=3, start_id=None), [[3, 4, 5]])


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        ([[1, 2]], 2, "`ids` must be integers of shape"),
        ([1.5, 2.0], 2, "`ids` must be integers of shape"),
        ([1, 2], 1, "`length` must be at least 2"),
        ([1, 2], 4, r"`ids` with 3 tokens do not fill one window of 4"),
        ([], 4, r"`ids` with 1 tokens"),
    ],
)
def test_windows_refuse(ids, length, message):
    with pytest.raises(ValueError, match=message):
        windows(ids, length)


def test_calibration_windows_cut_each_line():
    rows = calibration_windows(Letters(), ["abcdef", "ghi", "x"], count=2, length=4)
    np.testing.assert_array_equal(rows, [[1, 97, 98, 99], [1, 103, 104, 105]])
    with pytest.raises(ValueError, match="line 3 gives 2 tokens, not 4"):
        calibration_windows(Letters(), ["abcdef", "ghi", "x"], count=3, length=4)
    with pytest.raises(ValueError, match="`count` must be 1 to 3"):
        calibration_windows(Letters(), ["abcdef", "ghi", "x"], count=4, length=4)


def test_batches_keep_order_and_padding_is_counted():
    rows = np.arange(10).reshape(5, 2)
    assert [len(batch) for batch in batches(rows, 2)] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(list(batches(rows, 2))), rows)
    padded = list(padded_batches(rows, 2))
    assert [(batch.shape, count) for batch, count in padded] == [((2, 2), 2), ((2, 2), 2), ((2, 2), 1)]
    assert [batch.shape for batch, _ in padded_batches(rows, 100)] == [(5, 2)]
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, not 0"):
        list(batches(rows, 0))


@pytest.mark.parametrize(
    "bad", [np.zeros((0, 4), int), np.zeros((2, 1), int), np.zeros(4, int), np.zeros((2, 4)), -np.ones((2, 2), int)]
)
def test_checked_windows_refuse(bad):
    with pytest.raises(ValueError, match="`tokens` must be ids"):
        checked_windows(bad)
