"""Private data: found in the forms it really has, not where numbers only look like it, and never shown."""

import random

import pytest

from ft_service.data.judge.form import check_record
from ft_service.data.judge.private import excerpt, find_private, is_card_number, mask
from tests.judge_cases import record


def found(text: str) -> list[str]:
    return [code for code, _, _ in find_private(text)]


PRIVATE = {
    "taro.yamada@mail.co.jp": "private.email",
    "j.smith+news@gmail.com": "private.email",
    "ｔａｒｏ＠ｍａｉｌ．ｃｏ．ｊｐ": "private.email",
    "(212) 736-5000": "private.phone",
    "212-736-5000": "private.phone",
    "+1 212 736 5000": "private.phone",
    "+44 20 7946 0018": "private.phone",
    "090-1234-5678": "private.phone",
    "03-3456-7890": "private.phone",
    "０３－３４５６－７８９０": "private.phone",
    "+81-90-1234-5678": "private.phone",
    "4111 1111 1111 1111": "private.card",
    "5500-0000-0000-0004": "private.card",
    "378282246310005": "private.card",
    "４１１１　１１１１".replace("　", " ") + " 1111 1111": "private.card",
    "AKIAIOSFODNN7EXAMPLE": "private.key",
    "ghp_" + "a1B2" * 9: "private.key",
    "sk-proj-" + "Zx9_" * 12: "private.key",
    "hf_" + "AbCd" * 9: "private.key",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----": "private.key",
}


@pytest.mark.parametrize("secret", PRIVATE)
@pytest.mark.parametrize("around", ["Ask {} today.", "連絡先は{}です。", "({})", "{}", "番号：{}、以上"])
def test_private_data_is_found_and_masked_in_any_surroundings(secret: str, around: str) -> None:
    text = around.format(secret)
    assert found(text) == [PRIVATE[secret]]
    assert secret not in mask(text)
    assert mask(text).startswith(around.split("{}")[0]) and mask(text).endswith(around.split("{}")[1])


@pytest.mark.parametrize(
    "text",
    [
        "48/2 = <<48/2=24>>24 clips, 1,200,000 people, $1234.56 and 3.14159",
        "4111 1111 1111 1112",  # the check digit is wrong
        "1234567890123456",
        "0000 0000 0000 0000",
        "In 2023-2024 and on 2024-11-23 at 10:30:00",
        "192.168.100.200 and version 10.15.7",
        "ISBN 978-3-16-148410-0",
        "user@example.com, name@sub.example.org",
        "call 555-0123 or (212) 555-0147",
        "@handle, a@b, foo@bar",
        "sk-learn, AKIA, ghp_short, hf_model",
        "100-200-300個",
        "昭和64年1月7日、第123-456号",
    ],
)
def test_numbers_and_names_that_are_nobodys_are_not(text: str) -> None:
    assert found(text) == []


def test_one_changed_digit_makes_a_card_number_invalid() -> None:
    good = "4539578763621486"
    assert is_card_number(good)
    for at in range(16):
        changed = good[:at] + str((int(good[at]) + 1) % 10) + good[at + 1 :]
        assert not is_card_number(changed)


def test_a_finding_never_shows_what_it_found() -> None:
    dice = random.Random(0)
    for secret, code in PRIVATE.items():
        filler = "words " * dice.randrange(30)
        hits = list(check_record(record("q?", f"{filler}{secret} {filler}")))
        assert [hit.code for hit in hits] == [code]
        assert (
            secret not in hits[0].excerpt and secret[:12] not in hits[0].excerpt and secret[-8:] not in hits[0].excerpt
        )


@pytest.mark.parametrize("at", range(0, 70, 7))
def test_an_excerpt_that_begins_inside_a_secret_shows_none_of_it(at: int) -> None:
    secret = "ghp_" + "Qz7" * 12
    shown = excerpt(f"token {secret} and more words to follow after it", at)
    assert not any(secret[start : start + 6] in shown for start in range(len(secret) - 6))


def test_an_excerpt_is_short_and_on_one_line() -> None:
    shown = excerpt("line one\nline two " * 50, 300)
    assert len(shown) <= 82 and "\n" not in shown and shown.startswith("…") and shown.endswith("…")
