"""Values as JSON has them."""

from engine.files import plain


def test_headline_floats_keep_six_digits_of_any_size():
    assert plain({"a": 123456.789, "b": 1.23456789e-7}, digits=6) == {"a": 123457.0, "b": 1.23457e-07}
