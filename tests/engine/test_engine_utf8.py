"""`utf8: "strict"`: a byte model that cannot emit broken text, whatever it would like to say."""

from __future__ import annotations

import pytest

from tests.wild import wild

CHARACTERS = ["é", "€", "世", "🦊", "\U0010ffff", "\ud7ff"]


def assert_strict(prompt_tail: bytes, data: bytes) -> None:
    (prompt_tail + data).decode("utf-8", "strict")


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_output_always_decodes_strictly(driver_on, temperature, ignore_eos):
    driver = driver_on(*wild(), max_num_seqs=64)
    params = {"temperature": temperature, "ignore_eos": ignore_eos}
    for max_tokens in (1, 2, 3, 4, 5, 6, 7, 30):
        for seed in range(12):
            driver.submit(f"{max_tokens}-{seed}", b"\xfeab", max_tokens=max_tokens, seed=seed, **params)
    multibyte = 0
    for request_id, gathered in driver.run().items():
        assert_strict(b"", gathered.data)
        multibyte += any(byte >= 0x80 for byte in gathered.data)
        if ignore_eos:
            assert len(gathered.data) == int(request_id.partition("-")[0])
        assert 0xFF not in gathered.data
    assert temperature == 0.0 or multibyte > 10


@pytest.mark.parametrize("character", CHARACTERS)
def test_a_prompt_that_ends_inside_a_character_is_completed_first(driver_on, character):
    data = character.encode()
    driver = driver_on(*wild(), max_num_seqs=64)
    for cut in range(1, len(data)):
        for seed in range(8):
            driver.submit(f"{cut}-{seed}", b"\xfeab" + data[:cut], max_tokens=9, seed=seed, temperature=2.0)
        for left in range(len(data) - cut, len(data) - cut + 3):  # just enough to finish it, and a little more
            driver.submit(f"{cut}+{left}", b"\xfe" + data[:cut], max_tokens=left, seed=left, ignore_eos=True)
    for request_id, gathered in driver.run().items():
        cut = int(request_id.replace("+", "-").partition("-")[0])
        assert len(gathered.data) >= len(data) - cut  # not even EOS may come before the character is whole
        assert_strict(data[:cut], gathered.data)


def test_a_character_that_cannot_be_finished_is_continued_as_far_as_it_goes(driver_on):
    """Three bytes are missing and one may come: nothing else can be well-formed."""
    driver = driver_on(*wild())
    for seed in range(8):
        gathered = driver.alone(b"\xfe\xf0", max_tokens=1, seed=seed, temperature=2.0)
        assert 0x90 <= gathered.data[0] <= 0xBF


def test_raw_output_may_be_any_bytes(driver_on):
    driver = driver_on(*wild(), max_num_seqs=32)
    for seed in range(32):
        driver.submit(str(seed), b"\xfe", max_tokens=30, seed=seed, temperature=2.0, utf8="raw", ignore_eos=True)
    texts = [gathered.data for gathered in driver.run().values()]
    broken = 0
    for data in texts:
        try:
            data.decode()
        except UnicodeDecodeError:
            broken += 1
    assert broken == 32
    assert set(b"".join(texts)) >= {0x80, 0xC0, 0xFF}
    assert all(len(data) == 30 for data in texts)


def test_raw_ends_at_eos_unless_it_is_ignored(driver_on):
    driver = driver_on(*wild(), max_num_seqs=32)
    for seed in range(32):
        driver.submit(str(seed), b"\xfe", max_tokens=300, seed=seed, temperature=50.0, utf8="raw")
    reasons = [(gathered.finish_reason, gathered.stop_reason) for gathered in driver.run().values()]
    assert reasons.count(("stop", 255)) > 10
    assert not any(0xFF in gathered.data for gathered in driver.gathered.values())


def test_a_strict_row_is_the_raw_rows_where_the_raw_one_is_well_formed(driver_on):
    """The mask only takes away: up to the first byte it forbids, greedy rows of both kinds agree."""
    driver = driver_on(*wild())
    for prompt in (b"\xfe", b"\xfeabc", b"\xfe" + "世界".encode()):
        params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 40}
        raw, strict = (driver.alone(prompt, utf8=mode, **params).data for mode in ("raw", "strict"))
        agree = next((i for i, (a, b) in enumerate(zip(raw, strict, strict=True)) if a != b), len(raw))
        if agree < len(raw):  # they part where the raw byte is not well-formed, or is EOS
            with pytest.raises(UnicodeDecodeError):
                (raw[: agree + 1] + b"\x80\x80\x80").decode() and raw[: agree + 1].decode()
